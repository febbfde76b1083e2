"""Networks are the literature's, weights fit or are refused, files are never trusted."""

import hashlib
import re
import struct
from functools import partial
from unittest.mock import Mock, call

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import SMALL, refused, shuffled_statistics
from torch import nn
from torch.nn import functional as F

from cache import UserError
from pipeline.networks import cifar, models

# Parameters for 100 classes of the networks published with CRD (RepDistiller).
PUBLISHED = {
    "resnet20": 278_324,
    "resnet56": 861_620,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
}


def counted(name: str, classes: int) -> int:
    """Parameters added up from the papers' tables: 9·in·out a convolution, 2·width a batch norm."""
    depth, factor = (*map(int, re.findall(r"\d+", name)), 1)[:2]
    wide = name.startswith("wrn")
    blocks = (depth - (4 if wide else 2)) // 6
    inputs = 16 if wide or factor == 1 else 8 * factor
    total = 27 * inputs + (2 * 64 * factor if wide else 2 * inputs) + (64 * factor + 1) * classes
    for width in (16 * factor, 32 * factor, 64 * factor):
        total += 9 * inputs * width + 9 * width**2 + 2 * width + 2 * (inputs if wide else width)
        if inputs != width:
            total += inputs * width + (0 if wide else 2 * width)
        total += (blocks - 1) * (18 * width**2 + 4 * width)
        inputs = width
    return total


def resnet_logits(p: dict, x: torch.Tensor) -> torch.Tensor:
    """He et al. 2016, from a state dict: post-activation blocks, projected and normalised shortcuts."""
    norm, conv = partial(normed, p), partial(convolved, p)
    x = F.relu(norm("bn1", conv("conv1", x)))
    for stage in ("layer1", "layer2", "layer3"):
        for block in sorted({int(k.split(".")[1]) for k in p if k.startswith(f"{stage}.")}):
            at, stride = f"{stage}.{block}", 2 if block == 0 and stage != "layer1" else 1
            out = norm(f"{at}.bn2", conv(f"{at}.conv2", F.relu(norm(f"{at}.bn1", conv(f"{at}.conv1", x, stride)))))
            if f"{at}.downsample.0.weight" in p:
                x = norm(f"{at}.downsample.1", conv(f"{at}.downsample.0", x, stride))
            x = F.relu(out + x)
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]


def wide_resnet_logits(p: dict, x: torch.Tensor) -> torch.Tensor:
    """Zagoruyko and Komodakis 2016, from a state dict: a projection reads the activation, an identity does not."""
    norm, conv = partial(normed, p), partial(convolved, p)
    x = conv("conv1", x)
    for stage in ("block1", "block2", "block3"):
        for block in sorted({int(k.split(".")[2]) for k in p if k.startswith(f"{stage}.")}):
            at, stride = f"{stage}.layer.{block}", 2 if block == 0 and stage != "block1" else 1
            active = F.relu(norm(f"{at}.bn1", x))
            out = conv(f"{at}.conv2", F.relu(norm(f"{at}.bn2", conv(f"{at}.conv1", active, stride))))
            projected = f"{at}.convShortcut.weight" in p
            x = out + (conv(f"{at}.convShortcut", active, stride) if projected else x)
    return F.relu(norm("bn1", x)).mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]


