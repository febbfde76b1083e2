"""`pipeline bench claims`: what the paper claims, tried on small students over seeds.

    losses      ce, kd, ccd and its fair control ccd-mean, with JDA and on originals alone (a)
    views       1, 2, 4 … views that come again, against one per epoch
    long        one view and all, for 1 and 3 times the epochs
    policy      originals alone, two crops, a rotation, JDA of several probabilities, and near: without operations that
                leave the domain (a)
    few-shot    the share of the training samples (d)
    temperature T of 1, 2 and 4
    teacher     one that was trained with JDA, against one without (b)
    others      dkd, dist and others, with JDA pairs and on originals alone (e)
    methods     every --loss that learns from stored logits, against kd and ccd (e)
    fraction    the share of augmented views (c)
    time        1, 3 and 10 times the epochs, on a quarter of the samples
    operations  each operation of the policy by itself

Letters are those of the paper's claims. A setting that does not say otherwise has the teacher without JDA, the whole
policy, all samples and as many augmented views as original ones. All students of a seed share initial weights; those
of as many samples also order and number of steps. A setting that several studies ask for is trained once. `losses` and
`views` get all seeds, the other studies at most three. They run in the order in which they are asked for, the seeds
from the fourth on at the end.

Without `--data` it is Fashion-MNIST where Debian's package `dataset-fashion-mnist` is installed, else the digits;
`--teacher lite0 --data DIR --val DIR` takes photographs, on which students are judged by how often their top class is
the teacher's and by KL(teacher ‖ student). `bench.claims.data` has what is chosen for each. `--samples` is how many
images students train on.

Differences are taken within a seed. Their test is exact: p is the share of the 2^n choices of their signs whose mean is
as far from 0 (two-sided, not corrected for the number of comparisons). With five seeds it is at least 2^(1-n) = 0.0625.

What seeds do not vary: the teachers (one each), the views and labels (one store each), which samples, and those to
validate on. A difference of two teachers is therefore one of these two. Teachers have seen all samples, and few-shot
students take fewer steps. Where half the views are augmented the network sees two per sample and step, at other shares
fewer, and one at 0 % and 100 %; "two crops" tells what that alone does. Labels are made for the lowest T tried.

Finished students are kept in WORK/claims/students.json under a hash of all they depend on; an interrupted one resumes.
Students run side by side in processes with one thread of torch each, whatever the machine.
"""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import harness
from bench.claims import photographs, processes
from bench.claims.cost import expected
from bench.claims.data import Trial, key, pool, prepared, trial
from bench.claims.differences import arm, compared
from bench.claims.processes import Job, Trained
from bench.claims.report import MEASURES, plot, show
from bench.claims.studies import FEW, FULL, JDA, STUDIES, TEMPERATURES, Setting, policy_of, seeds_of, studies
from bench.labels import real
from cache import UserError
from cache.errors import did_you_mean
from pipeline.config import Bench, Evaluate, PrecomputeTeacher, TrainStudent, TrainTeacher
from pipeline.data.index import Index
from pipeline.networks import models
from pipeline.system import machine as machines
from pipeline.system.files import write_atomically
from pipeline.system.terminal import console_out, counted, progress

_MOST_SEEDS = 20  # the test looks at every choice of signs
_RECIPE = {"schedule": "cosine", "eval_epochs": 0}


# --- running it


