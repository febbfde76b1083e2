"""What a label format does to a student: accuracy against bytes on disk, on the simulated teacher.

One small student per arm and seed learns from decoded labels alone (no hard labels): 40,000 pairs in 3 views, 1,000
steps at T = 4. Everything but the labels is the same for all arms of a seed: initial weights, batches, features. So
differences to the student of exact labels are taken within a seed, and the standard error is that of the mean of
these differences. Held-out pairs are fresh draws; accuracy is against their true class, of the view
that is not augmented, as test sets are.

Labels are encoded once per view and decoded batch by batch, as a loader would. Bytes on disk are those of `pack` for
the first `CHUNK_PAIRS` pairs of a view, a store's chunk; bytes in memory are the row's. Peers' rows include what the
peer needs to make the view again (`bench.labels.peers`); other arms need nothing. A finished student is kept in
WORK/codec-transfer.json under a hash of all that it depends on: run again to resume.
"""

import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench import harness
from bench.labels import peers, simulated
from cache import UserError, codec, philox
from cache.codec.fidelity import divergence
from cache.errors import did_you_mean
from pipeline.config import Bench
from pipeline.system import machine as machines
from pipeline.system.files import write_atomically
from pipeline.system.terminal import progress

TEMPERATURE = 4.0
VIEWS = 3
BATCH = 1024
"""Pairs per step."""
HIDDEN = 256
PEAK = 3e-3
"""Of Adam's learning rate, which follows one cycle."""
HELD_OUT = 8192
"""Pairs to evaluate on."""
CHUNK_PAIRS = 8192
_SAMPLES = 40_000  # pairs per view, unless asked for otherwise
FIT_PAIRS = 4096
"""Pairs of the first view that a codec may be fitted to."""
REFERENCE = "exact"
_ENCODE_PAIRS = 2048  # at once: encoding takes some float64 copies of the logits
_DATA_SEED, _HELD_SEED, _STREAM_SEED = 0, 1, 2


class Coder(Protocol):
    """What an arm needs of a codec."""

    @property
    def row_bytes(self) -> int: ...
    @property
    def config(self) -> dict: ...
    def encode(self, logits: np.ndarray, stream: np.ndarray) -> np.ndarray: ...
    def decode(self, rows: np.ndarray, stream: np.ndarray) -> np.ndarray: ...
    def pack(self, rows: np.ndarray, stream: np.ndarray | None = None) -> bytes: ...


Make = Callable[[np.ndarray], Coder | None]
"""Of logits to fit to, f32 (n, 2, C): the codec, or None for labels as they are."""


def _arms() -> dict[str, Make]:
    """By name.

    -renorm: the kept mass scaled to 1 rather than the rest spread evenly (-uniform: the other way round); -t1: stored
    at T = 1, as most peers do, for a student that learns at T = 4.
    """

    def of(make: Callable[..., Coder], *values, **options) -> Make:
        return lambda logits: make(logits.shape[2], *values, **options)

    arms: dict[str, Make] = {
        REFERENCE: lambda logits: None,
        "fp16": of(peers.Dense),
        "int8": lambda logits: codec.make("int8", classes=logits.shape[2]),
        "int6": of(peers.PerRow, 6),
        "int4": of(peers.PerRow, 4),
    }
    for name, make in (
        ("tinyvit-100", partial(peers.tinyvit, k=100)),
        ("tinyvit-10", partial(peers.tinyvit, k=10)),
        ("apple-10", peers.apple),
        ("fkd-5", peers.fkd),
    ):
        arms |= {name: of(make), f"{name}-renorm": of(make, tail="zero"), f"{name}-t1": of(make, temperature=1.0)}
    arms |= {"distillkit-50": of(peers.DistillKit), "distillkit-50-uniform": of(peers.DistillKit, tail="uniform")}
    arms |= {f"rskd-{draws}": of(peers.Sampled, draws) for draws in (100, 400)}
    return arms | {
        f"subspace-{kl}": partial(codec.fit, "subspace", kl=kl)
        for kl in (0.01, 0.03, 0.04, 0.05, 0.06, 0.1, 0.2, 0.21, 0.4, 1.0)
    }


ARMS = _arms()


def run(config: Bench) -> dict:
    """Run the comparison, print its table, write `config.json` and the plots of `config.out`; returns the document."""
    options = dataclasses.replace(config, samples=config.samples or _SAMPLES)
    names = _names(options.arms)
    for name, low in (("samples", BATCH), ("steps", 2)):
        if (value := getattr(options, name)) < low:
            raise UserError(f"--{name} out of range", found=value, expected=f"at least {low}")
    machine = machines.describe()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    problem = Problem.draw(options.samples, HELD_OUT)
    labels = {name: Labels(problem, ARMS[name]) for name in names}
    done = Finished(options.work)
    students: dict[str, list[dict]] = {name: [] for name in names}
    with progress("codec-transfer", options.seeds * len(names), "students") as advance:
        for seed in range(options.seeds):
            for name in names:
                key = labels[name].key(seed, options)
                students[name].append(
                    done.results.get(key) or done.put(key, learn(problem, labels[name], seed, options))
                )
                advance(1)
    reference = REFERENCE if REFERENCE in names else names[0]
    found = harness.document(
        "codec-transfer",
        machine=machine,
        options=vars(options) | {"batch": BATCH, "hidden": HIDDEN, "peak": PEAK},
        unit="students",
        reference=reference,
        arms={name: labels[name].sizes() | summary(students[name], students[reference]) for name in names},
        tables={},
    )
    show(found)
    if options.json:
        harness.write(options.json, found)
    if options.out:
        plot(found, options.out)
    return found