def convolved(p: dict, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    weight = p[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def normed(p: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var, weight, bias = (p[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)


@pytest.mark.parametrize("name", sorted({*PUBLISHED, *cifar.NAMES}))
def test_the_networks_have_the_published_number_of_parameters_and_take_32_and_64_pixels(name):
    network = models.create(f"cifar/{name}", 100)
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    assert parameters == counted(name, 100) == PUBLISHED.get(name, parameters)
    module = network.module.to("meta")  # shapes alone
    for size in (32, 64):
        assert module(torch.empty(2, 3, size, size, device="meta")).shape == (2, 100)
    assert (network.name, network.classes, network.mean, network.std) == (f"cifar/{name}", 100, None, None)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn_16_1", "wrn_16_2"])
def test_the_networks_compute_what_the_papers_write(name):
    reference = wide_resnet_logits if name.startswith("wrn") else resnet_logits
    module = models.create(f"cifar/{name}", 10, seed=0).module.double().eval()
    state = shuffled_statistics(module)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    with torch.inference_mode():
        torch.testing.assert_close(module(images), reference(state, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("pattern", "smallest"), [("resnet{}", 8), ("resnet{}x2", 8), ("wrn_{}_1", 10)])
def test_a_depth_that_three_equal_stages_cannot_have_is_unknown(pattern, smallest):
    built = [depth for depth in range(30) if cifar.build(pattern.format(depth), 2) is not None]
    assert built == list(range(smallest, 30, 6))


def test_convolutions_start_with_the_variance_of_he_et_al():
    """Var = 2 / fan-out, which is 64·9; the estimate from n = 32·64·9 weights has the relative error √(2/n)."""
    weight = models.create(SMALL, 10, seed=0).module.state_dict()["layer3.0.conv1.weight"]
    assert float(weight.var() * 64 * 9 / 2) == pytest.approx(1, abs=5 * (2 / weight.numel()) ** 0.5)


@pytest.mark.parametrize("name", [SMALL, "cifar/wrn_16_1", "timm/resnet10t", "timm/test_vit"])
def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    first, again, other = (models.create(name, 10, seed=seed).fingerprint for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other
    assert models.create(name, 10).fingerprint not in (first, other)
    assert not torch.equal(torch.get_rng_state(), before)


def test_timm_networks_bring_their_own_normalisation():
    resnet, vit = models.create("timm/resnet18", 5), models.create("timm/vit_tiny_patch16_224", 5)
    assert (resnet.mean, resnet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (vit.mean, vit.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert resnet.module.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("timm/resnt34", "unknown network timm/resnt34; fix: did you mean timm/resnet34 or "),
        ("timm/qqqqqqqqqqqq", "unknown network timm/qqqqqqqqqqqq; fix: choose from timm.list_models()"),
        ("timm/resnet34.a1_in2k", "cannot create timm/resnet34.a1_in2k; found Invalid pretrained tag"),
        ("timm/hf-hub:timm/resnet34", "unknown network timm/hf-hub:timm/resnet34"),
        ("cifar/wrn_40-2", "fix: did you mean cifar/wrn_40_2 or "),
        ("cifar/resnet21", "unknown network cifar/resnet21; expected resnet{6n+2}, resnet{6n+2}x{k} or wrn_{6n+4}_{k}"),
        ("tim/resnet34", "found family tim, expected cifar/NAME or timm/NAME; fix: did you mean timm?"),
        ("resnet34", "unknown network resnet34; found no family, expected cifar/NAME or timm/NAME"),
        ("", "found no family"),
        ("cifar/resnet8@pretrained", "cifar/resnet8 has no weights of its own"),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_meant(spec, expected):
    assert expected in refused(spec)


def test_timms_own_weights_get_a_new_classifier_only_where_there_is_a_seed(monkeypatch):
    """What timm would download is stood in for by what it creates; its class count is the real one, 1000."""
    create = timm.create_model
    download = Mock(side_effect=lambda name, pretrained, num_classes: create(name, num_classes=num_classes))
    monkeypatch.setattr(timm, "create_model", download)
    message = refused("timm/test_resnet@pretrained")
    assert message.startswith("pretrained weights of timm/test_resnet are for another number of classes; found 1000,")
    assert models.create("timm/test_resnet@pretrained", 10, seed=0).classes == 10
    assert models.create("timm/test_resnet@pretrained", 1000).name == "timm/test_resnet"
    assert download.mock_calls == [call("test_resnet", pretrained=True, num_classes=n) for n in (10, 10, 1000)]


def test_a_download_that_fails_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(timm, "create_model", Mock(side_effect=ConnectionError("no way to the Hub\nand much more")))
    message = refused("timm/resnet18@pretrained", classes=1000)
    assert message.startswith("cannot create timm/resnet18 with pretrained weights; found no way to the Hub; fix: ")


def test_the_fingerprint_is_sha256_of_names_types_shapes_and_bytes():
    """Written out here, because stores hold it: it may never change."""
    first = b'["a", "torch.float32", [2, 1]]' + struct.pack("<2f", 1.5, -2)
    second = b'["b", "torch.int64", []]' + struct.pack("<q", 7)
    state = {"b": torch.tensor(7), "a": torch.tensor([[1.5], [-2.0]])}
    assert models.fingerprint(state) == hashlib.sha256(first + second).hexdigest()


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float64])
shapes = st.lists(st.integers(1, 4), max_size=4)
tensors = st.builds(lambda dtype, shape, high: torch.full(shape, high).to(dtype), dtypes, shapes, st.integers(0, 99))


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), tensors, min_size=1, max_size=4), st.data())
def test_one_bit_changes_the_fingerprint_and_order_does_not(state, data):
    original = models.fingerprint(state)
    assert models.fingerprint({name: state[name] for name in data.draw(st.permutations(list(state)))}) == original
    name = data.draw(st.sampled_from(sorted(state)))
    changed = state[name].clone()
    raw = changed.flatten().view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = raw.view(changed.dtype).reshape(changed.shape)
    assert models.fingerprint(state | {name: changed}) != original


def test_the_fingerprint_tells_names_types_and_shapes_but_not_memory_formats():
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4)
    original = models.fingerprint({"a": tensor})
    assert models.fingerprint({"a": tensor.to(memory_format=torch.channels_last)}) == original
    assert models.fingerprint({"a": nn.Parameter(tensor)}) == original
    assert models.fingerprint({"a": tensor.flatten()[::2]}) == models.fingerprint({"a": tensor.flatten()[::2].clone()})
    for other in ({"b": tensor}, {"a": tensor.view(torch.int32)}, {"a": tensor.reshape(2, 1, 3, 4)}):
        assert models.fingerprint(other) != original


def test_a_size_that_a_network_does_not_take_is_refused():
    network = models.create("timm/vit_tiny_patch16_224", 5)
    models.probe(network, 224)
    with pytest.raises(UserError, match=r"timm/vit_tiny_patch16_224 does not take images of 32 x 32 pixels; found "):
        models.probe(network, 32)
    backbone = models.Network(nn.Conv2d(3, 4, 1), "timm/backbone", 4, None, None, "")
    with pytest.raises(UserError, match=r"is no classifier; found \(1, 4, 8, 8\), expected \(1, 4\)"):
        models.probe(backbone, 8)


@pytest.mark.parametrize("training", [True, False])
def test_probing_changes_neither_weights_nor_statistics_nor_mode(training):
    network = models.create(SMALL, 10, seed=0)
    network.module.train(training)
    models.probe(network, 32)
    assert network.module.training is training
    assert all(module.training is training for module in network.module.modules())
    assert models.fingerprint(network.module.state_dict()) == network.fingerprint


def test_a_network_of_one_size_says_which():
    network = models.create("timm/vit_tiny_patch16_224", 5)
    with pytest.raises(UserError, match=r"expected 224 x 224; fix: .* a policy of base size 224"):
        models.probe(network, 32)


def test_a_network_that_answers_with_nan_is_refused():
    """Its weights are finite; a negative running variance has no square root."""
    network = models.create(SMALL, 5, seed=0)
    network.module.bn1.running_var.fill_(-1.0)
    with pytest.raises(UserError, match="answers a black image with NaN"):
        models.probe(network, 32)


@pytest.mark.parametrize(("name", "size", "least"), [(SMALL, 32, 1), (SMALL, 4, 2), ("timm/test_vit", 160, 1)])
def test_batch_norm_over_one_value_needs_two_views(name, size, least):
    """Two stages halve 4 pixels to one; PyTorch itself is asked."""
    network = models.create(name, 5, seed=0)
    before = torch.get_rng_state()
    assert models.least_views(network, size) == least
    assert torch.equal(torch.get_rng_state(), before)
    assert models.fingerprint(network.module.state_dict()) == network.fingerprint
    if least == 2:
        with pytest.raises(ValueError, match="more than 1 value"):
            network.module.train()(torch.zeros(1, 3, size, size))
    network.module.train()(torch.zeros(least, 3, size, size))
