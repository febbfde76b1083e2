"""Weights of usual files load whole, whatever wrapped them; all else is refused in one line, and nothing is run."""

import argparse
import json
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.networks import SMALL, assert_same, refused, shuffled_statistics
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cache import UserError
from pipeline.data.classes import Classes
from pipeline.networks import models, weights
from pipeline.networks.placed import placed
from pipeline.views import policy as policies


@pytest.fixture(scope="module")
def module() -> nn.Module:
    module = models.create(SMALL, 10, seed=0).module
    shuffled_statistics(module)
    return module


@pytest.fixture(scope="module")
def state(module) -> dict[str, torch.Tensor]:
    return module.state_dict()


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


# What wraps a network is PyTorch's own, where it has such a thing.
LAYOUTS = {
    "bare": lambda module: module.state_dict(),
    "model": lambda module: {"model": module.state_dict(), "epoch": 3, "best_acc": torch.tensor(0.7)},
    "state_dict": lambda module: {"state_dict": module.state_dict()},
    "tutorial": lambda module: {"model_state_dict": module.state_dict(), "optimizer_state_dict": {}, "loss": 0.3},
    "net": lambda module: {"net": module.state_dict(), "acc": 93.0},
    "parallel": lambda module: nn.DataParallel(module).state_dict(),
    "compiled": lambda module: torch.compile(module).state_dict(),
    "compiled in parallel": lambda module: nn.DataParallel(torch.compile(module)).state_dict(),
    "parallel in compiled": lambda module: torch.compile(nn.DataParallel(module)).state_dict(),
    "averaged": lambda module: AveragedModel(module, use_buffers=True).state_dict(),
    "average alone": lambda module: {"state_dict_ema": module.state_dict(), "state_dict": None},
    "an attribute": lambda module: {"state_dict": prefixed("student.backbone.", module.state_dict())},
    "options beside": lambda module: {"state_dict": module.state_dict(), "args": argparse.Namespace(a=(3, 4))},
    "numpy beside": lambda module: {"state_dict": module.state_dict(), "metric": np.float64(75.3), "n": np.int32(3)},
    "a name beside": lambda module: {"model": "resnet8", "state_dict": module.state_dict()},
    "a number among": lambda module: {**module.state_dict(), "accuracy": 0.93},
    "thop": lambda module: module.state_dict() | {"total_ops": torch.ones(1), "bn1.total_params": torch.ones(1)},
    "before 2018": lambda module: {k: v for k, v in module.state_dict().items() if "num_batches" not in k},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_out_of_every_usual_wrapping(tmp_path, module, layout):
    state = module.state_dict()
    path = tmp_path / "w.pth"
    torch.save(LAYOUTS[layout](module), path)
    if layout == "before 2018":
        state = {name: torch.tensor(0) if "num_batches" in name else tensor for name, tensor in state.items()}
    assert_same(models.create(f"{SMALL}@{path}", 10), state)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "_fsdp_wrapped_module."]), max_size=4))
def test_prefixes_come_off_in_any_order(prefixes):
    network = {"conv.weight": torch.zeros(2, 1), "conv.bias": torch.zeros(2)}
    theirs = weights.Weights(Path("w"), prefixed("".join(prefixes), network), {})
    assert weights.fit(theirs, network, "n", Classes(2), (), start=False).state.keys() == network.keys()


def test_a_wrapper_within_a_name_comes_off(tmp_path, state):
    """As torch.compile leaves it on a part of a network."""
    torch.save({name.replace("layer2.", "layer2._orig_mod."): tensor for name, tensor in state.items()}, tmp_path / "w")
    assert_same(models.create(f"{SMALL}@{tmp_path}/w", 10), state)


def test_two_networks_in_a_file_are_refused(tmp_path, state):
    torch.save(prefixed("teacher.", state) | prefixed("student.", state), tmp_path / "w.pth")
    assert "unexpected: 'teacher." in refused(f"{SMALL}@{tmp_path}/w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.pth.tar", "w.ckpt", "w.bin", "w", "w.safetensors", "a#b.pth", "a@b.pt"])
@pytest.mark.parametrize("saved", ["zip", "legacy", "protocol 3", "safetensors"])
def test_the_content_decides_and_not_the_name(tmp_path, module, state, name, saved):
    path = tmp_path / name
    if saved == "safetensors":
        models.save_weights(module, path)
    else:
        options = {"pickle_protocol": 3 if saved == "protocol 3" else 2}
        torch.save(state, path, _use_new_zipfile_serialization=saved != "legacy", **options)
    assert_same(models.create(f"{SMALL}@{path}", 10), state)


