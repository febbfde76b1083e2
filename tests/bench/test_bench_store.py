"""The store benchmark: its figures are those of independent formulas, and every reader reads the same bytes."""

import json

import numpy as np
import pytest

from bench import harness
from bench.labels import sharing, storage, store
from cache import UserError
from pipeline.config import Bench


def logits(pairs: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(pairs, 2, 6)) @ np.random.default_rng(9).normal(size=(6, 12)) * 2).astype(np.float32)


@pytest.fixture
def teacher(tmp_path):
    fit, held = logits(128, 0), logits(32, 1)
    parts = {"fit_original": fit[:, 0], "fit_augmented": fit[:, 1], "original": held[:, 0], "augmented": held[:, 1]}
    np.savez(tmp_path / "small.npz", **parts)
    return tmp_path / "small.npz"


def test_a_run_writes_figures_and_plots(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "_against_networks", lambda sources: [{"cost": "none", "share %": 0.0}])
    small = dict(PROCESSES=(3,), ROUNDS=1, SAMPLES=4000, _CLASSES=60, _DIRECTIONS=20, _BLOCK_ROWS=500)
    for name, value in small.items():
        monkeypatch.setattr(sharing, name, value)
    config = Bench(suite="store", logits=(teacher,), samples=20_000, rounds=1, work=tmp_path, out=tmp_path / "plots")
    found = store.run(Bench(**vars(config) | {"arms": "int8,fp16,subspace-0.05", "json": tmp_path / "found.json"}))
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"formats-small.png", "formats-small.svg"}
    assert list(found["arms"]) == ["plain read", "this store", "zarr-python", "zarrs", "tensorstore"]
    assert not (tmp_path / "plane-20000").exists()
    by_name = {row["format"]: row for row in found["tables"]["formats"]}
    assert by_name["int8"]["on disk"] == (2 * 8 + 2 * 12) / 2
    assert by_name["subspace-0.05"]["on disk"] < 6 and 0.02 < by_name["subspace-0.05"]["KL T=4"] < 0.08
    assert by_name["subspace-0.05"]["all told"] > by_name["subspace-0.05"]["on disk"] + 3
    (limit,), (shared,) = found["tables"]["limits"], found["tables"]["sharing"]
    assert limit["format"] == "subspace-0.05" and 0 < limit["at least"] < by_name["subspace-0.05"]["on disk"]
    assert shared["processes"] == 3 and shared["labels"] == "same" and 0.9 < shared["planes in memory"] < 1.1
    assert "subspace-0.05" in capsys.readouterr().out


def test_formats_of_more_top_classes_than_there_are_are_left_out():
    makes = {name: store.ARMS[name] for name in ("tinyvit-100", "apple-10", "fkd-5")}
    assert [row["format"] for row in store.compare(makes, logits(16, 0), logits(16, 1))] == ["apple-10", "fkd-5"]


def test_every_reader_reads_the_same_rows(tmp_path):
    made, _ = storage._written(tmp_path / "s", 9000)
    expected = made.load_plane(0).codes
    for array in (
        storage._zarr(tmp_path / "s", None),
        storage._zarr(tmp_path / "s", "zarrs.ZarrsCodecPipeline"),
        storage._tensorstore(tmp_path / "s"),
    ):
        np.testing.assert_array_equal(array, expected)


def test_w_from_decoded_labels_is_how_far_off():
    true = logits(32, 3)
    row = store.compare({"int8": store._makes("int8")["int8"]}, logits(8, 0), true)[0]
    codec = store.ARMS["int8"](true)
    o, a = codec.decode(codec.encode(true, np.zeros(32, np.uint64)), np.zeros(32, np.uint64)).swapaxes(0, 1)
    cosine = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(o, a, strict=True)]
    exact = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in true.astype(np.float64)]
    assert row["w off by"] == pytest.approx(np.abs(np.subtract(cosine, exact)).max(), rel=1e-3)


def test_what_a_user_gets_wrong_is_an_error(teacher, tmp_path):
    for change, message in (
        ({"arms": "int9"}, "unknown format int9; fix: did you mean int"),
        ({"logits": (tmp_path / "none.npz",)}, "cannot read logits"),
    ):
        with pytest.raises(UserError, match=message):
            store.run(Bench(suite="store", work=tmp_path, **{"logits": (teacher,)} | change))
    assert harness.work(tmp_path) == tmp_path
