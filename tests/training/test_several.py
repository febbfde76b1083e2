"""Several teachers on the same views, from a store each."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from support.commands import command, refused
from support.stores import fill, make

import cache
from cache import UserError
from pipeline.cli import _stores
from pipeline.data.index import Index
from pipeline.labels.epochs import Labels
from pipeline.labels.several import Several, require_same_views


@pytest.fixture(scope="module")
def labels(tiny) -> Path:
    return tiny.stores / "store"


@pytest.fixture(scope="module")
def second(tiny) -> Path:
    """What another teacher says of the views of `labels`."""
    return tiny.stores / "second"


def stored(path: Path, view: int = 1) -> Labels:
    plane = (store := cache.open(path)).load_plane(view)
    return Labels(store, plane, torch.device("cpu"), torch.from_numpy(plane.codes))


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
@pytest.mark.parametrize("together", ["probabilities", "logits", "confidence"])
def test_labels_are_the_means_that_they_say(tiny, labels, second, together, weights):
    index, each, T = Index.open(tiny.data), [stored(labels), stored(second)], 3.0
    target = index.records["label"].astype(np.int64)
    found, rows = Several.of(each, target, weights, together, T), index.good[5:30]
    said = np.stack([labels.logits(rows).double().numpy() for labels in each])
    shares = np.array(weights or (1.0, 1.0)) / sum(weights or (1.0, 1.0))
    if together == "logits":
        p = softmax(np.tensordot(shares, said, 1) / T, axis=2)
    else:
        each_share = np.broadcast_to(shares[:, None, None, None], (*said.shape[:3], 1))
        if together == "confidence":  # as the paper has it: exponentials of cross-entropies
            at = target[rows][None, :, None, None] * np.ones((*said.shape[:3], 1), int)
            hard = -np.take_along_axis(log_softmax(said, axis=3), at, 3)
            each_share = each_share * (1 - np.exp(hard) / np.exp(hard).sum(0)) / (len(said) - 1)
            each_share = each_share / each_share.sum(0)
        p = (each_share * softmax(said / T, axis=3)).sum(0)
    np.testing.assert_allclose((found.logits(rows) / T).softmax(2).numpy(), p, rtol=1e-4, atol=1e-7)
    w = shares[0] * each[0].plane.weight + shares[1] * each[1].plane.weight
    np.testing.assert_allclose(found.plane.weight, w, rtol=1e-6)


def test_a_sample_that_one_teacher_skipped_has_no_label(labels, second):
    one, other = stored(labels), stored(second)
    weight = other.plane.weight.copy()
    weight[7] = np.nan
    other = dataclasses.replace(other, plane=dataclasses.replace(other.plane, weight=weight))
    target = np.zeros(len(weight), np.int64)
    assert Several.of([one, other], target, (), "logits", 4.0).known(np.array([6, 7])).tolist() == [True, False]


def test_teachers_that_saw_other_pixels_are_refused(labels, second):
    one, other = stored(labels), stored(second)
    digest = other.plane.digest.copy()
    digest[[3, 9]] ^= 1
    other = dataclasses.replace(other, plane=dataclasses.replace(other.plane, digest=digest))
    with pytest.raises(UserError, match=r"saw different pixels; found 2 of \d+ views, the first at row 3"):
        Several.of([one, other], np.zeros(len(digest), np.int64), (), "logits", 4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, r"other is not of the same views: the store has another seed; found 3, expected 1844"),
        ({"policy": {"name": "q"}}, r"other is not of the same views: the store has another policy\.name; found q"),
        ({"views": 1}, r"a store has too few views; found 1 in .*other, expected 2; fix: run precompute"),
        ({"class_list": {"count": 5, "rule": "file", "names": list("abced")}}, "found other names or order of classes"),
        ({}, r"has missing blocks; found 6 missing"),
    ],
)  # fmt: skip
def test_a_teacher_without_its_own_views_is_refused_by_name(tmp_path, changes, message):
    listed = {"class_list": {"count": 5, "rule": "file", "names": list("abcde")}}
    first = fill(make(tmp_path / "first", **listed))
    other = make(tmp_path / "other", teacher_weights="w2", **(listed | changes))
    with pytest.raises(UserError, match=message):
        require_same_views(first, [other], 2)
    require_same_views(first, [fill(make(tmp_path / "third", teacher_weights="w2"))], 2)
    with pytest.raises(UserError, match=r"a store is given twice; found .*first"):
        require_same_views(first, [first], 2)


def arguments(tiny, out, *more) -> list:
    shape = ["--student", "cifar/resnet8", "--batch-size", 8, "--epochs", 1, "--device", "cpu"]
    return ["train-student", "--data", tiny.data, "--out", out, *shape, "--lr", 0.01, *more]


@pytest.mark.parametrize("loss", ["kd", "ida"])
def test_a_student_learns_from_both(tiny, labels, second, tmp_path, capsys, loss):
    stores = ["--store", labels, f"--store={second}", "--store-weights", 2, 1, "--together", "confidence"]
    assert command(capsys, *arguments(tiny, tmp_path / "run", *stores, "--loss", loss))[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["store"], config["more_stores"]) == (str(labels), [str(second)])
    assert len(json.loads((tmp_path / "run" / "sources.json").read_text())["others"]) == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teacher"] == "cifar/resnet8, cifar/resnet8"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--store-weights", 1], "--store-weights needs one of each store; found 1 for 2 stores"),
        (["--store-weights", 1, 0], "--store-weights out of range; found 0"),
        (["--loss", "energy"], "--loss energy, which needs energies, takes one store; found 2"),
        (["--live-teacher", "cifar/resnet8@x"], "--live-teacher takes one store; found 2"),
    ],
)
def test_options_that_do_not_go_with_several_stores(tiny, labels, second, tmp_path, capsys, more, message):
    assert message in refused(capsys, *arguments(tiny, tmp_path / "run", "--store", labels, "--store", second, *more))
    assert not (tmp_path / "run").exists()


def test_of_a_store_given_twice_none_is_lost():
    assert _stores(["--lr", "1", "--store", "a"]) == ["--lr", "1", "--store", "a"]
    found = _stores(["--store", "a", "--lr", "1", "--store=b", "--store", "c"])
    assert found == ["--lr", "1", "--store", "a", "--more-stores", "b", "c"]
    with pytest.raises(UserError, match="--store is given twice, and --more-stores too"):
        _stores(["--store", "a", "--store", "b", "--more-stores", "c"])
