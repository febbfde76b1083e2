"""What a label format does to a student: accuracy against bytes on disk, of a simulated or a real teacher.

One small student per arm and seed learns from decoded labels alone (no hard labels). Everything but the labels is the
same for all arms of a seed: initial weights, batches, inputs. So differences to the student of exact labels are taken
within a seed, and the standard error is that of the mean of these differences. Each seed has dither keys of its own, as
stores of several seeds have, so the error covers which noise labels happen to have.

- The simulated teacher: 40,000 pairs in 3 views, 1,000 steps of 1,024 pairs. Held-out pairs are fresh draws; accuracy
  is against their true class, of the view that is not augmented, as test sets are.
- `--teacher lite0 --student small --data DIR --val DIR`: a real one on a pair of views of each image, 64 pairs a step,
  judged by how often its top class is the student's too, and by KL(teacher ‖ student), on all of VAL, both views.
  `bench.labels.photographs` makes such data.

Labels are encoded once per view and seed and decoded batch by batch, as a loader would. Bytes on disk are those of
`pack` for the first `CHUNK_PAIRS` pairs of a view, a store's chunk; bytes all told have w and digests with them where a
store keeps these; bytes in memory are the codes'. Peers' codes include what the peer needs to make the view again
(`bench.labels.peers`); other arms need nothing. A finished student is kept in WORK/codec-transfer.json under a hash of
all that it depends on: run again to resume.
"""

import dataclasses
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench import harness
from bench.labels import problems, real, simulated
from bench.labels.arms import ARMS, REFERENCE, Coder, Make, arms, beside_bytes
from bench.labels.problems import Problem
from cache import UserError, philox
from cache.codec.fidelity import divergence
from cache.errors import did_you_mean
from pipeline.config import Bench
from pipeline.system import machine as machines
from pipeline.system.terminal import progress

VIEWS, REAL_VIEWS = 3, 1
PEAK = 3e-3
"""Of Adam's learning rate, which follows one cycle."""
CHUNK_PAIRS = 8192
_SAMPLES = 40_000  # pairs per view, unless asked for otherwise
FIT_PAIRS = 7168
"""Pairs of the first view that a codec may be fitted to: as many as `precompute-teacher` takes of ImageNet-1k."""
_ENCODE_PAIRS = 2048  # at once: encoding takes some float64 copies of the logits


def run(config: Bench) -> dict:
    """Run the comparison, print its table, write `config.json` and the plots of `config.out`; returns the document."""
    options = dataclasses.replace(config, samples=config.samples or _SAMPLES)
    names, makes = _names(options.arms), arms(options.temperature)
    for name, low in (("samples", problems.BATCH), ("steps", 2)):
        if (value := getattr(options, name)) < low:
            raise UserError(f"--{name} out of range", found=value, expected=f"at least {low}")
    machine = machines.describe()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    problem = _problem(options)
    labels = {name: Labels(problem, makes[name]) for name in names}
    done = harness.Finished(harness.work(options.work) / "codec-transfer.json")
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
        options=vars(options) | {"batch": problem.batch, "hidden": problems.HIDDEN, "peak": PEAK},
        unit="students",
        reference=reference,
        arms={
            name: labels[name].sizes(name, options.temperature)
            | summary(students[name], students[reference], problem.judged_by)
            for name in names
        },
        tables={},
    )
    show(found)
    if options.json:
        harness.write(options.json, found)
    if options.out:
        plot(found, options.out)
    return found


# --- what is learnt


def _problem(options: Bench) -> Problem:
    if options.teacher is None:
        return problems.simulation(options.samples, problems.HELD_OUT, VIEWS)
    student, work = options.student or problems.STUDENTS[0], harness.work(options.work)
    return problems.photographs(options.teacher, student, *real.parts(options), REAL_VIEWS, work)


