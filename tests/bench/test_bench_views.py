"""The benchmarks of the GPU loader's host and of several views from one decode measure what they name."""

import json
from itertools import islice
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from support.images import jpeg
from support.tars import tar_of

from bench import MODULES
from bench.harness import Slot
from bench.loader import arms, engine, views
from pipeline.config import Bench
from pipeline.data import prepare
from pipeline.views import on_cpu


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 JPEGs of 48 x 36."""
    folder, rng, members = tmp_path_factory.mktemp("few"), np.random.default_rng(0), {}
    for i in range(24):
        members |= {f"{i:02d}.jpg": jpeg(rng, 48, 36), f"{i:02d}.cls": b"%d" % (i % 3)}
    prepare.build(f"webdataset:{tar_of(folder / 's.tar', members)}", folder / "data", classes=3)
    return folder / "data"


def test_every_suite_has_its_module():
    (suites, *_) = get_args(get_type_hints(Bench, include_extras=True)["suite"])
    assert set(MODULES) == set(get_args(suites))


def test_all_arms_make_as_many_pairs_and_each_image_is_decoded_once_for_its_views(data, tmp_path, monkeypatch):
    """The pairs of a slot are as many; decodes per pair are 1 or a quarter."""
    job, store, decode = arms.Job(data, 8, 1), tmp_path / "labels.zarr", on_cpu.decode
    views.teach(job, store)
    for name in views.ARMS:
        what, count = name.split()
        decoded = []
        with monkeypatch.context() as patch:
            patch.setattr(on_cpu, "decode", lambda data, decoded=decoded: [decoded.append(data), decode(data)][1])
            patch.setattr(views, "_EPOCHS", 4)
            arm = (views.teaching if what == "views" else views.learning)(job, int(count), store)
            assert sum(islice(arm, 12)) == 96  # four views of every sample
            if what == "repeat":
                assert next(arm, None) is None
                assert len(decoded) == 96 // int(count)
            arm.close()


def test_what_is_saved_is_taken_round_by_round():
    def slots(*seconds: float) -> list[Slot]:
        return [Slot(100, each, 2 * each, {}, 0, 0) for each in seconds]

    rows = views.saved({"views 1": slots(2.0, 8.0, 6.0), "views 4": slots(1.0, 2.0, 2.0), "repeat 4": slots(1.0)})
    (row,) = rows  # there is nothing to hold repeat 4 against
    assert row["option"] == "--views-per-decode 4" and row["× pairs/s"] == row["× pairs per CPU s"] == 3.0


def test_the_hosts_stages_add_up(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "_BATCH", 8)
    found = engine.run(Bench(suite="engine", data=data, threads=1, rounds=2, json=tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == found
    tables = found["tables"]
    ms = {row["stage"]: row["CPU ms"] for row in tables["stages"]}
    assert list(ms) == [*engine.STAGES, "together", "bytes read", "pixels digested", "labels gathered"]
    assert all(ms[stage] > 0 for stage in engine.STAGES)
    # Medians of two rounds are means, which add up.
    assert ms["together"] == pytest.approx(sum(ms[stage] for stage in engine.STAGES))
    bound = {row["bound"]: row for row in tables["bounds"]}
    assert bound["the loader's thread"]["pairs/s"] == round(8e3 / ms["together"])
    assert bound["4 workers, in a teacher pass"]["ms per batch"] == ms["pixels digested"] / 4
    # Coefficients and crops at the least, and three kernels for each step of a chain of operations.
    (launches,) = tables["launches"]
    assert 2 < launches["count"] <= 2 + 3 * (len(arms.POLICY.table) + 1)


def test_a_stage_within_a_stage_is_counted_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(engine.time, "thread_time", lambda: now[0])
    spent = engine.Stages()

    def work(seconds: float, then=lambda: None) -> None:
        now[0] += seconds
        then()
        now[0] += seconds

    inner = spent.of("arguments laid out", lambda: work(5.0))
    outer = spent.of("kernels planned", lambda: work(1.0, inner))
    work(0.25, outer)
    assert {stage: seconds for stage, seconds in spent.take().items() if seconds} == {
        "kernels planned": 2.0,
        "arguments laid out": 10.0,
        "all else": 0.5,
    }
    assert not any(spent.take().values())