# --- what is learnt


@dataclass(frozen=True)
class Problem:
    """Training data and fresh data of the simulated teacher; the second axis is original, augmented."""

    features: list[torch.Tensor]
    """Per view, f32 (n, 2, F)."""
    logits: list[torch.Tensor]
    """Per view, f32 (n, 2, C)."""
    streams: list[np.ndarray]
    """Per view, u64 (n,), the dither keys."""
    held_features: torch.Tensor
    held_logits: torch.Tensor
    held_labels: torch.Tensor
    """i64 (m,)."""

    @staticmethod
    def draw(samples: int, held_out: int) -> "Problem":
        """`samples` pairs in `VIEWS` views, and `held_out` in one."""
        teacher = simulated.teacher()
        features, logits, _ = simulated.draw(teacher, samples, VIEWS, _DATA_SEED)
        held_features, held_logits, held_labels = simulated.draw(teacher, held_out, 1, _HELD_SEED)
        keys = np.arange(samples, dtype=np.uint64)
        streams = [philox.stream(_STREAM_SEED, keys, view) for view in range(VIEWS)]
        return Problem(features, logits, streams, held_features[0], held_logits[0], held_labels)


class Labels:
    """An arm's labels of all views, as its codec keeps them; a view is encoded when first asked for."""

    def __init__(self, problem: Problem, make: Make):
        self.problem = problem
        self.codec = make(problem.logits[0][:FIT_PAIRS].numpy())
        self._rows: dict[int, np.ndarray] = {}
        self._first = np.empty((0, 0), np.uint8) if self.codec is None else self._encode(self.codec, 0, CHUNK_PAIRS)

    def _encode(self, coder: Coder, view: int, pairs: int | None = None) -> np.ndarray:
        logits, stream = self.problem.logits[view][:pairs].numpy(), self.problem.streams[view][:pairs]
        blocks = (slice(at, at + _ENCODE_PAIRS) for at in range(0, len(logits), _ENCODE_PAIRS))
        return np.concatenate([coder.encode(logits[block], stream[block]) for block in blocks])

    def logits(self, view: int, index: np.ndarray) -> torch.Tensor:
        """Decoded labels of some pairs, f32 (B, 2, C)."""
        if self.codec is None:
            return self.problem.logits[view][torch.from_numpy(index)]
        if view not in self._rows:
            self._rows[view] = self._encode(self.codec, view)
        return torch.from_numpy(self.codec.decode(self._rows[view][index], self.problem.streams[view][index]))

    def _decoded(self, pairs: slice) -> torch.Tensor:
        if self.codec is None:
            return self.problem.logits[0][:CHUNK_PAIRS][pairs]
        return torch.from_numpy(self.codec.decode(self._first[pairs], self.problem.streams[0][:CHUNK_PAIRS][pairs]))

    def sizes(self) -> dict:
        """Bytes per vector in memory and on disk; KL(teacher ‖ labels) at T, None where classes without mass make it
        infinite."""
        row_bytes = disk_bytes = 4.0 * simulated.CLASSES
        if self.codec is not None:
            stream = self.problem.streams[0][: len(self._first)]
            code = self.codec.pack(self._first, stream)
            row_bytes, disk_bytes = self.codec.row_bytes / 2, len(code) / (2 * len(self._first))
        some = slice(-1024, None)  # of the full chunk, pairs that no codec was fitted to
        truth = self.problem.logits[0][:CHUNK_PAIRS][some].numpy()
        kl = divergence(truth, self._decoded(some).numpy(), TEMPERATURE)
        return {"row_bytes": row_bytes, "disk_bytes": disk_bytes, "label_kl": kl if kl < 100 else None}

    def key(self, seed: int, options: Bench) -> str:
        """A hash of all that a student of these labels depends on: recipe, codec, and what the codec makes."""
        recipe = [options.samples, options.steps, seed]
        recipe += [PEAK, BATCH, HIDDEN, TEMPERATURE, VIEWS, HELD_OUT]
        config = None if self.codec is None else self.codec.config
        digest = hashlib.sha256(json.dumps([recipe, torch.__version__, config], sort_keys=True).encode())
        digest.update(self._first.tobytes() + self._decoded(slice(64)).numpy().tobytes())
        return digest.hexdigest()[:24]


