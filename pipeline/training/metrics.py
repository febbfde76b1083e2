"""Running means over an epoch, and the log a run leaves behind."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.system import ranks
from pipeline.system.files import write_atomically


class Means:
    """Weighted means of scalars, summed where they live so that no step waits for the device."""

    def __init__(self, state: dict | None = None):
        self.sums: dict[str, torch.Tensor] = dict(state or {})

    def add(self, weight: float, values: Mapping[str, torch.Tensor | float]) -> None:
        """Each name keeps a weight of its own, as not every value comes with every step."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64)
            pair = torch.stack([value * weight, torch.full_like(value, weight)])
            self.sums[name] = self.sums[name].to(value.device) + pair if name in self.sums else pair

    def total(self) -> dict[str, torch.Tensor]:
        """The sums over all processes, on the CPU; a collective call."""
        if ranks.world() == 1:
            return {name: pair.cpu() for name, pair in self.sums.items()}
        names = sorted(set().union(*map(json.loads, ranks.everyone(json.dumps(sorted(self.sums))))))
        if not names:
            return {}
        table = torch.stack([self.sums.get(name, torch.zeros(2, dtype=torch.float64)).cpu() for name in names])
        return dict(zip(names, ranks.total(table), strict=True))


def means(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Sum of weighted values over sum of weights."""
    return {name: float(value / weight) for name, (value, weight) in sums.items() if weight > 0}


class Log:
    """`metrics.jsonl`: lines of steps, which have a `step`, and one of each epoch."""

    def __init__(self, out: Path, epoch: int, step: int, write: bool = True):
        """Continue after `step` steps of `epoch`: lines a killed run wrote beyond its checkpoint are dropped."""
        self.path, self._write = out / "metrics.jsonl", write
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = [record for record in map(_parse, lines) if record]
        end_of_epoch = 1 << 60
        self.records = [r for r in records if (r["epoch"], r.get("step", end_of_epoch)) <= (epoch, step)]
        if write:
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in self.records).encode())

    def write(self, record: dict) -> None:
        self.records.append(record)
        if self._write:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _parse(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None  # the last line of a killed run may be half there
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None
