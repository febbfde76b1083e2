"""`pipeline bench all`: loader, store, kernels and end to end in one go, one JSON file and one page.

Every suite interleaves its arms; here each takes few rounds, so that two cores need less than twenty minutes. Called
by its own name a suite takes more. `--data` is what loader and students read, `--arms` chooses suites.
"""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import all_page, harness
from cache import UserError
from pipeline.checkpoint import write_atomically
from pipeline.config import Bench
from pipeline.report import console_out
from pipeline.suggest import did_you_mean

SUITES: dict[str, dict[str, Any]] = {
    "end-to-end": {"rounds": 9},
    "loader": {"rounds": 5, "pairs": 512},
    "store": {"rounds": 3, "samples": 200_000},
    "kernels": {"rounds": 7},
}
_OUT = Path("benchmark")


def run(config: Bench) -> dict:
    """Run the suites, print their tables, write OUT/bench.html and OUT/bench.json (or `config.json`).

    What is finished is in the JSON file after each suite.
    """
    names = config.arms.split(",") if config.arms else list(SUITES)
    for name in names:
        if name not in SUITES:
            raise UserError(f"unknown suite {name}", expected=", ".join(SUITES), fix=did_you_mean(name, SUITES))
    out = config.out or _OUT
    out.mkdir(parents=True, exist_ok=True)
    path = config.json or out / "bench.json"
    machine = harness.machine()
    found: dict[str, Any] = {}
    for name in names:
        chosen = dataclasses.replace(config, suite=name, arms=None, json=None, out=None, **settings(config, name))
        found[name] = import_module(f"bench.{name.replace('-', '_')}").run(chosen)
        harness.write(path, document(machine, config, found))
    whole = document(machine, config, found)
    page = out / "bench.html"
    write_atomically(page, all_page.render(whole))
    console_out.print(f"page: {page}; figures: {path}", highlight=False)
    return whole


def settings(config: Bench, name: str) -> dict[str, Any]:
    """A suite's own; whatever was asked for is a limit."""
    return {key: min(getattr(config, key) or value, value) for key, value in SUITES[name].items()}


def document(machine: dict, config: Bench, found: dict[str, Any]) -> dict:
    """As `harness.document`, with the suites' own under `suites`."""
    empty = {"unit": "suites", "reference": "", "arms": {}, "tables": {}}
    return harness.document("all", machine=machine, options=vars(config), **empty) | {"suites": found}
