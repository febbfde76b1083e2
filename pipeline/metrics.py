"""Running means over an epoch, and the log a run leaves behind."""

import json
from pathlib import Path

import torch

from pipeline.checkpoint import write_atomically


class Means:
    """Sample-weighted means of scalars, summed where they live so that no step waits for the device."""

    def __init__(self, state: dict | None = None):
        self.sums: dict[str, torch.Tensor] = dict(state or {})

    def add(self, samples: int, values: dict[str, torch.Tensor | float]) -> None:
        for name, value in {"samples": 1.0, **values}.items():
            value = torch.as_tensor(value, dtype=torch.float64) * samples
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value

    def result(self) -> dict[str, float]:
        samples = float(self.sums.get("samples", 1.0))
        return {name: float(value) / samples for name, value in self.sums.items() if name != "samples"}


class Log:
    """`metrics.jsonl`: one line per epoch, each with its `epoch`."""

    def __init__(self, out: Path, epoch: int):
        """Continue before `epoch`: lines a killed run wrote beyond its checkpoint are dropped."""
        self.path = out / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.records = [record for record in map(_parse, lines) if record and record["epoch"] < epoch]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in self.records).encode())

    def write(self, record: dict) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _parse(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None  # the last line of a killed run may be half there
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None
