"""What a run tells others while it goes on: `run.json`, TensorBoard, Weights & Biases, and a page."""

import importlib
import json
import math
import sys
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cache import UserError
from pipeline.config import Training
from pipeline.networks.placed import Placed
from pipeline.system import machine, ranks
from pipeline.system.files import write_atomically
from pipeline.training import page

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # by the option that asks for it
_PAGE_S = 1.0  # between pages; one takes milliseconds
_COURSE_S = 300.0  # between drawings of its plots, which take seconds


def describe(network: Placed, about: dict) -> dict:
    """Facts of a run, JSON-safe: command, versions, machine, network."""
    return {
        "command": ["pipeline", *sys.argv[1:]],
        "versions": machine.versions(),
        "device": machine.hardware(network.device) if network.device.type == "cuda" else "cpu",
        "machine": f"{machine.processor()}, {torch.get_num_threads()} threads",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "world": ranks.world(),
        "parameters": sum(parameter.numel() for parameter in network.network.module.parameters()),
        "mean": network.mean,
        "std": network.std,
        **about,
    }


class Writers:
    """As a context; does nothing on other processes than the first."""

    def __init__(self, config: Training, first: bool, facts: dict, records: list[dict]):
        """`records` are those of the run's log, as it grows. Raises UserError if what was asked for is missing."""
        self._out, self._first, self._tensorboard, self._wandb = config.out, first, None, None
        self._records, self._course = records, None
        self._shown, self._drawn = -math.inf, time.monotonic()
        if not first:
            return
        options = (config.out / "config.json").read_bytes()
        self._config, self._facts = json.loads(options), facts
        write_atomically(config.out / "run.json", json.dumps(facts, indent=1, default=str).encode())
        if config.tensorboard:
            writer = _needed("tensorboard")
            self._tensorboard = writer.SummaryWriter(str(config.out / "tensorboard"))
        if config.wandb:
            wandb = _needed("wandb")
            # The same for a resumed run, wherever it lies now; another for a folder of the same name elsewhere.
            run = f"{config.out.name}-{zlib.crc32(options):08x}"
            self._wandb = wandb.init(
                project=config.wandb, id=run, resume="allow", config=self._config, dir=str(config.out)
            )

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def step(self, number: int, record: dict[str, float]) -> None:
        """Scalars after so many steps of the run."""
        self._write(number, {f"step/{name}": value for name, value in record.items()})

    def epoch(self, epoch: int, number: int, record: dict) -> None:
        values = {name: value for name, value in record.items() if isinstance(value, float)}
        values |= {f"val_{name}": value for name, value in record.get("val", {}).items()}
        self._write(number, {f"epoch/{name}": value for name, value in values.items()})
        if self._first and time.monotonic() - self._shown > _PAGE_S:  # so that a killed run has a page too
            self._show(draw=time.monotonic() - self._drawn > _COURSE_S)

    def close(self) -> Path | None:
        """Write the page; its path."""
        return self._show(draw=True) if self._first else None

    def _show(self, draw: bool) -> Path:
        if draw:
            self._course, self._drawn = page.drawn(self._records), time.monotonic()
        path = page.write(self._out, self._config, self._facts, self._records, self._course)
        self._shown = time.monotonic()
        return path

    def _write(self, number: int, values: dict[str, float]) -> None:
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, number)
        if self._wandb:
            self._wandb.log(values, step=number)


def check(config: Training) -> None:
    """Raise UserError unless what the flags ask for is installed."""
    for option in _MODULES:
        if getattr(config, option):
            _needed(option)


def _needed(option: str) -> Any:
    try:
        return importlib.import_module(_MODULES[option])
    except ImportError:
        raise UserError(f"--{option} needs a package", found="not installed", fix=f"pip install {option}") from None
