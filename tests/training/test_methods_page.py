"""docs/methods.md says what there is: a row for each method, whose switch and tests exist."""

import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pipeline.config import Loss, PrecomputeTeacher, Prepare, TrainStudent
from pipeline.training.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
NAMED = (
    "KD", "CCD", "DKD", "DIST", "standardised", "Energy-KD", "DYTKD", "triplet", "IDA", "MJKD", "LPQLD", "FitNet",
    "SimKD", "CRD", "VID", "FT", "MTKD", "SSKD", "HSAKD", "BSS", "TALD", "CLIP", "multi-teacher", "unlabelled",
    "few-shot",
)  # fmt: skip
FLAGS = {
    f"--{field.name.replace('_', '-')}"
    for schema in (TrainStudent, PrecomputeTeacher, Prepare)
    for field in dataclasses.fields(schema)
}


def test_rows_have_their_columns():
    assert ROWS[0] == ["method", "source", "needs", "switch", "test", "status"]
    assert all(len(row) == 6 for row in ROWS), [row for row in ROWS if len(row) != 6]


def test_every_loss_has_one_row_and_every_method_of_the_literature_its_place():
    switches = [loss for row in ROWS for loss in re.findall(r"--loss ([a-z-]+)", row[3])]
    assert sorted(switches) == sorted(get_args(Loss))
    names = " ".join(row[0] for row in ROWS)
    assert not [name for name in NAMED if not re.search(rf"\b{re.escape(name)}\b", names)]


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row[0])
def test_what_runs_has_a_switch_and_a_test_that_are_there(row):
    method, _, _, switch, tests, status = row
    assert re.match(r"(runs|not)\b", status), status
    assert bool(switch) == bool(tests) == status.startswith("runs"), method
    for flag in re.findall(r"--[a-z-]+", f"{switch} {row[2]}"):
        assert flag in FLAGS, flag
    for value in re.findall(r"--together ([a-z]+)", switch):
        assert value in get_args(get_type_hints(TrainStudent)["together"])
    for path in re.findall(r"tests/[\w/]+\.py", tests):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", METHODS)
def test_options_of_a_method_are_named(name):
    (row,) = (row for row in ROWS if re.search(rf"--loss {name}(?![\w-])", row[3]))
    fields = [field.name.replace("_", "-") for field in dataclasses.fields(METHODS[name])]
    assert not [field for field in fields if f"`{field}`" not in row[5]]