def test_the_average_goes_before_the_raw_weights_and_either_can_be_named(tmp_path, state, capsys):
    """As in timm, which saves both; torchvision's script calls them otherwise."""
    raw = {name: tensor + 1 for name, tensor in state.items()}
    path = tmp_path / "w.pth"
    for keys in (("state_dict_ema", "state_dict"), ("model_ema", "model"), ("state_dict", "model")):
        torch.save(dict(zip(keys, (state, raw), strict=True)), path)
        assert_same(models.create(f"{SMALL}@{path}", 10), state)
        assert f"took {keys[0]}" in (said := capsys.readouterr().err) and f"w.pth#{keys[1]} takes {keys[1]}" in said
        assert_same(models.create(f"{SMALL}@{path}#{keys[1]}", 10), raw)
    torch.save({"state_dict_ema": state, "state_dict": raw}, path)
    assert_same(models.create(f"{SMALL}@{path}#ema", 10), state)
    assert_same(models.create(f"{SMALL}@{path}#raw", 10), raw)
    assert "no weights teacher in" in refused(f"{SMALL}@{path}#teacher")
    torch.save({"state_dict": raw}, path)
    assert "no weights ema in" in refused(f"{SMALL}@{path}#ema")


def test_what_was_dropped_or_filled_is_said(tmp_path, state, capsys):
    old = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    torch.save({"epoch": 3, **old, "total_ops": torch.zeros(1)}, tmp_path / "w.pth")
    models.create(f"{SMALL}@{tmp_path}/w.pth", 10)
    said = capsys.readouterr().err
    assert "left out 'epoch', no tensors" in said and "left out the counters 'total_ops'" in said
    assert "filled 9 absent num_batches_tracked" in said and said.count("\n") == 3


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300]), st.booleans())
def test_a_tensor_that_is_not_finite_is_refused_by_its_name(tmp_path_factory, state, data, value, start):
    """1e300 is finite where it is saved, and is not in the network's float32."""
    path = tmp_path_factory.getbasetemp() / "infinite.pth"
    name = data.draw(st.sampled_from([name for name, tensor in state.items() if tensor.is_floating_point()]))
    bad = state[name].double().clone()
    bad.view(-1)[data.draw(st.integers(0, bad.numel() - 1))] = value
    torch.save(state | {name: bad}, path)
    message = refused(f"{SMALL}@{path}", seed=0 if start else None)
    assert f"weights {path} are not finite; found 1 of {bad.numel():,} values of {name!r}" in message


def test_a_head_of_other_classes_is_refused_for_a_teacher_and_new_for_a_start(tmp_path, module, state, capsys):
    path = tmp_path / "w.safetensors"
    models.save_weights(module, path)
    assert "are for another number of classes; found 10, expected 7" in refused(f"{SMALL}@{path}", 7)
    network = models.create(f"{SMALL}@{path}", 7, seed=5)
    assert "a new classifier for 7 classes, as theirs is for 10" in capsys.readouterr().err
    fresh = models.create(SMALL, 7, seed=5).module.state_dict()
    assert_same(network, state | {name: fresh[name] for name in ("fc.weight", "fc.bias")})


def test_weights_keep_their_classes_mean_and_std(tmp_path, capsys):
    path, pets = tmp_path / "w.safetensors", Classes(2, ("cat", "d\u00e9"), "lexical")
    policy = policies.POLICIES["cifar10"]
    network = models.create(SMALL, pets, seed=0)
    placed(network, torch.device("cpu"), "fp32", policy).save(path)
    loaded = models.create(f"{SMALL}@{path}", 2)
    assert (loaded.class_list, loaded.mean, loaded.std) == (pets, policy.mean, policy.std)
    assert models.create(f"{SMALL}@{path}", Classes(2, ("cat", "de\u0301"))).classes == 2  # the same, decomposed
    strangers = Classes(2, ("cat", "bee"))
    assert "found 'd\u00e9' as class 1, expected 'bee'" in refused(f"{SMALL}@{path}", strangers)
    start = models.create(f"{SMALL}@{path}", strangers, seed=1).module.state_dict()
    assert "a new classifier for 2 classes" in capsys.readouterr().err
    assert torch.equal(start["fc.weight"], models.create(SMALL, 2, seed=1).module.state_dict()["fc.weight"])
    assert torch.equal(start["conv1.weight"], network.module.state_dict()["conv1.weight"])


