"""Means are weighted; a log that a killed run wrote beyond its checkpoint is cut back to it."""

import json

import pytest
import torch

from pipeline.training.metrics import Log, Means, means


def test_means_are_weighted_each_by_its_own_and_survive_their_state():
    sums = Means()
    sums.add(3, {"loss": torch.tensor(1.0)})
    sums = Means(sums.total())
    sums.add(1, {"loss": 5.0, "w": 2.0})
    sums.add(0, {"w": 7.0, "never": 1.0})
    assert means(sums.total()) == {"loss": pytest.approx((3 * 1 + 5) / 4), "w": 2.0}


def test_lines_beyond_the_checkpoint_are_dropped_and_a_half_line_too(tmp_path):
    def epoch(number: int) -> list[dict]:
        return [{"epoch": number, "step": step, "loss": 1.0} for step in (2, 4)] + [{"epoch": number, "loss": 1.0}]

    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record) for number in range(4) for record in epoch(number)]
    path.write_text("\n".join([*lines, '{"epoch": 4, "lo']))
    log = Log(tmp_path, 2, 3)
    assert log.records == [*epoch(0), *epoch(1), epoch(2)[0]]
    log.write({"epoch": 2, "loss": 0.5})
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [*epoch(0), *epoch(1), epoch(2)[0], {"epoch": 2, "loss": 0.5}]


def test_only_one_process_of_a_job_writes(tmp_path):
    Log(tmp_path, 0, 0, write=False).write({"epoch": 0})
    assert not list(tmp_path.iterdir())
