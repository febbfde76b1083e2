"""`pipeline bench all`: loader, store, kernels and end to end in one go, one JSON file and one page.

Every suite interleaves its arms. `--data` is what loader and students read, `--arms` chooses suites, `--rounds` is for
all of them.
"""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import MODULES, harness
from bench.whole import page as all_page
from cache import UserError
from cache.errors import did_you_mean
from pipeline.config import Bench
from pipeline.system import machine as machines
from pipeline.system.files import write_atomically
from pipeline.system.terminal import console_out

SUITES = {"end-to-end": 15, "loader": 7, "store": 5, "kernels": 7}
"""Rounds, for two cores to need less than twenty minutes."""
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
    machine = machines.describe()
    found: dict[str, Any] = {}
    whole = {}
    for name in names:
        rounds = config.rounds or SUITES[name]
        chosen = dataclasses.replace(config, suite=name, rounds=rounds, arms=None, json=None, out=None)
        found[name] = import_module(MODULES[name]).run(chosen)
        whole = document(machine, config, found)
        harness.write(path, whole)
    page = out / "bench.html"
    write_atomically(page, all_page.render(whole))
    console_out.print(f"page: {page}; figures: {path}", highlight=False)
    return whole


def document(machine: dict, config: Bench, found: dict[str, Any]) -> dict:
    """As `harness.document`, with the suites' own under `suites`."""
    empty = {"unit": "suites", "reference": "", "arms": {}, "tables": {}}
    return harness.document("all", machine=machine, options=vars(config), **empty) | {"suites": found}
