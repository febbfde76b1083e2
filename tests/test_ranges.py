"""Numeric options: each has a range, and a value outside it is one line before anything is done."""

import dataclasses
import math
import re
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import UserError
from pipeline import cli
from pipeline.config import Range, TrainStudent

NUMBERS = [
    (command, name, hint)
    for command, (schema, _) in cli.COMMANDS.items()
    for name, hint in get_type_hints(schema, include_extras=True).items()
    if re.search(r"\b(int|float)\b", str(hint))
]


@pytest.mark.parametrize(
    ("command", "name", "hint"), NUMBERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_numeric_option_has_a_range_and_a_default_within(command, name, hint):
    (allowed,) = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)]
    (field,) = [field for field in dataclasses.fields(cli.COMMANDS[command][0]) if field.name == name]
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    assert all(value in (None, dataclasses.MISSING) or value in allowed for value in values)
    assert not any(number in allowed for number in (math.nan, math.inf, -math.inf, -1, 10**400))


@given(low=st.integers(-5, 5), width=st.integers(0, 5), above=st.booleans(), value=st.floats())
def test_a_range_is_an_interval(low, width, above, value):
    inside = math.isfinite(value) and low <= value <= low + width and not (above and value == low)
    assert (value in Range(low, low + width, above)) == inside


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "0"], "--temperature out of range; found 0.0, expected above 0, at most 1,000,000,000"),
        (["--alpha", "1.5"], "--alpha out of range; found 1.5, expected 0 to 1"),
        (["--lr", "nan"], "--lr out of range; found nan, expected 0 to 1,000,000,000"),
        (["--kd-weight", "-1"], "--kd-weight out of range; found -1.0, expected 0 to 1,000,000,000"),
        (["--epochs", "0"], "--epochs out of range; found 0, expected 1 to 1,000,000,000"),
        (["--log-steps", "0"], "--log-steps out of range; found 0, expected 1 to 1,000,000,000"),
        (["--few-shot", "0"], "--few-shot out of range; found 0.0, expected above 0, at most 1"),
        (["--milestones", "3", "-1"], "--milestones out of range; found -1, expected 0 to 1,000,000,000"),
        (["--seed", "9" * 400], f"--seed out of range; found {'9' * 20}, expected 0 to 18,446,744,073,709,551,615"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_number_out_of_its_range_is_one_line(arguments, said, tmp_path, capsys):
    command = ["train-student", "--data", tmp_path, "--student", "cifar/resnet8", "--out", tmp_path / "run"]
    assert cli.main([*map(str, command), *arguments]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["claims", "--seeds", "0"], "--seeds out of range; found 0"),
        (["claims", "--epochs", "0"], "--epochs out of range; found 0"),
        (["claims", "--epochs", "10001"], "--epochs out of range; found 10001, expected 1 to 10,000"),
        (["claims", "--batch-size", "1048577"], "--batch-size out of range; found 1048577, expected 1 to 1,048,576"),
        (["claims", "--json", "/no/where/found.json"], "no folder for /no/where/found.json"),
        (["codec-transfer", "--seeds", "0"], "--seeds out of range; found 0"),
        (["codec-transfer", "--json", "/no/where/found.json"], "no folder for /no/where/found.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_benchmarks_refuse_before_they_begin(arguments, said, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_record_made_in_python_is_checked_like_flags():
    student = TrainStudent(data=".", student="", out=".", few_shot=1.0, lr=0, milestones=(), kd_warmup_epochs=0)  # pyright: ignore
    with pytest.raises(UserError, match="--few-shot"):
        dataclasses.replace(student, few_shot=0.0)