@pytest.mark.parametrize(
    "about", [{"mean": "[1, 2]"}, {"std": "[1, 2, NaN]"}, {"mean": "5"}, {"mean": "{}"}, {"classes": "[" * 9999}]
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, module, about):
    models.save_weights(module, tmp_path / "w.safetensors")
    weights.save(module, tmp_path / "w.safetensors", about)
    refused(f"{SMALL}@{tmp_path}/w.safetensors")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found an empty file"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "found an HTML page"),
        (b"\n <html>", "found an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git lfs pull"),
        (b'{"weight_map": {}}', "found JSON text"),
        (b"\x89HDF\r\n\x1a\n", "found an HDF5 file"),
        (b"\x1f\x8b\x08", "found a compressed file"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_holds_no_weights_is_called_what_it_is(tmp_path, content, found, name):
    (tmp_path / name).write_bytes(content)
    message = refused(f"{SMALL}@{tmp_path}/{name}")
    assert message.startswith(f"no weights in {tmp_path}/{name}; ") and found in message


def test_a_torchscript_program_is_called_what_it_is(tmp_path):
    with warnings.catch_warnings(action="ignore"):  # newer releases advise against it
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    assert "found a TorchScript program" in refused(f"{SMALL}@{tmp_path}/w.pt")


def test_a_place_without_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.pth").mkdir()
    os.mkfifo("pipe")
    places = {"nowhere.pth": "No such file or directory", "folder.pth": "a folder", "pipe": "no regular file"}
    for name, found in places.items():
        assert refused(f"{SMALL}@{name}") == f"cannot read weights {name}; found {found}; fix: check the path"
    assert "fix: did you mean pretrained?" in refused(f"{SMALL}@pretraned")
    assert "no weights behind the @; expected NAME@FILE" in refused(f"{SMALL}@")
    for text in ("a\0b", "x" * 5000, "#", "#ema"):
        refused(f"{SMALL}@{text}")


@pytest.mark.parametrize("beside", [Path("x"), range(3), np.array(["a"]), np.datetime64("2026-01-01")])
def test_other_types_beside_the_weights_are_not_admitted(tmp_path, state, beside):
    """Of what is beside tensors, options and numbers are; an array would need NumPy's own unpickling."""
    torch.save({"state_dict": state, "beside": beside}, tmp_path / "w.pth")
    assert "hold more than tensors, which was not run" in refused(f"{SMALL}@{tmp_path}/w.pth")


@pytest.mark.parametrize("name", [SMALL, "timm/test_resnet"])
def test_saved_weights_come_back_bit_for_bit_whatever_their_memory_format(tmp_path, name):
    network = models.create(name, 10)
    state = shuffled_statistics(network.module.to(memory_format=torch.channels_last))
    models.save_weights(network.module, tmp_path / "w.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert_same(models.create(f"{name}@{tmp_path}/w.safetensors", 10), state)


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
    if layout == "protocol 4":
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
        expected = (
            f"damaged weights {path}; found {length:,} bytes that do not parse" if length else "found an empty file"
        )
        assert expected in refused(f"{SMALL}@{path}")


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    for content, found in (
        ([1], "list"),
        ({}, "a dict of nothing"),
        ({"other": {"a": torch.zeros(1)}, "epoch": 3}, "a dict of 'other', 'epoch'"),
        ({"model": {"a": 1}}, "a dict of 'model'"),
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
    for strange in (torch.zeros(10, device="meta"), torch.zeros(10).to_sparse(), torch.zeros(10, dtype=torch.cfloat)):
        assert "found of another type: 'fc.bias' torch." in stored(state | {"fc.bias": strange})
    assert "found of another type: 'fc.bias' torch.int8;" in stored(
        state | {"fc.bias": torch.zeros(10, dtype=torch.int8)}
    )
    wider = stored(models.create("cifar/resnet8x4", 10).module.state_dict())
    assert f"weights {path} are not those of {SMALL}" in wider
    first = "'conv1.weight' [32, 3, 3, 3] for [16, 3, 3, 3], 'bn1.weight' [32] for [16], 'bn1.bias' [32] for [16]"
    assert f"of another shape: {first} and 43 more;" in wider


# --- what no one wrote on purpose


def mutated(whole: bytes, data) -> bytes:
    """Some bytes changed, a piece cut out, repeated, or put elsewhere."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)) | st.integers(0, min(len(content), 200)))
        length = data.draw(st.integers(0, 64))
        piece = data.draw(st.binary(max_size=16) | st.just(bytes(content[:length])))
        content[at : at + data.draw(st.sampled_from([0, 1, len(piece), length]))] = piece
    return bytes(content)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> list[bytes]:
    """Small files of every format, of a network with few names."""
    folder = tmp_path_factory.mktemp("wholes")
    module = tiny()
    state = module.state_dict()
    torch.save(state, folder / "zip")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    content = {"state_dict": state, "args": argparse.Namespace(a=1), "metric": np.float64(3), "state_dict_ema": state}
    torch.save(content, folder / "timm")
    torch.save(content, folder / "timm legacy", _use_new_zipfile_serialization=False)
    weights.save(module, folder / "safetensors", {"mean": "[0, 0, 0]", "classes": json.dumps(Classes(2).to_json())})
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))


def loads_or_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    module = tiny()
    try:
        found = weights.read(str(path))
        weights.load(
            module, weights.fit(found, module.state_dict(), "n", Classes(2), ("1.",), start=len(content) % 2 == 0)
        )
        weights.numbers(found, "mean")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


@pytest.mark.parametrize("examples", [60, pytest.param(50_000, marks=pytest.mark.slow)])
def test_damaged_files_load_whole_or_are_refused(tmp_path, wholes, examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.data())
    def check(data):
        noise = data.draw(st.binary()) if data.draw(st.integers(0, 9)) == 0 else None
        loads_or_is_refused(tmp_path / "noise", noise or mutated(data.draw(st.sampled_from(wholes)), data))

    check()
