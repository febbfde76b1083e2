"""`pipeline bench claims`: what the paper claims, tried on small students over seeds.

    losses     ce, kd, ccd and its fair control ccd-mean, of a teacher trained without JDA and one trained with it (b)
    fraction   the share of augmented views (c)
    few-shot   the share of the training samples (d)
    policy     originals alone, two crops without an operation, a rotation, JDA of several probabilities (a)
    others     dkd, dist and standardised, with JDA pairs and on originals alone (e)
    views      1, 2, 4 … views that come again, against one per epoch
    operations the policy without operations that leave the domain, and each operation by itself
    temperature, time   T of 1, 2 and 4; 1, 3 and 10 times the epochs on a quarter of the samples

Letters are those of the paper's claims. A setting that does not say otherwise has the teacher without JDA, the whole
policy, all samples and as many augmented views as original ones. All students of a seed share initial weights; those
of as many samples also order and number of steps. A setting that several studies ask for is trained once.

Differences are taken within a seed. Their test is exact: p is the share of the 2^n choices of their signs whose mean is
as far from 0 (two-sided, not corrected for the number of comparisons). With five seeds it is at least 2^(1-n) = 0.0625.

What seeds do not vary: the teachers (one each), the views and labels (one store each) and the samples to validate on.
A difference of two teachers is therefore one of these two. Teachers have seen all samples, in few-shot runs too, and
few-shot students take fewer steps. Where half the views are augmented the network sees two per sample and step, at
other shares fewer, and one at 0 % and 100 %; "two crops" tells what that alone does.

Finished students are kept in WORK/claims/students.json under a hash of all they depend on; an interrupted one resumes.
Students run side by side in processes with one thread of torch each, whatever the machine.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np
import torch

import cache
from bench import harness
from bench.claims.differences import arm, compared
from bench.claims.report import plot, show
from bench.claims.studies import FULL, JDA, PLAIN, STUDIES, Setting, policy_of, studies
from cache import UserError
from cache.errors import did_you_mean
from pipeline import demo
from pipeline.config import Bench, Evaluate, PrecomputeTeacher, TrainStudent, TrainTeacher
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.labels import precompute
from pipeline.networks import models
from pipeline.networks.placed import placed
from pipeline.system import device as devices
from pipeline.system import machine as machines
from pipeline.system.files import write_atomically
from pipeline.system.terminal import progress
from pipeline.training import evaluate, train_student
from pipeline.training import train_teacher as teacher
from pipeline.views import policy as policies
from pipeline.views.policy import Policy

TEACHER_EPOCHS = 20
_PROCESSES = 2
_MOST_SEEDS = 20  # the test looks at every choice of signs
_RECIPE = {"lr": 0.1, "schedule": "cosine", "warmup_epochs": 1, "eval_epochs": 0}


# --- running it


def run(config: Bench) -> dict:
    """Run the studies of `config.arms`, print tables, write `config.json` and the plots of `config.out`."""
    names = _names(config.arms)
    if config.seeds > _MOST_SEEDS:
        raise UserError("--seeds out of range", found=config.seeds, expected=f"1 to {_MOST_SEEDS}")
    machine = machines.describe()
    bench = Workbench.open(config)
    chosen = studies(names, bench.policy, config.epochs, both="@" not in bench.teacher)
    wanted = list(dict.fromkeys(setting for study in chosen.values() for setting in study.settings))
    with _pool() as pool:
        results, teachers = bench.train(pool, wanted)
    arms = {str(which): dataclasses.asdict(which) | arm(results[which]) for which in wanted}
    tables: dict[str, list[dict]] = {"teachers": teachers}
    for name, study in chosen.items():
        tables[name] = [{"setting": str(which)} | arms[str(which)]["top1"] for which in study.settings]
        tables[f"{name}: differences"] = [
            {"comparison": what} | compared(contrast, results) for what, contrast in study.contrasts.items()
        ]
    found = harness.document(
        "claims",
        machine=machine,
        options=vars(config) | bench.about(),
        unit="students",
        reference=str(wanted[0]),
        arms=arms,
        tables=tables,
    )
    show(found)
    if config.out:
        plot(found, config.out)
    if config.json:
        harness.write(config.json, found)
    return found


@dataclass(frozen=True)
class Workbench:
    """Data, networks and the folder that keeps what is made of them."""

    config: Bench
    work: Path
    data: Index
    val: Index
    teacher: str
    """NAME, which is trained without and with JDA, or NAME@WEIGHTS."""
    student: str
    policy: Policy

    @classmethod
    def open(cls, config: Bench) -> "Workbench":
        """Raises UserError unless the data set has a train and a val part and all names are known."""
        work = harness.work(config.work).absolute() / "claims"
        data = config.data or work / "digits"
        if not config.data and not data.exists():
            prepare.build("digits", data)
        index, val = Index.open(data, split="train"), Index.open(data, split="val")
        if index.path == val.path:
            raise UserError(f"{data} has no val part", expected=f"{data}/train and {data}/val", fix="prepare both")
        student = config.student or demo.STUDENT
        models.create(student, index.classes)
        policy = policies.load(config.policy or demo.POLICY)
        return cls(config, work, index, val, config.teacher or demo.TEACHER, student, policy)

    def about(self) -> dict:
        return {
            "data": self.data.path.parent,
            "samples": len(self.data.good),
            "val_samples": len(self.val.good),
            "teacher": self.teacher,
            "student": self.student,
            "policy": self.policy.to_config(),
            "teacher_epochs": None if "@" in self.teacher else TEACHER_EPOCHS,
            **_RECIPE,
        }

    @property
    def machine(self) -> dict:
        """Of one process; the loader's threads do not change a pixel."""
        return {"threads": max((self.config.threads or len(os.sched_getaffinity(0))) // _PROCESSES, 1)}

    def train(self, pool: Executor, wanted: list[Setting]) -> tuple[dict[Setting, list[dict]], list[dict]]:
        """What every seed of every setting came to, and a row per teacher."""
        finished = Finished(self.work / "students.json")
        trained = [PLAIN, JDA] if any(which.teacher == JDA for which in wanted) else [PLAIN]
        stores = list(dict.fromkeys((which.teacher, which.policy) for which in wanted))
        stores += [(name, FULL) for name in trained if (name, FULL) not in stores]
        runs = [(which, seed) for which in wanted for seed in range(self.config.seeds)]
        with progress("claims", len(trained) + len(stores) + len(runs), "networks and stores") as advance:
            specs, top1 = {}, {}
            for name, (spec, found) in _each(pool, {name: self._teacher(name) for name in trained}):
                specs[name], top1[name] = spec, found
                advance(1, f"teacher {name}: {found:.2%}")
            networks = {name: models.create(spec, self.data.classes).fingerprint for name, spec in specs.items()}
            places, passes = {}, {}
            for name, chosen in stores:
                lowest = min((which.temperature for which in wanted if which.policy == chosen), default=4.0)
                about = policy_of(chosen, self.policy).to_config(), self.config.epochs, lowest
                key = self._key(networks[name], *about)
                places[name, chosen] = key, str(self.work / f"labels-{key}.zarr")
                passes[name, chosen] = self._pass(specs[name], chosen, places[name, chosen][1], lowest)
            for which, _ in _each(pool, passes):
                advance(1, f"labels of {which[1]}, teacher {which[0]}")
            todo, keys = {}, {}
            for which, seed in runs:
                key, store = places[which.teacher, which.policy]
                keys[which, seed] = key = self._student_key(which, seed, key)
                if key not in finished.results:
                    todo[which, seed] = _student, self._student(which, seed, store, key)
            advance(len(runs) - len(todo), "students that were finished")
            for at, result in _each(pool, todo):
                finished.put(keys[at], result)
                shutil.rmtree(self._folder(keys[at]))
                advance(1, f"{at[0]}: {result['top1']:.2%}")
        results = {w: [finished.results[keys[w, seed]] for seed in range(self.config.seeds)] for w in wanted}
        rows = []
        for name in trained:
            weight = cache.open(places[name, FULL][1]).load_plane(0).weight
            about = {"trained": "elsewhere" if "@" in self.teacher else name, "top1": 100 * top1[name]}
            rows.append(about | {"mean w": float(np.nanmean(weight)), "sd of w": float(np.nanstd(weight))})
        return results, rows

    def _teacher(self, name: str) -> tuple[Callable, TrainTeacher | None, Evaluate]:
        asked = Evaluate(**self.machine, data=self.val.path, model=self.teacher, policy=self._policy_file(FULL))
        if "@" in self.teacher:
            return _trained, None, asked
        recipe = {**_RECIPE, "epochs": TEACHER_EPOCHS, "batch_size": self.config.batch_size, "jda": name == JDA}
        out = self.work / f"teacher-{self._key(self.teacher, self.policy.to_config(), recipe)}"
        config = TrainTeacher(
            **self.machine,
            **recipe,
            data=self.data.path,
            val=self.val.path,
            out=out,
            resume=True,
            teacher=self.teacher,
            policy=self._policy_file(FULL),
        )
        return _trained, config, dataclasses.replace(asked, model=f"{self.teacher}@{out / 'model.safetensors'}")

    def _pass(self, spec: str, chosen: str, store: str, temperature: float) -> tuple[Callable, PrecomputeTeacher]:
        return _labelled, PrecomputeTeacher(
            **self.machine,
            data=self.data.path,
            teacher=spec,
            store=store,
            temperature=temperature,
            views=self.config.epochs,
            policy=self._policy_file(chosen),
            block_rows=512,
        )

    def _student(self, which: Setting, seed: int, store: str, key: str) -> TrainStudent:
        return TrainStudent(
            **self.machine,
            **self._recipe(which, seed),
            data=self.data.path,
            val=self.val.path,
            out=self._folder(key),
            resume=True,
            store=store,
        )

    def _recipe(self, which: Setting, seed: int) -> dict:
        return {
            **_RECIPE,
            "student": self.student,
            "loss": which.loss,
            "few_shot": which.share,
            "temperature": which.temperature,
            "augmented_fraction": which.fraction,
            "seed": seed,
            "epochs": which.time * self.config.epochs,
            "batch_size": self.config.batch_size,
            **({"student_views": which.views} if which.views else {}),
        }

    def _student_key(self, which: Setting, seed: int, store: str) -> str:
        start = models.create(self.student, self.data.classes, seed=seed).fingerprint
        return self._key(store, self.val.fingerprint, start, self._recipe(which, seed))

    def _folder(self, key: str) -> Path:
        return self.work / f"student-{key}"

    def _policy_file(self, chosen: str) -> str:
        text = json.dumps(policy_of(chosen, self.policy).to_config(), indent=1)
        path = self.work / f"policy-{self._key(text)}.yaml"
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
        return str(path)

    def _key(self, *parts) -> str:
        text = json.dumps([self.data.fingerprint, torch.__version__, *parts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Finished:
    """Results by key, in one file that is whole after a kill."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.results: dict[str, dict] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            self.results = {}

    def put(self, key: str, result: dict) -> None:
        self.results[key] = result
        write_atomically(self.path, json.dumps(self.results, indent=1).encode())


# --- in processes of their own


def _pool() -> Executor:
    return ProcessPoolExecutor(_PROCESSES, get_context("spawn"), initializer=_start)


def _start() -> None:
    """One thread of torch: on a CPU sums depend on their number. A process without its parent ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _each(pool: Executor, jobs: Mapping):
    """(name, result) of every job (function, *arguments) as it ends, failed ones last; only what runs is handed out."""
    running = {}
    todo = iter(jobs.items())
    while True:
        while len(running) < _PROCESSES and (job := next(todo, None)):
            name, (function, *arguments) = job
            running[pool.submit(function, *arguments)] = name
        if not running:
            return
        for future in sorted(wait(running, return_when=FIRST_COMPLETED).done, key=lambda f: f.exception() is not None):
            try:
                yield running.pop(future), future.result()
            except BrokenProcessPool:
                raise UserError("a process was killed", fix="free memory; run again to go on") from None


@contextlib.contextmanager
def _quiet():
    """The one progress bar is the benchmark's."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _trained(config: TrainTeacher | None, asked: Evaluate) -> tuple[str, float]:
    """Train a teacher if it is not there; NAME@WEIGHTS and its top-1 as a share."""
    with _quiet():
        if config and not (config.out / "model.safetensors").exists():
            teacher.run(config)
        index, policy = Index.open(asked.data), policies.load(asked.policy)
        network, device = models.create(asked.model, index.classes), devices.pick(asked)
        there = placed(network, device, "fp32", policy)
        return asked.model, evaluate.evaluate(there, index, policy, asked.batch_size, asked)["top1"]


def _labelled(config: PrecomputeTeacher) -> None:
    with _quiet():
        precompute.run(config)


def _student(config: TrainStudent) -> dict:
    """Of the last epoch: top1, loss, …, as `evaluate` has them."""
    with _quiet():
        return train_student.run(config)["val"]


# --- what is reported


def _names(chosen: str | None) -> list[str]:
    names = list(STUDIES) if chosen is None else list(dict.fromkeys(name.strip() for name in chosen.split(",")))
    for name in names:
        if name not in STUDIES:
            raise UserError(f"unknown arm {name}", fix=did_you_mean(name, STUDIES))
    return names
