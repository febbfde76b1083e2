"""Networks are the literature's, weights fit or are refused, files are never trusted."""

import hashlib
import os
import pickle
import re
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from cache import UserError
from pipeline.networks import cifar, models

SMALL = "cifar/resnet8"

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


def shuffled_statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Give every batch norm statistics and an affine map that are not the identity; returns the state dict."""
    generator = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias.data, layer.running_var, layer.weight.data):
                tensor += torch.rand(tensor.shape, generator=generator) / 4
    return module.state_dict()


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
    for size in (32, 64):
        assert network.module(torch.randn(2, 3, size, size)).shape == (2, 100)
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


def refused(spec: object, classes: int = 10) -> str:
    with pytest.raises(UserError) as caught:
        models.create(str(spec), classes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("layout", ["bare", "model", "state_dict", "module.", "protocol 3"])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_weights_survive_torch_save_in_every_usual_layout(tmp_path, layout, suffix):
    network = models.create(SMALL, 10)
    state = shuffled_statistics(network.module)
    stored = {
        "bare": state,
        "model": {"model": state, "epoch": 3, "best_acc": torch.tensor(0.7)},
        "state_dict": {"state_dict": state},
        "module.": {f"module.{name}": tensor for name, tensor in state.items()},
        "protocol 3": state,
    }[layout]
    torch.save(stored, tmp_path / f"w{suffix}", pickle_protocol=3 if layout == "protocol 3" else 2)
    assert_same(models.create(f"{SMALL}@{tmp_path}/w{suffix}", 10), state)


@pytest.mark.parametrize("name", [SMALL, "timm/test_resnet"])
def test_saved_weights_come_back_bit_for_bit_whatever_their_memory_format(tmp_path, name):
    network = models.create(name, 10)
    state = shuffled_statistics(network.module.to(memory_format=torch.channels_last))
    models.save_weights(network.module, tmp_path / "w.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert_same(models.create(f"{name}@{tmp_path}/w.safetensors", 10), state)


def assert_same(network: models.Network, state: dict[str, torch.Tensor]) -> None:
    loaded = network.module.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert network.fingerprint == models.fingerprint(state)


def test_weights_that_share_memory_are_saved_each(tmp_path):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    models.save_weights(nn.Sequential(first, second), tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    assert torch.equal(loaded["0.weight"], first.weight) and torch.equal(loaded["1.weight"], first.weight)


def test_a_save_that_is_cut_off_leaves_the_old_weights(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    models.save_weights(models.create(SMALL, 10, seed=1).module, path)
    old = path.read_bytes()

    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.save_weights(models.create(SMALL, 10, seed=2).module, path)
    assert path.read_bytes() == old


@dataclass
class Payload:
    """Unpickling it creates a folder."""

    marker: Path

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "nested", "plain pickle", "protocol 4", "safetensors"])
def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path, layout):
    marker, path = tmp_path / "ran", tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth")
    payload = Payload(marker)
    if layout in ("plain pickle", "protocol 4", "safetensors"):
        path.write_bytes(pickle.dumps({"fc.weight": payload}, protocol=4 if layout == "protocol 4" else 2))
        pickle.loads(path.read_bytes())
    else:
        content = {"model": {"fc.weight": payload}} if layout == "nested" else payload
        torch.save(content, path, _use_new_zipfile_serialization=layout != "legacy")
        torch.load(path, weights_only=False)
    marker.rmdir()  # which the payload did create, when it was let
    message = refused(f"{SMALL}@{path}")
    assert not marker.exists()
    if layout in ("protocol 4", "safetensors"):
        assert f"damaged weights {path}" in message
    else:
        assert "hold more than tensors, which was not run; found posix.mkdir, expected a state dict" in message


@pytest.mark.parametrize("kind", ["w.safetensors", "w.pth", "legacy.pth"])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    module, path = models.create(SMALL, 10).module, tmp_path / kind
    if kind == "w.safetensors":
        models.save_weights(module, path)
    else:
        torch.save(module.state_dict(), path, _use_new_zipfile_serialization=kind != "legacy.pth")
    whole = path.read_bytes()
    cuts = {0, 1, 8, 9, 100, 1000, *range(0, len(whole), len(whole) // 20 + 1), len(whole) - 1}
    for length in sorted(cuts):
        path.write_bytes(whole[:length])
        assert f"damaged weights {path}; found {length:,} bytes that do not parse" in refused(f"{SMALL}@{path}")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".safetensors", ".pt", ".pth"]))
def test_bytes_of_any_kind_are_refused(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"noise{suffix}"
    path.write_bytes(data)
    refused(f"{SMALL}@{path}")


def test_weights_of_another_kind_or_place_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.pth").mkdir()
    assert "cannot read weights nowhere.pth; found No such file or directory" in refused(f"{SMALL}@nowhere.pth")
    assert "cannot read weights folder.pth; found Is a directory" in refused(f"{SMALL}@folder.pth")
    for kind in ("pretraned", "w.bin", ""):
        assert "expected pretrained, or a .safetensors, .pt or .pth file" in refused(f"{SMALL}@{kind}")


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    for content, found in (
        ([1], "list"),
        ({}, "a dict of nothing"),
        ({"net": {"a": torch.zeros(1)}, "epoch": 3}, "a dict of 'net', 'epoch'"),
        ({"model": {"a": 1}}, "a dict of 'a'"),
    ):
        torch.save(content, path)
        assert f"no state dict in weights {path}; found {found}, expected" in refused(f"{SMALL}@{path}")


@pytest.mark.parametrize("name", [SMALL, "cifar/wrn_16_1", "timm/test_vit", "timm/test_resnet"])
def test_another_number_of_classes_is_named_as_such(tmp_path, name):
    models.save_weights(models.create(name, 7).module, tmp_path / "w.safetensors")
    message = refused(f"{name}@{tmp_path}/w.safetensors", classes=10)
    assert "are for another number of classes; found 7, expected 10" in message


def test_weights_of_another_network_name_what_differs(tmp_path):
    path, state = tmp_path / "w.pth", models.create(SMALL, 10).module.state_dict()

    def stored(content: dict) -> str:
        torch.save(content, path)
        return refused(f"{SMALL}@{path}")

    assert "found missing: 'bn1.bias';" in stored({name: t for name, t in state.items() if name != "bn1.bias"})
    assert "found unexpected: 'extra';" in stored(state | {"extra": torch.zeros(1)})
    assert "found of another shape: 'bn1.bias' [3] for [16];" in stored(state | {"bn1.bias": torch.zeros(3)})
    assert "found of another shape: 'fc.bias' [] for [10];" in stored(state | {"fc.bias": torch.tensor(0.0)})
    assert "tensors that cannot be copied" in stored(state | {"fc.bias": torch.zeros(10, device="meta")})
    wider = stored(models.create("cifar/resnet8x4", 10).module.state_dict())
    assert f"weights {path} are not those of {SMALL}" in wider
    first = "'conv1.weight' [32, 3, 3, 3] for [16, 3, 3, 3], 'bn1.weight' [32] for [16], 'bn1.bias' [32] for [16]"
    assert f"of another shape: {first} and 43 more;" in wider


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
