"""A kill at any moment leaves no trace in the weights."""

import dataclasses
import json
import signal

import pytest
import torch
from support.nodes import Node, section
from support.processes import finished, stopped
from support.run_pages import cells
from support.runs import assert_same_weights, log

from pipeline.system import signals
from pipeline.training import train_student
from pipeline.views.loader import Loader

UNTIMED = {"seconds", "times", "wait_share", "images_per_s"}


@pytest.mark.parametrize(
    ("event", "count", "number"),
    [
        # Other moments of the same kinds are slow.
        pytest.param("step", 1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("step", 7, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("step", 12, signal.SIGINT, marks=pytest.mark.slow),  # the last one of an epoch
        ("step", 23, signal.SIGKILL),
        pytest.param("step", 36, signal.SIGTERM, marks=pytest.mark.slow),  # the last one
        ("rename", 5, signal.SIGKILL),  # a first checkpoint is written whole, and has no name
        pytest.param("rename", 12, signal.SIGKILL, marks=pytest.mark.slow),
        ("evaluate", 3, signal.SIGINT),  # after the last step of all
    ],
)
def test_signals_leave_no_trace_in_the_weights(whole, tmp_path, event, count, number):
    """With --resume the final weights are bit-identical to those of an uninterrupted run on the CPU."""
    run = dataclasses.replace(whole, out=tmp_path / "run", resume=True)
    assert stopped(train_student.run, run, event, count, number)
    assert not (run.out / "model.safetensors").exists()
    if (event, count) == ("rename", 5):
        assert not (run.out / "checkpoint.pt").exists() and (run.out / "checkpoint.pt.partial").exists()
    finished(train_student.run, run)
    assert_same_weights(run, whole)
    ours, theirs = (
        [{name: value for name, value in record.items() if name not in UNTIMED} for record in records]
        for records in (log(run), log(whole))
    )
    assert ours == theirs


def test_a_killed_run_has_a_page_of_its_last_epoch(options, tmp_path):
    run = dataclasses.replace(options, out=tmp_path / "run")
    assert stopped(train_student.run, run, "step", 13, signal.SIGKILL)
    page = Node((run.out / "report.html").read_text())
    (last,) = log(run)
    assert "1 of 3 epochs" in page.text()
    assert cells(section(page, "Training"))["loss"] == [f"{last['loss']:,.5g}"]


def test_a_signal_saves_the_step_under_way(whole, tmp_path):
    """SIGTERM loses nothing, although no checkpoint was due: the run goes on from the very step."""
    run = dataclasses.replace(whole, out=tmp_path / "run", resume=True, checkpoint_steps=10**6, log_steps=1)
    assert stopped(train_student.run, run, "step", 31, signal.SIGTERM)
    state = torch.load(run.out / "checkpoint.pt", weights_only=True)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in lines if "step" in record][-1]
    assert (state["epoch"], state["step"]) == (last["epoch"], last["step"]) == (2, 31 - 2 * 12)


def test_a_run_that_was_stopped_after_an_epochs_last_step_goes_on_with_the_next_epoch(whole, tmp_path, monkeypatch):
    """Its loader starts late, when the epoch without steps is over: the batches are still those of the next one."""
    run = dataclasses.replace(whole, out=tmp_path / "run", resume=True)
    with monkeypatch.context() as patch:
        asked = iter([None] * 11 + [signal.SIGINT])
        patch.setattr(signals.Requests, "now", lambda self, **_: next(asked))
        with pytest.raises(SystemExit):
            train_student.run(run)
    state = torch.load(run.out / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, 12)

    batches = Loader.batches

    def late(*arguments, **options):
        yield from batches(*arguments, **options)

    monkeypatch.setattr(Loader, "batches", late)
    train_student.run(run)
    assert_same_weights(run, whole)