def learn(problem: Problem, labels: Labels, seed: int, options: Bench) -> dict:
    """Teach one student: accuracy in % and KL(teacher ‖ student) at T on held-out pairs, seconds it took.

    The loss is T² times the cross-entropy to the labels at T, averaged over the views of a batch.
    """
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = nn.Sequential(nn.Linear(simulated.FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, simulated.CLASSES))
    optimiser = torch.optim.Adam(student.parameters(), PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK, total_steps=options.steps)
    order = np.random.default_rng(seed)
    samples = len(problem.features[0])
    per_epoch = samples // BATCH
    shuffled = np.empty(0, np.int64)
    for step in range(options.steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            shuffled = order.permutation(samples)
        index, view = shuffled[at * BATCH : (at + 1) * BATCH], epoch % VIEWS
        target = torch.softmax(labels.logits(view, index) / TEMPERATURE, dim=-1)
        said = student(problem.features[view][torch.from_numpy(index)])
        loss = -(target * F.log_softmax(said / TEMPERATURE, dim=-1)).sum(-1).mean() * TEMPERATURE**2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        said = student(problem.held_features)
    hits = (said.argmax(-1) == problem.held_labels[:, None]).double().mean(0) * 100
    return {
        "accuracy": hits[0].item(),
        "accuracy_augmented": hits[1].item(),
        "kl": divergence(problem.held_logits.numpy(), said.numpy(), TEMPERATURE),
        "seconds": time.perf_counter() - start,
    }


class Finished:
    """Results by key, in one file that is whole after a kill."""

    def __init__(self, work: Path | None):
        self.path = harness.work(work) / "codec-transfer.json"
        try:
            self.results: dict[str, dict] = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            self.results = {}

    def put(self, key: str, result: dict) -> dict:
        self.results[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.results, indent=1).encode())
        return result


# --- what is reported


def summary(students: list[dict], reference: list[dict]) -> dict:
    """Mean and standard deviation over seeds; the mean difference to the reference and its standard error, paired."""
    differences = [mine["accuracy"] - other["accuracy"] for mine, other in zip(students, reference, strict=True)]
    found = {
        name: {"mean": statistics.mean(values), "sd": _deviation(values), "seeds": values}
        for name in students[0]
        if (values := [student[name] for student in students])
    }
    error = _deviation(differences)
    found["difference"] = {
        "mean": statistics.mean(differences),
        "se": None if error is None else error / math.sqrt(len(differences)),
        "seeds": differences,
    }
    return found


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def show(found: dict) -> None:
    """Print the arms of a document, those of most bytes first."""
    students, labels = [], []
    for name, arm in sorted(found["arms"].items(), key=lambda item: -item[1]["disk_bytes"]):
        difference, label_kl = arm["difference"], arm["label_kl"]
        students.append(
            {
                "arm": name,
                "B/vector": f"{arm['disk_bytes']:,.1f}",
                "accuracy %": f"{arm['accuracy']['mean']:.2f}{_spread(arm['accuracy']['sd'])}",
                f"− {found['reference']}": f"{difference['mean']:+.2f}{_spread(difference['se'])}",
                "KL": f"{arm['kl']['mean']:.4f}",
            }
        )
        kl, seconds = "∞" if label_kl is None else f"{label_kl:.4f}", f"{arm['seconds']['mean']:.0f}"
        labels.append({"arm": name, "B in memory": f"{arm['row_bytes']:,.0f}", "KL": kl, "s/student": seconds})
    title = f"codec-transfer: {found['options']['seeds']} students an arm"
    harness.show_table(f"{title}, ± sd of accuracy, ± se of the difference", students)
    harness.show_table("codec-transfer: labels", labels)


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


def plot(found: dict, out: Path) -> None:
    """Accuracy against bytes on disk, as OUT/codec-transfer.png and .svg."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    families: dict[str, list[tuple[str, dict]]] = {}
    for name, arm in found["arms"].items():
        families.setdefault(name.split("-")[0].rstrip("0123456789"), []).append((name, arm))
    for family, members in families.items():
        members.sort(key=lambda member: member[1]["disk_bytes"])
        x, y = ([arm["disk_bytes"] for _, arm in members], [arm["accuracy"]["mean"] for _, arm in members])
        sd = [arm["accuracy"]["sd"] or 0 for _, arm in members]
        line = "-" if family == "subspace" else "none"
        axes.errorbar(x, y, sd, fmt="o", markersize=4, linestyle=line, capsize=2)
        for at, (name, _) in zip(zip(x, y, strict=True), members, strict=True):
            ours = family == "subspace"  # many points close together: their budget alone, below them
            text, place = (name.removeprefix("subspace-"), (-4, -12)) if ours else (name, (4, 3))
            axes.annotate(text, at, textcoords="offset points", xytext=place, fontsize=7)
        if family == "subspace":
            axes.annotate("subspace, by budget", (x[0], y[0]), textcoords="offset points", xytext=(10, 2), fontsize=8)
    reference = found["arms"][found["reference"]]["accuracy"]["mean"]
    axes.axhline(reference, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("bytes per vector on disk")
    axes.set_ylabel("accuracy of the student, % (simulated teacher)")
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(out / f"codec-transfer.{kind}", dpi=150)


def _names(chosen: str | None) -> list[str]:
    names: Iterable[str] = ARMS if chosen is None else dict.fromkeys(name.strip() for name in chosen.split(","))
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm {name}", fix=did_you_mean(name, ARMS))
    return list(names)
