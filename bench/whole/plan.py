"""`pipeline bench plan`: do teacher passes and trainings take the seconds that `pipeline plan` says?

Three small jobs run for real, by the commands' own functions, each beside the rates that the plan would measure:
rates, teacher pass, rates, training, rates. A run is predicted from the mean of the rates before and after it, so that
a machine that drifts changes both. What a run pays once (imports, compiling, opening files, calibration, the first
batches) is no part of a pace and would drown it here: a teacher pass counts by the difference of two lengths, a
training from the end of its first epoch to that of its last.
"""

import contextlib
import dataclasses
import io
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench import harness
from cache import UserError
from pipeline import demo
from pipeline.config import Bench, Plan, PrecomputeTeacher, TrainStudent
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.labels import precompute
from pipeline.networks import models, weights
from pipeline.planning.rates import Rates, measure
from pipeline.system import machine as machines
from pipeline.system.terminal import progress
from pipeline.training import train_student

SECONDS = 22.0  # of each run that is compared
GOAL = 0.15
_STEPS = 5  # of a setting: rates three times, two runs


@dataclass(frozen=True)
class Setting:
    """A small job."""

    source: str
    """Of `pipeline.data.prepare`; of the digits the 360 of the validation part."""
    policy: str
    teacher: str
    student: str
    batch_size: int
    live: bool = False
    """Whether the student learns beside its teacher."""


SETTINGS = {
    "resnet18": Setting("synthetic:128", "imagenet", "timm/resnet18", "timm/resnet18", 16),
    "digits": Setting("digits", demo.POLICY, demo.TEACHER, demo.STUDENT, 64),
    "mobilenetv3-live": Setting(
        "synthetic:128", "imagenet", "timm/mobilenetv3_large_100", "timm/mobilenetv3_small_100", 16, live=True
    ),
}


def run(config: Bench) -> dict:
    """Run the benchmark, print its table and write `config.json`."""
    names = list(dict.fromkeys(config.arms.split(","))) if config.arms else list(SETTINGS)
    if unknown := set(names) - SETTINGS.keys():
        raise UserError(f"unknown arm {min(unknown)}", expected=" or ".join(SETTINGS))
    machine, work = machines.describe(), harness.work(config.work)
    work.mkdir(parents=True, exist_ok=True)
    rows, measured = [], {}
    with progress("plan", _STEPS * len(names), "steps") as advance:
        for name in names:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                found, used = compare(SETTINGS[name], Path(folder), config.threads, SECONDS, advance)
            rows += [{"job": name} | each for each in found]
            measured[name] = [dataclasses.asdict(each) for each in used]
    worst = max(abs(each["off %"]) for each in rows)
    found = harness.document(
        "plan",
        machine=machine,
        options=vars(config) | {"seconds": SECONDS, "goal": GOAL, "settings": measured},
        unit="pairs",
        reference="measured",
        arms={},
        tables={"agreement": rows},
    )
    harness.show_table(f"plan: seconds, predicted and measured; at most {worst:.0f} % off, goal {GOAL:.0%}", rows)
    if config.json:
        harness.write(config.json, found)
    return found


def compare(
    setting: Setting, folder: Path, threads: int, seconds: float, advance=lambda *_: None
) -> tuple[list[dict], list[Rates]]:
    """Rows of one setting, and the rates in the order in which they were measured.

    Runs are made long enough to take about `seconds`, going by the first rates.
    """
    data, network = folder / "data", folder / "teacher.safetensors"
    prepare.build(setting.source, data)
    data = data / "val" if setting.source == "digits" else data
    index = Index.open(data)
    weights.save(models.create(setting.teacher, index.classes, seed=0).module, network)
    teacher = f"{setting.teacher}@{network}"
    asked = Plan(
        teacher=teacher,
        student=setting.student,
        policy=setting.policy,
        batch_size=setting.batch_size,
        views=1,
        epochs=1,
        data=data,
        threads=threads,
    )
    images = len(index.good)

    def rates() -> Rates:
        found = measure(asked)
        advance(1, f"{setting.teacher}: rates")
        return found

    first = rates()
    views = _repeats(seconds, images * first.teach)
    pass_s = _teacher_pass(setting, teacher, data, folder / "labels.zarr", views, threads)
    advance(1, f"{setting.teacher}: teacher pass")
    second = rates()
    epochs = _repeats(seconds, images * (second.live if setting.live else second.stored))
    train_s = _student(setting, teacher, data, folder, epochs, threads)
    advance(1, f"{setting.student}: training")
    third = rates()
    learn = [each.live if setting.live else each.stored for each in (second, third)]
    return [
        _row("teacher pass", views * images, pass_s, (first.teach + second.teach) / 2),
        _row("live training" if setting.live else "training", epochs * images, train_s, sum(learn) / 2),
    ], [first, second, third]


def _row(what: str, pairs: int, measured: float, pair_s: float) -> dict:
    return {
        "run": what,
        "pairs": pairs,
        "measured s": measured,
        "predicted s": pairs * pair_s,
        "off %": 100 * (pairs * pair_s / measured - 1),
    }


def _repeats(seconds: float, each: float) -> int:
    return max(math.ceil(seconds / each), 1)


def _teacher_pass(setting: Setting, teacher: str, data: Path, store: Path, views: int, threads: int) -> float:
    """Seconds of `views` views: what so many more than one take, beyond what one takes."""
    config = PrecomputeTeacher(
        data=data,
        teacher=teacher,
        store=str(store),
        views=1,
        policy=setting.policy,
        batch_size=setting.batch_size,
        threads=threads,
    )

    def seconds(upto: int) -> float:
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            precompute.run(dataclasses.replace(config, views=upto))
        return time.perf_counter() - started

    seconds(1)  # calibration
    short = seconds(2)
    return seconds(3 + views) - short


def _student(setting: Setting, teacher: str, data: Path, folder: Path, epochs: int, threads: int) -> float:
    """Seconds of `epochs` epochs after the first."""
    config = TrainStudent(
        data=data,
        store=str(folder / "labels.zarr"),
        student=setting.student,
        live_teacher=teacher if setting.live else None,
        out=folder / "run",
        epochs=1 + epochs,
        batch_size=setting.batch_size,
        lr=1e-3,
        threads=threads,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train_student.run(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in lines if "step" not in line]
    return ends[-1] - ends[0]
