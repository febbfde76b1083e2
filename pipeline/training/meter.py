"""What a run measures of itself: times of a step's phases, means over an epoch and since the last record, rates."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.system import ranks
from pipeline.training.metrics import Means, means


@dataclass
class Clock:
    """Seconds of the phases of a step, where the device is waited for to know them."""

    device: torch.device
    on: bool
    times: dict[str, float] = field(default_factory=dict)
    _at: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> float:
        """Seconds since the last lap, or since the clock was made; without the device's own work unless it is `on`."""
        if self.on and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # not the loader's
        now = time.perf_counter()
        seconds, self._at = now - self._at, now
        if self.on:
            self.times[name] = self.times.get(name, 0.0) + seconds
        return seconds


class Meter:
    """Everything is summed where it lives: only a record waits for the device."""

    def __init__(self, sums: dict[str, Tensor] | None = None):
        """`sums` are those of the epoch up to here, as `sums` gave them."""
        self._epoch = Means(sums)
        self._begin()

    def _begin(self) -> None:
        self._recent, self._since, self._samples, self._waits = Means(), time.perf_counter(), 0, 0.0

    def add(self, found: Iterable[tuple[float, Mapping[str, Tensor | float]]], samples: int, waited_s: float) -> None:
        """A step: (weight, values), its samples, and how long it waited for them."""
        for weight, values in found:
            self._epoch.add(weight, values)
            self._recent.add(weight, values)
        self._samples += samples
        self._waits += waited_s

    def record(self, times: dict[str, float]) -> dict[str, float]:
        """Means and rates since the last record, over all processes. `times` are those of the last step's phases."""
        elapsed = time.perf_counter() - self._since
        wait = {"wait_share": self._waits / elapsed}
        self._epoch.add(1.0, {f"times.{name}": seconds for name, seconds in times.items()} | wait)
        self._recent.add(1.0, {"images_per_s": self._samples * ranks.world() / elapsed, **wait})
        found = means(self._recent.total())
        self._begin()
        return found

    def sums(self) -> dict[str, Tensor]:
        """The epoch's up to here, of all processes, for a checkpoint."""
        return self._epoch.total()

    def close_epoch(self) -> dict:
        """Means of the epoch, the phases' times under "times"; the next one begins."""
        found = means(self._epoch.total())
        self._epoch = Means()
        self._begin()
        times = {name.removeprefix("times."): value for name, value in found.items() if name.startswith("times.")}
        return {name: value for name, value in found.items() if not name.startswith("times.")} | {"times": times}
