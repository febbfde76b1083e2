"""What every error has in common: one type, one short printable line, and what to do about it."""

import ast
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.commands import command

from cache.errors import UserError
from pipeline.training import evaluate

ROOT = Path(__file__).parents[1]
FILES = [path for part in ("pipeline", "cache", "kernels", "bench") for path in sorted((ROOT / part).rglob("*.py"))]
QUOTED = st.text() | st.text(max_size=9).map(lambda text: 999 * text)


@cache
def all_calls() -> list[tuple[str, str, ast.Call]]:
    """Every call in the product: of what, where it stands, and itself."""
    return [
        (getattr(node.func, "id", getattr(node.func, "attr", "")), f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def calls(*names: str) -> list[tuple[str, ast.Call]]:
    """Calls of functions and methods with one of these names, and where they stand."""
    return [(where, call) for called, where, call in all_calls() if called in names]


def test_every_error_says_what_to_do_or_what_was_expected():
    errors = calls("UserError")
    assert len(errors) > 200
    mute = [where for where, call in errors if not {word.arg for word in call.keywords} & {"fix", "expected"}]
    assert mute == []


def test_a_command_ends_in_one_place():
    """All but the exit codes that are no error: verify found something, a run was stopped, the command's own."""
    ends = {where.partition(":")[0] for where, _ in calls("exit", "SystemExit", "_exit")}
    assert {where for where in ends if not where.startswith("bench/")} == {
        "pipeline/__main__.py",
        "pipeline/labels/verify.py",
        "pipeline/system/interrupt.py",
        "pipeline/system/signals.py",
    }


@settings(deadline=None, max_examples=40)
@given(QUOTED, QUOTED, QUOTED, QUOTED)
@example("a\nb", "\x1b[2J", "\udcff", "é")
def test_a_line_is_short_and_printable_whatever_it_quotes(what, found, expected, fix):
    line = str(UserError(what, found=found, expected=expected, fix=fix))
    assert line.isprintable() and len(line) < 10 * 2400  # an escape of one character has ten at the most
    plain = str(UserError(what[:100] + "x", found=1, fix="y"))
    assert plain.endswith("; found 1; fix: y")


def test_what_does_not_fit_loses_its_middle():
    line = str(UserError("w" * 999, found="f" * 999, expected="e" * 999, fix="begin" + "x" * 999 + "end"))
    assert len(line) < 2400 and "; fix: begin" in line and line.endswith("end") and " … " in line


class OutOfMemoryError(RuntimeError):
    """As PyTorch's."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more"), "fix: take a smaller --batch"),
        (MemoryError(), "fix: take a smaller --batch"),
        (PermissionError(13, "Permission denied", "x"), "Permission denied; found x; fix: check path and space"),
    ],
)
def test_a_limit_of_the_machine_is_one_line(capsys, monkeypatch, error, said):
    monkeypatch.setattr(evaluate, "run", Mock(side_effect=error))
    code, _, err = command(capsys, "evaluate", "--data", "d", "--model", "m")
    assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1
