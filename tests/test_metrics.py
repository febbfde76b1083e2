"""Means are weighted by samples; a log that a killed run wrote beyond its checkpoint is cut back to it."""

import json

import pytest
import torch

from pipeline.metrics import Log, Means


def test_means_are_weighted_by_samples_and_survive_their_state():
    means = Means()
    means.add(3, {"loss": torch.tensor(1.0)})
    means = Means(means.sums)
    means.add(1, {"loss": 5.0})
    assert means.result() == {"loss": pytest.approx((3 * 1 + 5) / 4)}


def test_lines_from_the_checkpoint_on_are_dropped_and_a_half_line_too(tmp_path):
    lines = [json.dumps({"epoch": epoch, "loss": 1.0}) for epoch in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch": 3, "lo']))
    log = Log(tmp_path, epoch=2)
    assert [record["epoch"] for record in log.records] == [0, 1]
    log.write({"epoch": 2, "loss": 0.5})
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [*({"epoch": epoch, "loss": 1.0} for epoch in range(2)), {"epoch": 2, "loss": 0.5}]
