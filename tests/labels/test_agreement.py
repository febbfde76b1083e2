"""A network that answers in another order of classes is noticed before it works for hours."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.commands import command, refused

from pipeline.data import prepare
from pipeline.labels.agreement import Agreement, agreement
from pipeline.networks import models

POLICY = "name: tiny\nprobability: 0.2\nops: imagenet\nbase: {size: 32, scale: [0.25, 1.0]}\n"


@given(st.integers(2, 1000), st.integers(16, 8192))
def test_guessing_is_warned_of_and_certainty_is_not(classes, samples):
    """The line lies between: three standard errors of a guess, at least a twentieth of the way."""
    error = (1 / classes * (1 - 1 / classes) / samples) ** 0.5
    for share, said in ((0.0, True), (1 / classes, True), (1 / classes + 2.9 * error, True), (1.0, False)):
        assert warned(Agreement(share, samples, classes)) == (said and share < 1), (share, said)
    assert not warned(Agreement(1.0, 1, 1))


def warned(found: Agreement) -> bool:
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as said:
        found.warn("it")
    return bool(said.getvalue())


def test_agreement_is_the_share_of_labels_that_have_the_largest_logit():
    logits = np.array([[1.0, 2], [3, 1], [0, 5], [2, 1]])
    assert agreement(logits, np.array([1, 0, 0, 0])) == Agreement(0.75, 4, 2)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Classes 1, 2 and 10, numbered 1, 10, 2, of plain red, green and blue; and two teachers that see the colour."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "policy.yaml").write_text(POLICY)
    for channel, name in enumerate(("1", "2", "10")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 80, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    prepare.build(f"imagefolder:{folder}/images", folder / "data", threads=1)
    for name, channels in (("right", (0, 2, 1)), ("natural", (0, 1, 2))):
        network = models.create("cifar/resnet8", 3, seed=0)
        models.save_weights(seeing(network.module, channels), folder / f"{name}.safetensors")
    return folder


def seeing(module: torch.nn.Module, channels: tuple[int, ...]) -> torch.nn.Module:
    """A resnet8 whose class k is the brightness of the channel `channels[k]`: shortcuts alone, to a sum."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.fill_(name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1))
            if name == "conv1.weight" or "downsample.0" in name:
                middle = tensor.shape[2] // 2
                for channel in range(3):
                    tensor[channel, channel, middle, middle] = 1
            if name == "fc.weight":
                for row, channel in enumerate(channels):
                    tensor[row, channel] = 5
    return module


def test_a_store_is_refused_for_other_classes_and_a_map_is_the_way_round(colours, tmp_path, capsys):
    """The same samples, numbered otherwise and under other names: only the names can tell."""
    store, policy = tmp_path / "store", ("--policy", colours / "policy.yaml")
    model = f"cifar/resnet8@{colours}/right.safetensors"
    made = ("--teacher", model, "--store", store, "--views", 1, "--codec", "fp16")
    assert command(capsys, "precompute-teacher", "--data", colours / "data", *made, *policy)[0] == 0
    other = shutil.copytree(colours / "data", tmp_path / "data")
    about = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(about | {"class_names": ["red", "blue", "green"]}))
    job = ("train-student", "--store", store, "--student", "cifar/resnet8", "--out", tmp_path / "run", "--dry-run")
    line = refused(capsys, *job, "--data", other)
    assert "--data has other classes than the store; found 'red' as class 0, expected '1'" in line
    assert "--class-map" in line
    assert "found 'red'" in refused(capsys, "precompute-teacher", "--data", other, *made, *policy)
    (tmp_path / "map.yaml").write_text("red: 1\nblue: 10\ngreen: 2\n")
    assert command(capsys, *job, "--data", other, "--class-map", tmp_path / "map.yaml", "--epochs", 1)[0] == 0


@pytest.mark.parametrize(("weights", "right"), [("right", True), ("natural", False)])
def test_commands_say_how_often_a_network_is_right_and_warn_of_guessing(colours, tmp_path, capsys, weights, right):
    model, policy = f"cifar/resnet8@{colours / weights}.safetensors", ("--policy", colours / "policy.yaml")
    share = "100.0 %" if right else "33.3 %"
    data = ("--data", colours / "data")
    _, out, err = command(capsys, "evaluate", *data, "--model", model, *policy)
    assert ("100.00 %" if right else "33.33 %") in out and ("warning: " in err) != right
    store = ("--teacher", model, "--store", tmp_path / "s", "--views", 1, "--codec", "fp16")
    code, out, err = command(capsys, "precompute-teacher", *data, *store, *policy, "--dry-run")
    assert code == 0 and f"{share} of 24 samples" in out and ("warning: " in err) != right
    assert "--class-order" in err or right
    live = ("--live-teacher", model, "--student", "cifar/resnet8", "--out", tmp_path / "run", "--dry-run")
    code, out, err = command(capsys, "train-student", *data, *live, *policy, "--epochs", 1, "--batch-size", 8)
    assert code == 0 and f"{share} of 24 samples" in out and ("warning: " in err) != right
