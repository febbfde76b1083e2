"""What a log file gets to see of a long command."""

import contextlib
import io
import queue
import threading

import pytest

from pipeline.system import terminal


class Log(io.TextIOBase):
    """A file whose lines can be waited for."""

    def __init__(self):
        self.lines: queue.Queue = queue.Queue()

    def write(self, text: str) -> int:
        self.lines.put(text)
        return len(text)

    def line(self) -> str:
        return self.lines.get(timeout=60).rstrip("\n") or self.line()


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(terminal, "_PLAIN_SECONDS", 0.01)


def test_a_log_gets_lines_without_a_step_and_while_a_part_is_silenced():
    with contextlib.redirect_stderr(log := Log()), terminal.progress("train", 1234, "steps", 100) as advance:
        assert log.line().startswith("train 100/1,234 steps after ")
        with contextlib.redirect_stderr(io.StringIO()):
            advance(1)
            advance(2, "loss 0.5")
            while "loss" not in (line := log.line()):
                assert line.startswith("train 10")
            assert line.startswith("train 103/1,234 steps after ") and line.endswith(" to go: loss 0.5")


def test_what_was_found_done_says_nothing_of_the_rate():
    with contextlib.redirect_stderr(log := Log()), terminal.progress("claims", 20, "students") as advance:
        for count in (5, 3):
            advance(count, found=True)
        while not (line := log.line()).startswith("claims 8/20"):
            pass
        assert "to go" not in line
        for _ in range(2):
            advance(1)
        while not (line := log.line()).startswith("claims 10/20"):
            pass
        assert line.endswith(" to go")


def test_other_processes_of_a_job_and_ended_work_say_nothing():
    before = threading.active_count()
    with contextlib.redirect_stderr(log := Log()):
        with terminal.progress("train", 10, "steps", show=False) as advance:
            advance(1)
            assert threading.active_count() == before and log.lines.empty()
        with terminal.progress("train", 10, "steps"):
            log.line()
        assert threading.active_count() == before


def test_a_note_is_said_once_and_by_the_first_process(capsys, monkeypatch):
    terminal.note("took the average of a")
    terminal.note("took the average of a")
    monkeypatch.setenv("RANK", "1")
    terminal.note("took the average of b")
    assert capsys.readouterr().err == "note: took the average of a\n"


def test_one_is_no_plural():
    assert [terminal.counted(count, "block") for count in (0, 1, 2000)] == ["0 blocks", "1 block", "2,000 blocks"]
