"""The transfer comparison teaches what it should, resumes, and tells a good label from a bad one."""

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.labels import codec_transfer, peers, problems, simulated
from bench.labels.arms import ARMS, arms
from bench.labels.codec_transfer import Labels
from bench.labels.problems import Problem
from cache import UserError, philox
from pipeline.config import Bench

SMALL = Bench(suite="codec-transfer", samples=1024, steps=30, seeds=2, threads=1)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problems.simulation(700, held_out=64, views=3)


def test_the_simulated_teacher_is_the_published_one():
    """Its statistics are those of the logits that came with the head: accuracy 98 % and 93 %, top-10 mass at T = 4
    around 0.1 and 0.2; a draw is a function of its seed."""
    teacher = simulated.teacher()
    features, logits, labels = simulated.draw(teacher, 1000, views=2, seed=7)
    assert [view.shape for view in features] == [(1000, 2, 512)] * 2 and features[0].min() == 0
    assert not torch.equal(features[0], features[1])
    correct = (logits[1].argmax(-1) == labels[:, None]).float().mean(0)
    # 5 standard errors of a share of 1,000.
    assert correct[0] == pytest.approx(0.983, abs=0.021) and correct[1] == pytest.approx(0.934, abs=0.04)
    mass = torch.softmax(logits[0] / 4, -1).topk(10).values.sum(-1).mean(0)
    assert 0.05 < mass[1] < mass[0] < 0.25
    again = simulated.draw(teacher, 1000, views=2, seed=7)
    assert torch.equal(again[1][1], logits[1]) and torch.equal(again[2], labels)


def test_labels_are_decoded_views(problem):
    """Every view and seed with keys of its own; batches in any order; the exact arm passes logits through."""
    labels = Labels(problem, lambda logits: peers.Sampled(logits.shape[2], 50))
    codec = peers.Sampled(1000, 50)
    index, seen = np.array([600, 3, 77]), []
    for view, seed in ((2, 0), (0, 0), (0, 1), (2, 0)):
        logits, dither_keys = problem.logits[view].numpy(), philox.dither_keys(seed, problem.dither_keys[view], view)
        expected = codec.decode(codec.encode(logits, dither_keys)[index], dither_keys[index])
        np.testing.assert_array_equal(labels.logits(view, index, seed).numpy(), expected)
        seen.append(expected)
    assert (seen[1] != seen[2]).any() and (seen[0] == seen[3]).all()
    assert len(np.unique(np.concatenate(problem.dither_keys))) == 3 * 700
    exact = Labels(problem, ARMS["exact"])
    assert torch.equal(exact.logits(1, index, 0), problem.logits[1][torch.from_numpy(index)])


def test_sizes_are_bytes_per_vector(problem):
    whole = {"row_bytes": 4000.0, "disk_bytes": 4000.0, "all_bytes": 4000.0, "label_kl": 0.0}
    assert Labels(problem, ARMS["exact"]).sizes("exact", 4.0) == whole
    labels = Labels(problem, ARMS["tinyvit-10"])
    sizes = labels.sizes("tinyvit-10", 4.0)
    codec, logits, dither_keys = peers.tinyvit(1000, 10), problem.logits[0].numpy(), problem.dither_keys[0]
    assert sizes["row_bytes"] == 44
    assert sizes["disk_bytes"] == len(codec.pack(codec.encode(logits, dither_keys))) / 1400
    assert sizes["all_bytes"] == sizes["disk_bytes"], "its row holds what makes the view again"
    assert Labels(problem, ARMS["tinyvit-10-renorm"]).sizes("tinyvit-10-renorm", 4.0)["label_kl"] is None
    # A uniform step s adds KL s² / 24 T² or less; scale / 2 is the largest error of int8.
    step = (problem.logits[0].amax(-1) - problem.logits[0].amin(-1)).max().item() / 254
    ours = Labels(problem, ARMS["int8"]).sizes("int8", 4.0)
    assert 0 <= ours["label_kl"] < step**2 / (24 * 16)
    # Of 700 pairs w in 20 to 25 bits and a digest of 4 bytes: `tests/cache/test_formats.py` weighs a store's files.
    assert 3.2 < ours["all_bytes"] - ours["disk_bytes"] < 3.7


def test_pruned_labels_are_the_same_few_in_every_epoch(problem):
    labels = Labels(problem, ARMS["lpqld-int4"])
    seen = [np.unique(labels.kept(np.arange(700), view)) for view in (0, 1, 0)]
    assert len(seen[0]) == len(seen[1]) == 70 and np.array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0], seen[1])
    whole = Labels(problem, ARMS["int4"]).sizes("int4", 4.0)
    assert labels.sizes("lpqld-int4", 4.0)["disk_bytes"] == pytest.approx(0.1 * whole["disk_bytes"])


def test_formats_are_made_for_the_students_temperature(problem):
    """Top-100 labels stored at T = 2 are exact there and not at 4; -t1 stays what peers ship."""
    for name, stored in (("tinyvit-100", 2.0), ("tinyvit-100-t1", 1.0), ("rskd-100", 2.0), ("distillkit-50", 2.0)):
        coder = arms(2.0)[name](problem.logits[0][:8].numpy())
        assert coder and coder.config["temperature"] == stored


