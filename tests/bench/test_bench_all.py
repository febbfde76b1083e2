"""The end-to-end benchmark runs what it names, its arithmetic is that of its table, and the page shows every suite."""

import dataclasses
import json
import math
import re
from datetime import datetime
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import refused

from bench import MODULES, harness
from bench.labels import peers
from bench.whole import all as all_suites
from bench.whole import end_to_end
from bench.whole import page as all_page
from pipeline.config import Bench
from pipeline.system import machine as machines
from pipeline.training.methods import loss, make


@pytest.fixture(scope="module")
def found(digits, tmp_path_factory) -> dict:
    """Every arm but that of the large teacher, two rounds of two pairs of views of 32 pixels."""
    work = tmp_path_factory.mktemp("work")
    config = Bench(
        suite="end-to-end",
        data=digits,
        work=work,
        student="cifar/resnet8",
        teacher="cifar/resnet8x4",
        arms="ce,stored,peer,live,loaded",
        rounds=2,
        batch_size=2,
        threads=2,
        json=work / "found.json",
    )
    policy = end_to_end._POLICY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "_POLICY", dataclasses.replace(policy, base=policy.base.resized(32)))
        found = end_to_end.run(config)
    assert json.loads((work / "found.json").read_text()) == found
    assert [path.name for path in work.iterdir()] == ["found.json"]
    return found


def test_the_step_of_every_arm_is_the_sum_of_its_phases(found):
    rows = {row["arm"]: row for row in found["tables"]["step"]}
    assert list(rows) == ["ce", "stored", "peer", "live", "loaded"]
    for row in rows.values():
        assert all(row[f"{phase} ms"] >= 0 for phase in ("wait", "forward", "loss", "backward", "optimiser"))
        assert row["q1"] <= row["ms/step"] <= row["q3"]
        assert row["pairs/s"] == pytest.approx(2 * 1000 / row["ms/step"])
    assert rows["ce"]["× ce"] == 1.0
    # The teacher is asked in the loss, and four times as wide as the student.
    assert rows["live"]["loss ms"] > rows["stored"]["loss ms"]
    # 10 of 10 classes as TinyViT keeps them: seed, then two bytes each for class and probability, in both views.
    assert rows["peer"]["bytes/pair"] - rows["ce"]["bytes/pair"] == 2 * (4 + 10 * 4)
    assert rows["loaded"]["bytes/pair"] == rows["stored"]["bytes/pair"] > rows["ce"]["bytes/pair"]


def test_break_even_follows_from_the_seconds(found):
    (row,) = found["tables"]["break-even"]
    assert row["10 views, h"] == pytest.approx(10 * row["h per view"])
    # Ten passes cost 10 · 3 s a batch; each epoch saves (5 − 1) s of it.
    laps = {"live": [{"loss": 5.0}] * 3, "stored": [{"loss": 1.0}] * 3, "live: pass": [{"teacher": 3.0}] * 3}
    row = end_to_end._break_even("live", laps, 1_281_167)
    assert row["h per view"] == pytest.approx(3 / 3600) and row["h saved per epoch"] == pytest.approx(4 / 3600)
    assert row["epochs until 10 views have paid"] == pytest.approx(7.5)
    assert row["students of 100 epochs"] == pytest.approx(0.075)
    row = end_to_end._break_even("live", laps | {"live": laps["stored"]}, 1)
    assert row["epochs until 10 views have paid"] == math.inf


def test_the_peers_labels_are_decoded_as_the_peer_does():
    """Against NumPy's decoding in `bench.labels.peers`, by the loss that they teach; row 7 has the label of row 3."""
    logits = np.random.default_rng(0).normal(size=(4, 2, 300)).astype(np.float32) * 3
    form = peers.tinyvit(300, 100)
    encoded = form.encode(logits, np.arange(4, dtype=np.uint64))
    fields = peers.read(encoded, form.layout)
    index, p = (torch.from_numpy(fields[name]) for name in ("index", "value"))
    top = end_to_end.TopK(None, index, p, 300, form.row_bytes)  # pyright: ignore[reportArgumentType]
    rows = np.array([1, 7, 0])
    expected = torch.from_numpy(form.decode(encoded, np.arange(4))[rows % 4])
    student = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"temperature": 4.0, "alpha": 0.5, "kd_weight": 2.0}
    one, other = (
        loss(make("kd"), student, teacher, torch.arange(3), torch.ones(3), **options)
        for teacher in (top.logits(rows), expected)
    )
    assert one.item() == pytest.approx(other.item(), rel=1e-5)


