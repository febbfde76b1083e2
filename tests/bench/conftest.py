"""What the benchmarks' tests share."""

import pytest

from bench.claims import cost


@pytest.fixture(autouse=True)
def a_step_is_timed_once(monkeypatch):
    """A second of steps each time would be a third of the studies' tests."""
    monkeypatch.setattr(cost, "_SECONDS", 0.0)