def test_students_of_a_seed_differ_by_their_labels_alone(problem):
    problem = dataclasses.replace(problem, batch=128)
    exact, few = Labels(problem, ARMS["exact"]), dataclasses.replace(SMALL, steps=5)
    first, again, other = (codec_transfer.learn(problem, exact, seed, few) for seed in (0, 0, 1))
    for name in ("accuracy", "kl"):
        assert first[name] == again[name]
    assert first["kl"] != other["kl"] and first["kl"] > 0
    half = Labels(problem, ARMS["fp16"])
    # Half precision moves logits by 2^-8 at most, so the student's by next to nothing in five steps.
    assert codec_transfer.learn(problem, half, 0, few)["kl"] == pytest.approx(first["kl"], rel=1e-2)


def test_a_key_depends_on_recipe_codec_and_what_it_makes(problem):
    keys = [
        Labels(problem, ARMS[arm]).key(seed, dataclasses.replace(SMALL, steps=steps))
        for arm, seed, steps in (("int4", 0, 30), ("int4", 1, 30), ("int4", 0, 31), ("int6", 0, 30), ("exact", 0, 30))
    ]
    assert len(set(keys)) == len(keys) and keys[0] == Labels(problem, ARMS["int4"]).key(0, SMALL)

    class Other(peers.PerRow):
        def decode(self, rows, dither_keys):
            return super().decode(rows, dither_keys) + 1

    assert Labels(problem, lambda logits: Other(1000, 4)).key(0, SMALL) != keys[0]


def test_the_difference_to_exact_is_paired_over_seeds():
    exact = [{"accuracy": value, "kl": 0.1} for value in (90.0, 80.0, 85.0)]
    mine = [{"accuracy": value, "kl": 0.2} for value in (89.0, 78.0, 82.0)]
    found = codec_transfer.summary(mine, exact)
    assert found["difference"] == {"mean": -2.0, "se": pytest.approx(1 / 3**0.5), "seeds": [-1.0, -2.0, -3.0]}
    assert found["accuracy"] == {"mean": 83.0, "sd": statistics.stdev((89, 78, 82)), "seeds": [89.0, 78.0, 82.0]}
    assert codec_transfer.summary(mine[:1], exact[:1])["difference"]["se"] is None


def test_every_arm_makes_a_codec(problem):
    """All but the fitted ones, which tests of their own fit."""
    for name, make in ARMS.items():
        if name.startswith("subspace"):
            continue
        coder = make(problem.logits[0][:8].numpy())
        assert (coder is None) == (name == "exact")
        if coder is not None:
            rows = coder.encode(problem.logits[0][:8].numpy(), problem.dither_keys[0][:8])
            assert rows.shape == (8, coder.row_bytes)


def test_a_run_orders_labels_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(problems, "HELD_OUT", 256)
    monkeypatch.setattr(problems, "BATCH", 128)
    options = dataclasses.replace(
        SMALL, arms="exact,int8,tinyvit-10", work=tmp_path, json=tmp_path / "found.json", out=tmp_path / "plots"
    )
    found = codec_transfer.run(options)
    arms = found["arms"]
    assert list(arms) == ["exact", "int8", "tinyvit-10"] and found["reference"] == "exact"
    assert arms["exact"]["kl"]["mean"] < arms["tinyvit-10"]["kl"]["mean"]
    # int8 errs by a fortieth of the logits' spread: its student is that of exact labels but for chance.
    assert arms["int8"]["kl"]["mean"] == pytest.approx(arms["exact"]["kl"]["mean"], rel=0.02)
    assert arms["exact"]["accuracy"]["mean"] >= arms["tinyvit-10"]["accuracy"]["mean"]
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".png", ".svg"}
    assert "int8" in capsys.readouterr().out

    def fail(*arguments):
        raise AssertionError("a finished student is taught again")

    monkeypatch.setattr(codec_transfer, "learn", fail)
    assert codec_transfer.run(dataclasses.replace(options, json=None, out=None))["arms"] == arms
    (tmp_path / "codec-transfer.json").write_text("damaged")
    with pytest.raises(AssertionError, match="taught again"):
        codec_transfer.run(options)


def test_what_a_user_gets_wrong_is_an_error():
    for change, message in (
        ({"arms": "exact,tinyvit-1000"}, "unknown arm tinyvit-1000; fix: did you mean tinyvit-100"),
        ({"teacher": "lite0", "data": Path("d")}, "--teacher lite0 without --val"),
        ({"teacher": "lite9", "data": Path("d"), "val": Path("d")}, "unknown teacher lite9"),
        ({"teacher": "lite0", "student": "large", "data": Path("d"), "val": Path("d")}, "unknown student large"),
        ({"samples": 100}, "--samples out of range; found 100, expected at least 1024"),
    ):
        with pytest.raises(UserError, match=message):
            codec_transfer.run(dataclasses.replace(SMALL, **change))
