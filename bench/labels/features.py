"""What keeping features costs beside keeping logits alone: bytes, and the KL of the logits that they lead to.

    python -m bench.labels.features --data DIR --samples 512 --json FILE

The teacher is EfficientNet-Lite0 on pairs of views at 160 pixels. One code is fitted to the logits, the other to the
pooled features with the head, on the same pairs and for the same budget; both are measured on pairs that neither saw.
"""

import argparse
import dataclasses
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from bench import harness
from bench.labels import real
from cache import codec as codecs
from cache import philox
from cache.codec import Features, features
from cache.codec.fidelity import measure
from pipeline.data.index import Index
from pipeline.networks.teacher import Teacher
from pipeline.system import machine as machines
from pipeline.system.files import write_atomically
from pipeline.system.terminal import progress
from pipeline.views import plan
from pipeline.views.loader import Loader
from pipeline.views.policy import load

BUDGETS = (0.05, 0.01)
"""Nats at T = 4."""
_HELD_OUT = 4  # of so many pairs one measures
_SEED = 0


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.labels.features")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set")
    parser.add_argument("--samples", type=int, default=512, help="pairs to look at, a quarter of which measure")
    parser.add_argument("--teacher", default="lite0", choices=real.TEACHERS)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    options = parser.parse_args(arguments)
    machine = machines.describe()
    index = Index.open(options.data, "train")
    rows = np.sort(np.random.default_rng(_SEED).choice(index.good, options.samples, replace=False))
    logits, given, head, dither_keys = _look(real.network(options.teacher), index, rows)
    results = [row for budget in BUDGETS for row in compared(logits, given, head, dither_keys, budget)]
    for row in results:
        print(json.dumps(row))
    document = harness.document(
        "features",
        machine=machine,
        options=vars(options),
        unit="vector",
        reference="subspace",
        arms={},
        tables={"codes": results},
    )
    write_atomically(options.json, json.dumps(document, indent=1).encode())


def compared(
    logits: np.ndarray, given: np.ndarray, head: dict[str, np.ndarray], dither_keys: np.ndarray, budget: float
) -> list[dict]:
    """Of logits f32 (n, 2, C) and features f32 (n, 2, F), in random order: what each code keeps, in which bytes."""
    cut = len(logits) - len(logits) // _HELD_OUT
    found = []
    for name, coded, more in (("subspace", logits, {}), ("features", given, head)):
        codec = codecs.fit(name, coded[:cut], kl=budget, **more)
        codes = codec.encode(coded[cut:], dither_keys[cut:])
        fidelity = measure(codec, logits[cut:], dither_keys[cut:], codes)
        noise = {}
        if isinstance(codec, Features):
            noise = {"feature noise": features.noise(codec, coded[cut:], codes, dither_keys[cut:])}
        found.append(
            {"code": name, "budget": budget, "bytes in memory": codec.row_bytes / 2, **fidelity.to_json(), **noise}
        )
    return found


def _look(network, index: Index, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Logits, features, the head and dither keys of view 0 of some rows, in random order."""
    policy = load("imagenet")
    policy = dataclasses.replace(policy, base=policy.base.resized(real.SIZE))
    teacher, loader = (
        Teacher(network, policy, torch.device("cpu"), "fp32", features=True),
        Loader(index, policy, threads=1, max_bad=0),
    )
    assert teacher.head
    logits, given, seen = [], [], []
    with (
        closing(loader.batches(plan.requests(index, policy, _SEED, plan.cut(0, rows, 32)))) as batches,
        progress("teacher", len(rows), "pairs") as advance,
    ):
        for batch, said in teacher.answers(batches):
            logits.append(said.logits.numpy())
            given.append(said.coded.numpy())
            seen.append(batch.rows)
            advance(len(batch.rows))
    order = np.random.default_rng(_SEED).permutation(sum(map(len, seen)))
    at = np.concatenate(seen)[order]
    dither_keys = philox.dither_keys(_SEED, index.records["key_hash"][at], 0)
    head = {"weight": teacher.head.weight, "bias": teacher.head.bias}
    return np.concatenate(logits)[order], np.concatenate(given)[order], head, dither_keys


if __name__ == "__main__":
    main()