def test_arms_and_sizes_that_are_none(capsys):
    assert "did you mean live-large" in refused(capsys, "bench", "end-to-end", "--arms", "ce,live-larg")
    assert "--rounds out of range; found 0" in refused(capsys, "bench", "end-to-end", "--rounds", "0")
    assert "did you mean kernels" in refused(capsys, "bench", "all", "--arms", "kernel")


def _document(name: str, arms: dict, tables: dict) -> dict:
    return harness.document(
        name, machine=machines.describe(), options={}, unit="pairs", reference="jda-distill", arms=arms, tables=tables
    )


def _spread(value: float) -> dict:
    return harness.spread([value, 1.1 * value])


SUITES = {
    "loader": (
        {
            name: {"rate": _spread(9.0), "ratio": _spread(1.0), "cpu_ms": _spread(2.0)}
            for name in ("jda-distill", "<x>")
        },
        {"profile": [{"stage": "decode", "CPU ms/pair": 1.0}, {"stage": "total", "CPU ms/pair": 1.0}]},
    ),
    "store": (
        {},
        {
            "formats": [
                {"teacher": "some", "format": name, "on disk": 9.0, "KL T=4": kl, "slope": 1.0}
                for name, kl in (("subspace-0.05", 0.05), ("fp16", 0.0))
            ],
            "storage": [{"reader": "this store", "MB/s": 9.0}],
        },
    ),
    "kernels": (
        {},
        {
            "operators": [{"path": "these kernels", "forward": 2, "backward": 1}],
            "bytes": [{"classes": 1000, "student": "bf16", "teacher": "subspace", "bytes": 8656}],
        },
    ),
}


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name in ("src", "href") and not (value or "").startswith("#") for name, value in attrs)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_shows_every_suite(found, tmp_path, monkeypatch, capsys):
    """The suites hand over documents; what is finished is kept when a later one fails. The clock goes on meanwhile."""
    asked, seconds = [], iter(range(60))
    clock = SimpleNamespace(now=lambda zone: datetime(2026, 1, 1, 0, 0, next(seconds), tzinfo=zone))
    monkeypatch.setattr(harness, "datetime", clock)

    class Suite:
        def __init__(self, name: str):
            self.name = name

        def run(self, config: Bench) -> dict:
            asked.append(config)
            if self.name == broken:
                raise KeyboardInterrupt
            return found if self.name == "end-to-end" else _document(self.name, *SUITES[self.name])

    monkeypatch.setattr(
        all_suites, "import_module", lambda name: Suite({module: suite for suite, module in MODULES.items()}[name])
    )
    config, broken = Bench(suite="all", out=tmp_path / "out"), "kernels"
    with pytest.raises(KeyboardInterrupt):
        all_suites.run(config)
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert list(kept["suites"]) == ["end-to-end", "loader", "store"]
    assert not (tmp_path / "out" / "bench.html").exists()

    broken, asked[:] = "", []
    whole = all_suites.run(config)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == whole
    assert {each.suite: each.rounds for each in asked} == all_suites.SUITES
    assert all(each == dataclasses.replace(each, arms=None, json=None, out=None) for each in asked)
    all_suites.run(dataclasses.replace(config, rounds=2, arms="loader"))
    assert (asked[-1].suite, asked[-1].rounds) == ("loader", 2)
    all_suites.run(config)
    page = _Page((tmp_path / "out" / "bench.html").read_text())
    text = " ".join(page.text)
    assert page.tags.count("svg") == page.tags.count("figure") == 3 + 3 + 2 + 2
    for words in ("End to end", "Loader", "Store", "Loss kernels", "live teacher", "KL(T = 4), nats", "<x>"):
        assert words in text
    assert "x" not in page.tags, "an arm's name is text"
    assert str(tmp_path / "out" / "bench.html") in re.sub(r"\s", "", capsys.readouterr().out)


def test_a_gpus_times_are_drawn_beside_their_floor():
    times = [
        {"size": "8×10", "arm": arm, "called µs": 9.0, "replayed cold µs": 5.0, "floor µs": 2.0}
        for arm in ("ours dense", "eager")
    ]
    tables = {"time": times, "bytes": SUITES["kernels"][1]["bytes"]}
    page = all_page.render(_document("all", {}, {}) | {"suites": {"kernels": _document("kernels", {}, tables)}})
    text = " ".join(_Page(page.decode()).text)
    assert "8×10, replayed cold" in text and "floor, bf16 dense" in text and "ours dense" in text