class Labels:
    """An arm's labels of all views, as its codec keeps them; a view of a seed is encoded when first asked for."""

    def __init__(self, problem: Problem, make: Make):
        self.problem = problem
        self.codec = make(problem.logits[0][:FIT_PAIRS].numpy())
        self.share = getattr(self.codec, "share", 1.0)
        """Of the pairs, those that labels are kept of, the same number of each view."""
        self._seed = -1
        self._coded: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # view: codes and keys, of the seed
        self._first = (
            np.empty((0, 0), np.uint8)
            if self.codec is None
            else self._encode(self.codec, 0, problem.dither_keys[0][:CHUNK_PAIRS])
        )

    def _encode(self, coder: Coder, view: int, dither_keys: np.ndarray) -> np.ndarray:
        logits = self.problem.logits[view][: len(dither_keys)].numpy()
        blocks = (slice(at, at + _ENCODE_PAIRS) for at in range(0, len(logits), _ENCODE_PAIRS))
        return np.concatenate([coder.encode(logits[block], dither_keys[block]) for block in blocks])

    def kept(self, index: np.ndarray, view: int) -> np.ndarray:
        """The pairs that a student sees where `index` i64 (B,) was drawn of all: the same, unless they were pruned."""
        if self.share == 1:
            return index
        dither_keys = self.problem.dither_keys[view]
        few = max(1, int(self.share * len(dither_keys)))
        return np.argsort(dither_keys)[:few][index * few // len(dither_keys)]

    def logits(self, view: int, index: np.ndarray, seed: int) -> torch.Tensor:
        """Decoded labels of some pairs, f32 (B, 2, C), with the noise that a store of that seed would have."""
        if self.codec is None:
            return self.problem.logits[view][torch.from_numpy(index)]
        if seed != self._seed:
            self._seed, self._coded = seed, {}
        if view not in self._coded:
            keys = philox.dither_keys(seed, self.problem.dither_keys[view], view)
            self._coded[view] = self._encode(self.codec, view, keys), keys
        return torch.from_numpy(self.codec.decode(*(array[index] for array in self._coded[view])))

    def _decoded(self, pairs: slice) -> torch.Tensor:
        if self.codec is None:
            return self.problem.logits[0][:CHUNK_PAIRS][pairs]
        return torch.from_numpy(self.codec.decode(self._first[pairs], self.problem.dither_keys[0][:CHUNK_PAIRS][pairs]))

    def sizes(self, name: str, temperature: float) -> dict:
        """Bytes per vector in memory, on disk and all told; KL(teacher ‖ labels) at T, None where classes without mass
        make it infinite. Of pruned labels bytes are shared by all vectors, KL is that of the kept ones."""
        row_bytes = disk_bytes = 4.0 * simulated.CLASSES
        if self.codec is not None:
            dither_keys = self.problem.dither_keys[0][: len(self._first)]
            code = self.codec.pack(self._first, dither_keys)
            row_bytes = self.share * self.codec.row_bytes / 2
            disk_bytes = self.share * len(code) / (2 * len(self._first))
        chunk = self.problem.logits[0][:CHUNK_PAIRS].numpy()
        some = slice(-1024, None)  # of the full chunk, pairs that no codec was fitted to
        kl = divergence(chunk[some], self._decoded(some).numpy(), temperature)
        return {
            "row_bytes": row_bytes,
            "disk_bytes": disk_bytes,
            "all_bytes": disk_bytes + beside_bytes(name, chunk),
            "label_kl": kl if kl < 100 else None,
        }

    def key(self, seed: int, options: Bench) -> str:
        """A hash of all that a student of these labels depends on: recipe, codec, and what the codec makes."""
        problem = self.problem
        recipe = [
            len(problem.dither_keys[0]),
            options.steps,
            seed,
            options.teacher,
            options.student,
            options.temperature,
            "keys of a seed",
            PEAK,
            problem.batch,
            problems.HIDDEN,
            len(problem.logits),
            len(problem.held_logits),
        ]
        config = None if self.codec is None else self.codec.config
        digest = hashlib.sha256(json.dumps([recipe, torch.__version__, config], sort_keys=True).encode())
        digest.update(self._first.tobytes() + self._decoded(slice(64)).numpy().tobytes())
        return digest.hexdigest()[:24]


def learn(problem: Problem, labels: Labels, seed: int, options: Bench) -> dict:
    """Teach one student: accuracy and agreement with the teacher in % and KL(teacher ‖ student) at T on held-out pairs,
    seconds it took.

    The loss is T² times the cross-entropy to the labels at T, averaged over the views of a batch.
    """
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = problem.student()
    optimiser = torch.optim.Adam(student.parameters(), PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK, total_steps=options.steps)
    order = np.random.default_rng(seed)
    samples, batch, temperature = len(problem.dither_keys[0]), problem.batch, options.temperature
    per_epoch = samples // batch
    shuffled = np.empty(0, np.int64)
    for step in range(options.steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            shuffled = order.permutation(samples)
        view = epoch % len(problem.logits)
        index = labels.kept(shuffled[at * batch : (at + 1) * batch], view)
        target = torch.softmax(labels.logits(view, index, seed) / temperature, dim=-1)
        said = student(problem.inputs[view][torch.from_numpy(index)])
        loss = -(target * F.log_softmax(said / temperature, dim=-1)).sum(-1).mean() * temperature**2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    student.eval()
    with torch.no_grad():
        said = student(problem.held_inputs)
    hits = (said.argmax(-1) == problem.held_labels).double().mean(0) * 100
    return {
        "accuracy": hits[0].item(),
        "accuracy_augmented": hits[1].item(),
        "agreement": 100 * (said.argmax(-1) == problem.held_logits.argmax(-1)).double().mean().item(),
        "kl": divergence(problem.held_logits.numpy(), said.numpy(), temperature),
        "seconds": time.perf_counter() - start,
    }


# --- what is reported


def summary(students: list[dict], reference: list[dict], judged_by: str = "accuracy") -> dict:
    """Mean and standard deviation over seeds; the mean differences to the reference and their standard errors, paired,
    of what students are judged by, and of KL."""
    found = {
        name: {"mean": statistics.mean(values), "sd": _deviation(values), "seeds": values}
        for name in students[0]
        if (values := [student[name] for student in students])
    }
    for key, name in (("difference", judged_by), ("kl_difference", "kl")):
        differences = [mine[name] - other[name] for mine, other in zip(students, reference, strict=True)]
        error = _deviation(differences)
        se = None if error is None else error / math.sqrt(len(differences))
        found[key] = {"mean": statistics.mean(differences), "se": se, "seeds": differences}
    return found | {"judged_by": judged_by}


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def show(found: dict) -> None:
    """Print the arms of a document, those of most bytes first."""
    students, labels = [], []
    for name, arm in sorted(found["arms"].items(), key=lambda item: -item[1]["disk_bytes"]):
        difference, label_kl, judged = arm["difference"], arm["label_kl"], arm[arm["judged_by"]]
        kl_difference = arm["kl_difference"]
        students.append(
            {
                "arm": name,
                "B/vector": f"{arm['disk_bytes']:,.1f}",
                "all told": f"{arm['all_bytes']:,.1f}",
                f"{arm['judged_by']} %": f"{judged['mean']:.2f}{_spread(judged['sd'])}",
                f"− {found['reference']}": f"{difference['mean']:+.2f}{_spread(difference['se'])}",
                "KL": f"{arm['kl']['mean']:.4f}",
                f"− {found['reference']}'s": f"{kl_difference['mean']:+.4f}{_spread(kl_difference['se'], 4)}",
            }
        )
        kl, seconds = "∞" if label_kl is None else f"{label_kl:.4f}", f"{arm['seconds']['mean']:.0f}"
        labels.append({"arm": name, "B in memory": f"{arm['row_bytes']:,.0f}", "KL": kl, "s/student": seconds})
    options = found["options"]
    title = f"codec-transfer: {options['seeds']} students an arm, T = {options['temperature']:g}"
    harness.show_table(f"{title}, ± sd of a student, ± se of differences", students)
    harness.show_table("codec-transfer: labels", labels)


def _spread(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f" ± {value:.{digits}f}"


def plot(found: dict, out: Path) -> None:
    """Accuracy, or KL from a real teacher, against bytes all told, as OUT/codec-transfer.png and .svg."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    families: dict[str, list[tuple[str, dict]]] = {}
    for name, arm in found["arms"].items():
        families.setdefault(name.split("-")[0].rstrip("0123456789"), []).append((name, arm))
    real = found["arms"][found["reference"]]["judged_by"] == "agreement"
    shown = "kl" if real else "accuracy"
    for family, members in families.items():
        members.sort(key=lambda member: member[1]["all_bytes"])
        x, y = ([arm["all_bytes"] for _, arm in members], [arm[shown]["mean"] for _, arm in members])
        sd = [arm[shown]["sd"] or 0 for _, arm in members]
        line = "-" if family == "subspace" else "none"
        axes.errorbar(x, y, sd, fmt="o", markersize=4, linestyle=line, capsize=2)
        for at, (name, _) in zip(zip(x, y, strict=True), members, strict=True):
            ours = family == "subspace"  # many points close together: their budget alone, below them
            text, place = (name.removeprefix("subspace-"), (-4, -12)) if ours else (name, (4, 3))
            axes.annotate(text, at, textcoords="offset points", xytext=place, fontsize=7)
        if family == "subspace":
            axes.annotate("subspace, by budget", (x[0], y[0]), textcoords="offset points", xytext=(10, 2), fontsize=8)
    reference = found["arms"][found["reference"]][shown]["mean"]
    axes.axhline(reference, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("bytes per vector, all told")
    options = found["options"]
    teacher = options["teacher"] or "simulated"
    what = "KL(teacher ‖ student), nats" if real else "accuracy of the student, %"
    axes.set_ylabel(f"{what} (teacher {teacher}, T = {options['temperature']:g})")
    if real:
        axes.set_yscale("log")
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(out / f"codec-transfer.{kind}", dpi=150)


def _names(chosen: str | None) -> list[str]:
    names: Iterable[str] = ARMS if chosen is None else dict.fromkeys(name.strip() for name in chosen.split(","))
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm {name}", fix=did_you_mean(name, ARMS))
    return list(names)
