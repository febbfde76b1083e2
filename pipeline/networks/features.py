"""The pooled features of a network: what its classifier, one linear layer, is given."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache import UserError
from pipeline.networks.models import Chosen, Network


class Tapped(nn.Module):
    """A network that answers with its features f32 (B, F) as well: images -> (logits (B, C), features)."""

    def __init__(self, body: nn.Module, classifier: nn.Linear, outputs: Tensor | None = None):
        super().__init__()
        self.body, self.classifier = body, classifier
        self.register_buffer("outputs", outputs, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        body: Any = self.body
        if hasattr(body, "forward_head"):  # timm
            features = body.forward_head(body.forward_features(images), pre_logits=True)
        else:
            features = images
            for part in body:
                features = features if part is self.classifier else part(features)
        logits = self.classifier(features)
        return (logits if self.outputs is None else logits[:, self.outputs]), features


@dataclass(frozen=True)
class Head:
    """A teacher's classifier."""

    weight: np.ndarray
    """f32 (C, F)."""
    bias: np.ndarray
    """f32 (C,); zeros if the layer has none."""


def tapped(network: Network, size: int, whose: str) -> Tapped:
    """The network with its features, its tensors shared with it.

    `size`: pixels of an image to try it with; `whose`: the option that names the network. Raises UserError if its
    logits are not those of one linear layer of `forward_head(…, pre_logits=True)` (timm) or of all before it (cifar).
    """
    module, outputs = network.module, None
    if isinstance(module, Chosen):
        module, outputs = module.module, module.outputs
    body: Any = module
    classifier = body.get_classifier() if hasattr(body, "get_classifier") else getattr(body, "fc", None)
    known = hasattr(body, "forward_head") or (isinstance(module, nn.Sequential) and len(module))
    if not known or not isinstance(classifier, nn.Linear):
        found = f"a classifier of type {type(classifier).__name__}" if known else "a callable"
        raise _no_features(network, whose, found)
    made, training = Tapped(module, classifier, outputs), module.training
    images = torch.linspace(-1, 1, 3 * size * size, device=classifier.weight.device).reshape(1, 3, size, size)
    try:
        with torch.inference_mode():
            whole, (logits, features) = network.module.eval()(images), made(images)
            same = features.shape == (1, classifier.in_features) and torch.allclose(logits, whole, rtol=1e-3, atol=1e-4)
    except (RuntimeError, TypeError) as error:
        raise _no_features(network, whose, str(error).partition("\n")[0]) from None
    finally:
        module.train(training)
    if not same:
        raise _no_features(network, whose, "logits that are not those of its classifier alone")
    return made


def head(network: Tapped) -> Head:
    """Its classifier, the outputs that it answers with alone."""
    weight = network.classifier.weight.detach().float().cpu()
    bias = network.classifier.bias
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().float().cpu()
    if isinstance(outputs := network.outputs, Tensor):
        weight, bias = weight[outputs.cpu()], bias[outputs.cpu()]
    return Head(weight.numpy(), bias.numpy())


def _no_features(network: Network, whose: str, found: str) -> UserError:
    return UserError(
        f"{whose} {network.name} has no features to take",
        found=found,
        expected="a network of one linear classifier, cifar/NAME or most of timm's",
        fix="take another one, or leave the features out",
    )
