"""No step that cannot work: a run trains rightly, or is refused before its first step and leaves nothing behind."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import command, refused
from support.images import jpeg
from support.tars import tar_of

from pipeline.data import order, prepare
from pipeline.training import loop

TINY = "name: tiny\nprobability: 0.5\nops: cifar10\nbase: {size: 4}\n"  # which cifar/resnet8 shrinks to one pixel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A policy of 4 pixels; name -> a data set of so many images and classes."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "policy.yaml").write_text(TINY)
    for name, images, classes in (("five", 5, 2), ("alone", 1, 1)):
        members = {}
        for number in range(images):
            members[f"{number}.jpg"] = jpeg(np.random.default_rng(number), 8, 8)
            members[f"{number}.cls"] = str(number % classes).encode()
        tar_of(folder / f"{name}.tar", members)
        prepare.build(f"webdataset:{folder}/{name}.tar", folder / name, classes=classes)
    return folder


def teacher(tiny, data: str, out, *more) -> list:
    policy = ["--policy", tiny / "policy.yaml", "--epochs", 1, "--lr", 0.01, "--device", "cpu"]
    return ["train-teacher", "--data", tiny / data, "--teacher", "cifar/resnet8", "--out", out, *policy, *more]


def student(tiny, data: str, out, *more) -> list:
    policy = ["--policy", tiny / "policy.yaml", "--epochs", 1, "--lr", 0.01, "--device", "cpu"]
    return ["train-student", "--data", tiny / data, "--student", "cifar/resnet8", "--out", out, *policy, *more]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.integers(1, 6), st.integers(0, 9))
def test_a_rest_that_is_too_small_joins_the_batch_before(samples, batch, world, least, seed):
    """Every sample once, no step below the least if there is more than one, and no step more than that longer."""
    rows, batch = np.arange(samples), max(batch, world, least)
    ranks = [list(order.steps(seed, rows, batch, 2, rank=rank, world=world, least=least)) for rank in range(world)]
    steps = [np.concatenate([part for _, part in parts]) for parts in zip(*ranks, strict=True)]
    count = order.steps_per_epoch(samples, batch, least)
    assert len(steps) == 2 * count
    for epoch in (steps[:count], steps[count:]):
        assert sorted(np.concatenate(epoch)) == list(rows)
        assert [len(step) for step in epoch[:-1]] == [batch] * (count - 1)
        assert count == 1 or least <= len(epoch[-1]) < batch + least
    (plain,) = [list(order.steps(seed, rows, batch, 2, least=1))]
    assert least > 1 or all(np.array_equal(a, b) for (_, a), b in zip(plain, steps, strict=True))


@pytest.mark.parametrize("options", [["--batch-size", 4], ["--batch-size", 4, "--accumulate", 4]])
def test_a_single_view_is_left_to_no_step(tiny, tmp_path, capsys, options):
    assert command(capsys, *teacher(tiny, "five", tmp_path / "out", "--no-jda", *options))[0] == 0
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["steps"] == 1  # 4 and 1 are 5


@pytest.mark.parametrize("fraction", [0, 0.1, 1])
def test_a_share_that_leaves_one_view_of_a_sample_trains(tiny, tmp_path, capsys, fraction):
    options = ["--loss", "ce", "--batch-size", 4, "--augmented-fraction", fraction, "--accumulate", 2]
    assert command(capsys, *student(tiny, "five", tmp_path / "out", *options))[0] == 0


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            "five",
            ["--no-jda", "--batch-size", 1],
            "--batch-size is too small for the BatchNorm of cifar/resnet8",
        ),
        ("alone", ["--no-jda"], "the data set is too small for the BatchNorm of cifar/resnet8"),
    ],
)
def test_a_step_of_one_view_is_refused_before_the_first(tiny, tmp_path, capsys, data, options, message):
    assert message in refused(capsys, *teacher(tiny, data, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_a_pair_of_views_of_one_image_is_enough(tiny, tmp_path, capsys):
    assert command(capsys, *teacher(tiny, "alone", tmp_path / "out"))[0] == 0


def test_dkd_needs_two_classes(tiny, tmp_path, capsys):
    arguments = student(tiny, "alone", tmp_path / "out", "--loss", "dkd", "--live-teacher", "cifar/resnet8@x")
    assert "--loss dkd needs two classes; found 1" in refused(capsys, *arguments)


@pytest.mark.parametrize("codec", ["auto", "fp16"])
def test_one_image_can_be_labelled_and_learned_from(tiny, tmp_path, capsys, codec):
    assert command(capsys, *teacher(tiny, "alone", tmp_path / "t"))[0] == 0
    weights, store = f"cifar/resnet8@{tmp_path / 't' / 'model.safetensors'}", tmp_path / "s.zarr"
    common = ["--data", tiny / "alone", "--store", store]
    assert command(
        capsys, "precompute-teacher", *common, "--teacher", weights, "--views", 1, "--codec", codec,
        "--policy", tiny / "policy.yaml",
    )[0] == 0  # fmt: skip
    assert command(capsys, *student(tiny, "alone", tmp_path / "out", "--store", store))[0] == 0


def test_a_run_that_diverged_says_what_there_is_to_go_on_with(tiny, tmp_path, capsys, monkeypatch):
    """Before the first checkpoint, and after one, from which another run then starts."""
    often = ["--batch-size", 2, "--checkpoint-steps", 1]
    monkeypatch.setattr(loop, "sound", lambda module: False)
    said = refused(capsys, *teacher(tiny, "five", tmp_path / "a", *often))
    assert "training diverged" in said and "start anew in another --out" in said and "nothing was saved yet" in said
    monkeypatch.setattr(loop, "sound", Mock(side_effect=[True, False]))
    said = refused(capsys, *teacher(tiny, "five", tmp_path / "b", *often))
    assert f"NAME@{tmp_path}/b/checkpoint.pt starts from its last checkpoint" in said
    monkeypatch.undo()
    start = f"cifar/resnet8@{tmp_path}/b/checkpoint.pt"
    assert command(capsys, *teacher(tiny, "five", tmp_path / "c", "--teacher", start))[0] == 0