def run(config: Bench) -> dict:
    """Run the studies of `config.arms`, print tables, write `config.json` and the plots of `config.out`."""
    names = _names(config.arms)
    if config.seeds > _MOST_SEEDS:
        raise UserError("--seeds out of range", found=config.seeds, expected=f"1 to {_MOST_SEEDS}")
    machine = machines.describe()
    bench = Workbench.open(config)
    chosen = studies(names, bench.trial.policy, bench.trial.epochs, both="@" not in bench.trial.teacher)
    wanted = seeds_of(chosen, config.seeds)
    with processes.workers() as pool:
        results, tables = bench.train(pool, wanted)
    arms = {str(which): dataclasses.asdict(which) | arm(results[which]) for which in wanted}
    measures = [(measure, suffix) for measure, (suffix, _) in MEASURES.items() if measure in next(iter(arms.values()))]
    for measure, suffix in measures:
        for name, study in chosen.items():
            tables[name + suffix] = [{"setting": str(which)} | arms[str(which)][measure] for which in study.settings]
            tables[f"{name}{suffix}: differences"] = [
                {"comparison": what} | compared(contrast, results, measure)
                for what, contrast in study.contrasts.items()
            ]
    found = harness.document(
        "claims",
        machine=machine,
        options=vars(config) | bench.about(),
        unit="students",
        reference=str(next(iter(wanted))),
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
    trial: Trial
    """As the options have it; its teacher is NAME, which is trained without and with JDA, or NAME@WEIGHTS."""
    whole: Index
    """What teachers learn from."""
    data: Index
    """What students learn from."""
    val: Index

    @classmethod
    def open(cls, config: Bench) -> "Workbench":
        """Raises UserError unless the data set has a train and a val part and all names are known."""
        work = harness.work(config.work).absolute() / "claims"
        chosen = trial(config)
        if chosen.teacher in real.TEACHERS:
            chosen, whole, val = photographs.opened(chosen, config, work)
        else:
            folder = prepared(chosen, config, work)
            whole, val = Index.open(folder, split="train"), Index.open(folder, split="val")
            if whole.path == val.path:
                raise UserError(
                    f"{folder} has no val part", expected=f"{folder}/train and {folder}/val", fix="prepare both"
                )
        models.create(chosen.student, whole.classes)
        return cls(config, work, chosen, whole, pool(whole, chosen.samples, work), val)

    def about(self) -> dict:
        chosen = dataclasses.asdict(self.trial) | {"policy": self.trial.policy.to_config()}
        if "@" in self.trial.teacher:
            chosen["teacher_epochs"] = None
        if not self.trial.teacher_size:
            del chosen["teacher_size"]
        sizes = {"samples": len(self.data.good), "val_samples": len(self.val.good)}
        return chosen | {"teacher_samples": len(self.whole.good)} | sizes | _RECIPE

    @property
    def machine(self) -> dict:
        """Of one process; the loader's threads do not change a pixel."""
        return {"threads": max((self.config.threads or len(os.sched_getaffinity(0))) // processes.PROCESSES, 1)}

    def train(
        self, pool: Executor, wanted: dict[Setting, int]
    ) -> tuple[dict[Setting, list[dict]], dict[str, list[dict]]]:
        """What every seed of every setting came to, and tables of the teachers and their stores."""
        finished = harness.Finished(self.work / "students.json")
        teachers: dict[str, Trained] = {}
        keys: dict[tuple[Setting, int], str] = {}
        jobs: dict[tuple, Job] = {}
        for which, seed in _in_turn(wanted):
            trained, store = ("teacher", which.teacher), ("store", which.teacher, which.policy, which.energy)
            jobs.setdefault(trained, Job(partial(self._teacher, which.teacher)))
            jobs.setdefault(store, Job(partial(self._pass, teachers, *store[1:]), (trained,)))
            make = partial(self._student, teachers, finished, keys, which, seed)
            jobs["student", which, seed] = Job(make, (store,))
        self._announce(jobs)
        tables: dict[str, list[dict]] = {"teachers": [], "stores": []}
        with progress("claims", len(jobs), "networks and stores") as advance:
            for (kind, *what), result in processes.each(pool, jobs):
                note = f"{kind} {what[0]}"
                if kind == "teacher":
                    teachers[what[0]] = result
                    trained = "elsewhere" if "@" in self.trial.teacher else what[0]
                    tables["teachers"].append({"trained": trained, "top1": 100 * result.top1})
                elif kind == "store":
                    tables["stores"].append({"policy": what[1], "teacher": what[0]} | result)
                elif result:
                    mine = keys[what[0], what[1]]
                    finished.put(mine, result)
                    shutil.rmtree(self._folder(mine))
                    note += f": {result['top1']:.2%}"
                advance(1, note, found=result is None)
        return {w: [finished.results[keys[w, seed]] for seed in range(n)] for w, n in wanted.items()}, tables

    def _announce(self, jobs: Mapping[tuple, Job]) -> None:
        counts = Counter(kind for kind, *_ in jobs)
        whole, samples, val = (len(index.good) for index in (self.whole, self.data, self.val))
        hours = expected(jobs, self.trial, whole, samples, val, self.data.classes) / 3600
        kinds = ", ".join(counted(counts[kind], kind) for kind in ("teacher", "store", "student"))
        console_out.print(f"{kinds}: {hours:.2g} hours of a core if none is there yet", highlight=False)

    def _teacher(self, name: str) -> tuple:
        spec, policy = self.trial.teacher, self._policy_file(FULL)
        asked = Evaluate(**self.machine, data=self.val.path, model=spec, policy=policy)
        if "@" in spec:
            return processes.trained, None, asked, self.trial.teacher_size
        recipe = _RECIPE | {
            "epochs": self.trial.teacher_epochs,
            "batch_size": 64,
            "lr": 0.1,
            "warmup_epochs": 0.5,
            "jda": name == JDA,
        }
        out = self.work / f"teacher-{key(self.whole.fingerprint, spec, self.trial.policy.to_config(), recipe)}"
        config = TrainTeacher(
            **self.machine,
            **recipe,
            data=self.whole.path,
            val=self.val.path,
            out=out,
            resume=True,
            teacher=spec,
            policy=policy,
        )
        return processes.trained, config, dataclasses.replace(asked, model=f"{spec}@{out / 'model.safetensors'}")

    def _store(self, teacher: Trained, chosen: str, energy: bool) -> tuple[str, Path]:
        """Key and folder of the labels; those with energies have others, as these cannot be added to a store."""
        policy = policy_of(chosen, self.trial.policy).to_config()
        about = [self.data.fingerprint, teacher.fingerprint, policy, self.trial.epochs, *["energy"] * energy]
        if self.trial.teacher_size:
            about.append(self.trial.teacher_size)
        made = key(*about)
        return made, self.work / f"labels-{made}.zarr"

    def _pass(self, teachers: Mapping[str, Trained], name: str, chosen: str, energy: bool) -> tuple:
        return processes.labelled, PrecomputeTeacher(
            **self.machine,
            data=self.data.path,
            teacher=teachers[name].spec,
            teacher_size=self.trial.teacher_size,
            store=str(self._store(teachers[name], chosen, energy)[1]),
            energy=energy,
            temperature=min(TEMPERATURES),
            views=self.trial.epochs,
            policy=self._policy_file(chosen),
            block_rows=512,
        )

    def _student(
        self, teachers: Mapping[str, Trained], finished: harness.Finished, keys: dict, which: Setting, seed: int
    ) -> tuple | None:
        store, path = self._store(teachers[which.teacher], which.policy, which.energy)
        keys[which, seed] = mine = self._student_key(which, seed, store)
        if mine in finished.results:
            return None
        config = TrainStudent(
            **self.machine,
            **self._recipe(which, seed),
            data=self.data.path,
            val=self.val.path,
            out=self._folder(mine),
            resume=True,
            store=str(path),
        )
        return processes.student, config, photographs.judged_by(self.val)

    def _recipe(self, which: Setting, seed: int) -> dict:
        return {
            **_RECIPE,
            "student": self.trial.student,
            "loss": which.loss,
            "few_shot": which.share,
            "temperature": which.temperature,
            "augmented_fraction": which.fraction,
            "seed": seed,
            "epochs": which.time * self.trial.epochs,
            "batch_size": self.trial.batch_size,
            "lr": self.trial.lr,
            "warmup_epochs": self.trial.warmup_epochs,
            **({"student_views": which.views} if which.views else {}),
        }

    def _student_key(self, which: Setting, seed: int, store: str) -> str:
        start = models.create(self.trial.student, self.data.classes, seed=seed).fingerprint
        return key(store, self.val.fingerprint, start, self._recipe(which, seed))

    def _folder(self, student: str) -> Path:
        return self.work / f"student-{student}"

    def _policy_file(self, chosen: str) -> str:
        text = json.dumps(policy_of(chosen, self.trial.policy).to_config(), indent=1)
        path = self.work / f"policy-{key(text)}.yaml"
        self.work.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
        return str(path)


def _in_turn(wanted: Mapping[Setting, int]) -> list[tuple[Setting, int]]:
    """Settings and seeds in the order of training: what a study has at the least comes first, study by study."""
    runs = [(which, seed) for which, seeds in wanted.items() for seed in range(seeds)]
    return sorted(runs, key=lambda run: run[1] >= FEW)


# --- what is reported


def _names(chosen: str | None) -> list[str]:
    names = list(STUDIES) if chosen is None else list(dict.fromkeys(name.strip() for name in chosen.split(",")))
    for name in names:
        if name not in STUDIES:
            raise UserError(f"unknown arm {name}", fix=did_you_mean(name, STUDIES))
    return names
