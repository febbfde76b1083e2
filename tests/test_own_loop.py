"""The loops of docs/own-loop.md, run as printed but for their size, against `pipeline train-student`."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
from support.documents import blocks

from pipeline.config import TrainStudent
from pipeline.networks import models
from pipeline.replay import Replay
from pipeline.training import train_student

PAGE = Path(__file__).parents[1] / "docs" / "own-loop.md"
CODE = [block.text for block in blocks(PAGE.read_text()) if block.language == "python"]
LOOPS = {
    name: code
    for name in ("plain.pt", "timm.pt", "lightning/last.ckpt", "accelerate")
    for code in CODE
    if f'"{name}"' in code
}
NETWORK = "cifar/resnet8"
RATE = 0.001  # at 0.1 the rounding of a float32 loss has grown to a hundredth after 20 steps


@pytest.fixture(scope="module")
def by_command(digits, labels, tmp_path_factory) -> dict[str, list[float]]:
    """What `train-student` has as its losses, step by step."""
    found = {}
    for loss in ("ccd", "kd"):
        run = tmp_path_factory.mktemp("run") / loss
        options = {"lr": RATE, "batch_size": 16, "epochs": 2, "log_steps": 1, "device": "cpu", "out": run}
        train_student.run(TrainStudent(data=digits / "train", store=str(labels), student=NETWORK, loss=loss, **options))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[loss] = [record["loss"] for record in records if "step" in record]
    return found


@pytest.fixture
def place(digits, labels, tmp_path, monkeypatch) -> Path:
    """A folder as the page presumes it, and its network."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(digits / "train")
    (tmp_path / "labels.zarr").symlink_to(labels)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        timm, "create_model", lambda name, num_classes: models.create(NETWORK, num_classes, seed=0).module
    )
    return tmp_path


class Stopped(Exception):
    """What ends a loop in the middle."""


def run(name: str) -> list[float]:
    """A loop of the page on 16 pairs a step, two epochs, a checkpoint each five steps; its losses."""
    code, sizes = re.subn("batch_size=256, epochs=200", "batch_size=16, epochs=2", LOOPS[name])
    code, cadence = re.subn(r"\b500\b", "5", code)
    code, rates = re.subn(r"(lr\b\W+)0\.1\b", rf"\g<1>{RATE}", code)
    assert sizes == cadence == rates == 1
    code = code.replace("accelerator = Accelerator()", "accelerator = Accelerator(cpu=True)")
    scope: dict = {"__name__": "own_loop"}
    with contextlib.suppress(Stopped):
        exec(compile(code, str(PAGE), "exec"), scope)
    return scope["losses"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_has_the_losses_of_train_student_and_survives_a_stop(name, place, by_command, monkeypatch):
    expected = by_command["kd" if name == "timm.pt" else "ccd"]
    assert len(expected) >= 20
    with monkeypatch.context() as patch:
        taken, following = 0, Replay.next

        def stopped(replay):
            nonlocal taken
            if (taken := taken + 1) > 9:
                raise Stopped
            return following(replay)

        patch.setattr(Replay, "next", stopped)
        before = run(name)
    assert len(before) in (8, 9)
    after = run(name)  # from the checkpoint of step 5
    np.testing.assert_allclose(before[:5] + after, expected, rtol=1e-6)
