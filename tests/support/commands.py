"""Commands run as a user runs them."""

import pytest

from pipeline import cli
from pipeline.system import terminal


def command(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr, on which no slow machine says how far it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "_PLAIN_SECONDS", 3600.0)
        code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments) -> str:
    """The one line on stderr."""
    code, _, err = command(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and err.count("; found ") <= 1 and err.count("; fix: ") <= 1, err
    return err
