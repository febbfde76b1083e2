"""Networks and their weights, as several tests need them."""

import pytest
import torch
from torch import nn

from cache import UserError
from pipeline.networks import models

SMALL = "cifar/resnet8"


def shuffled_statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Give every batch norm statistics and an affine map that are not the identity; returns the state dict."""
    generator = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias.data, layer.running_var, layer.weight.data):
                tensor += torch.rand(tensor.shape, generator=generator) / 4
    return module.state_dict()


def refused(spec: object, classes=10, **options) -> str:
    """The one line that `models.create` ends in."""
    with pytest.raises(UserError) as caught:
        models.create(str(spec), classes, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same(network: models.Network, state: dict[str, torch.Tensor]) -> None:
    """Every tensor bit for bit."""
    loaded = network.module.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert network.fingerprint == models.fingerprint(state)
