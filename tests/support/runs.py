"""What a run of training leaves."""

import json

import torch
from safetensors.torch import load_file

from pipeline.config import TrainStudent


def weights(config: TrainStudent) -> dict[str, torch.Tensor]:
    return load_file(config.out / "model.safetensors")


def assert_same_weights(one: TrainStudent, other: TrainStudent) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def log(config: TrainStudent) -> list[dict]:
    """Records of epochs."""
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" not in record]
