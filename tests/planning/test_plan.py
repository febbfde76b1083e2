"""The plan is the arithmetic that docs/plan.md says, on rates that are measured or read from a file nobody trusts."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from support.commands import command, refused

from bench.whole import plan as agreement
from cache import codec as codecs
from cache.codec.fidelity import measure
from pipeline import config
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.planning import plan, rates
from pipeline.planning.plan import Job
from pipeline.planning.rates import Cost, Rates

HOUR = 3600.0
GPU = Rates(
    teacher="cifar/resnet20",
    student="cifar/resnet8",
    classes=10,
    policy="cifar10",
    size=32,
    batch_size=100,
    measured_batch=100,
    precision="fp32",
    decoder="cpu",
    device="cuda",
    hardware="a GPU",
    cores=16,
    data="pictures",
    load=Cost(0.001, 0.008),
    teach=Cost(0.002, 0.0),
    learn=Cost(0.004, 0.0),
    digest=0.0,
    code=0.0,
    check=0.0,
    unpack=0.0,
    fit=0.0,
    image_bytes=100_000.0,
    label_bytes=93.0,
    row_bytes=600.0,
)
CPU = dataclasses.replace(GPU, device="cpu", cores=2)
JOB = Job(images=9_000_000, views=3, epochs=10)  # an epoch at 4 ms a pair: 10 h


def spent(found: plan.Spent) -> tuple[float, str]:
    return round(found.hours, 6), found.bottleneck


def changed(base: Rates = GPU, **changes) -> Rates:
    return dataclasses.replace(base, **changes)


# --- one GPU


def test_on_a_gpu_the_slower_of_loader_and_network_decides():
    assert spent(plan.training(GPU, JOB, 1)) == (100, "student")
    assert spent(plan.training(GPU, JOB, 1, live=True)) == (150, "student")
    slow = changed(load=Cost(0.005, 0.008))
    assert spent(plan.training(slow, JOB, 1)) == (125, "loader")
    assert spent(plan.training(slow, JOB, 1, live=True)) == (150, "student")
    assert spent(plan.training(changed(teach=Cost(0.007, 0)), JOB, 1, live=True)) == (275, "teacher")


def test_loader_and_network_share_the_cores_beside_a_gpu():
    few = changed(cores=2, learn=Cost(0.004, 0.002))  # (8 + 2) ms of CPU on 2 cores: 5 ms
    assert spent(plan.training(few, JOB, 1)) == (125, "loader")


def test_without_a_gpu_loader_and_network_take_turns():
    assert spent(plan.training(CPU, JOB, 1)) == (125, "student")  # 1 + 4 ms
    assert spent(plan.training(CPU, JOB, 1, live=True)) == (175, "student")  # 1 + 2 + 4 ms
    assert spent(plan.training(changed(CPU, load=Cost(0.005, 0.01)), JOB, 1)) == (225, "loader")


def test_decoding_on_the_gpu_takes_its_time():
    assert spent(plan.training(changed(decoder="gpu"), JOB, 1)) == (125, "student")
    assert spent(plan.training(changed(decoder="gpu", load=Cost(0.005, 0)), JOB, 1)) == (225, "loader")


# 27 million pairs at 2 ms are 15 h; 8,192 calibration pairs at 2 ms or as said.
@pytest.mark.parametrize(
    ("changes", "seconds", "calibration", "bottleneck"),
    [
        ({}, 0.002, 0.002, "teacher"),
        ({"fit": 0.01}, 0.002, 0.012, "teacher"),
        ({"code": 0.003}, 0.003, 0.002, "coding"),  # one thread codes, however many cores there are
        ({"digest": 0.04}, 0.003, 0.002, "loader"),  # (8 + 40) ms on 16 cores
        # 1,024 of a block's 8,192 rows or so are decoded again; blocks of 9,000,000 rows are 8,189.3 long.
        ({"check": 0.04}, 0.04 * 1024 / (9_000_000 / 1099), 0.002, "coding"),
    ],
)
def test_what_the_teacher_pass_does_beside_the_teacher(changes, seconds, calibration, bottleneck):
    found = plan.teacher_pass(changed(**changes), JOB, 1)
    assert found.hours == pytest.approx((27_000_000 * seconds + 8192 * calibration) / HOUR)
    assert found.bottleneck == bottleneck


def test_on_a_cpu_codes_and_digests_are_added():
    found = plan.teacher_pass(changed(CPU, code=0.001, digest=0.001), JOB, 1)
    assert found.hours == pytest.approx((27_000_000 * (0.001 + 0.002 + 0.002 / 2) + 8192 * 0.003) / HOUR)


def test_pixels_are_checked_in_a_thousandth_and_in_each_first_batch():
    job = Job(images=10_000, views=3, epochs=10)  # a batch is a hundredth
    found = plan.training(changed(digest=0.1), job, 1)
    assert found.hours == pytest.approx(100_000 * (0.004 + 0.1 * (0.001 + 0.01)) / HOUR)


@pytest.mark.parametrize(("images", "looked"), [(500, 500), (2_000, 1024), (32_000, 2000), (1_000_000, 8192)])
def test_calibration_looks_at_a_sixteenth_within_bounds(images, looked):
    job = Job(images, 1, 1)
    without = plan.teacher_pass(GPU, job, 1).hours
    assert plan.teacher_pass(changed(fit=1.0), job, 1).hours - without == pytest.approx(looked / HOUR)


# --- many GPUs


def test_gpus_divide_the_work_and_storage_does_not_grow_with_them():
    limited = dataclasses.replace(JOB, read_bytes_s=1e8)  # an image a ms
    for gpus, hours, bottleneck in ((1, 100, "student"), (2, 50, "student"), (8, 25, "storage"), (64, 25, "storage")):
        found = plan.training(GPU, limited, gpus, live=False)
        assert found.bottleneck == bottleneck
        labels = 100 * gpus / 1e8 * 90_000_000 / HOUR  # of 93 + 7 bytes a pair, all of them by every process
        assert found.hours == pytest.approx(hours + labels if bottleneck == "storage" else hours)
    assert spent(plan.training(GPU, limited, 64, live=True)) == (25, "storage")
    assert plan.training(GPU, JOB, 64).hours == pytest.approx(100 / 64)


def test_every_process_unpacks_all_labels_of_an_epoch():
    found = plan.training(changed(unpack=0.016), JOB, 64)  # on 16 cores, 1 ms a pair, whatever the share
    assert found.bottleneck == "labels"
    assert found.hours == pytest.approx(90_000_000 * (0.001 + 0.008 / 16 / 64) / HOUR)
    once = plan.training(changed(unpack=0.016), dataclasses.replace(JOB, views=1), 64)  # the plane is kept
    assert once.hours == pytest.approx(90_000_000 * (0.0001 + 0.008 / 16 / 64) / HOUR)
    assert plan.training(changed(CPU, unpack=0.002), JOB, 2).hours == pytest.approx(90_000_000 * 0.0035 / HOUR)


def test_a_teacher_pass_of_seven_blocks_occupies_seven_gpus():
    job = Job(images=50_000, views=1, epochs=1)
    calibration = 3125 * 0.002 / HOUR
    block = 50_000 / 7 * 0.002 / HOUR
    for gpus, turns in ((1, 7), (2, 4), (4, 2), (8, 1), (64, 1)):
        assert plan.teacher_pass(GPU, job, gpus).hours == pytest.approx(turns * block + calibration), gpus


# --- break-even


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("base", [GPU, CPU])
def test_break_even_is_the_first_epoch_and_student_that_cost_less(base, gpus):
    job = Job(images=1_000_000, views=7, epochs=3)
    found = plan.row(base, job, gpus)
    stored, live = (plan.training(base, job, gpus, live=way).hours for way in (False, True))
    once = plan.teacher_pass(base, job, gpus).hours
    epochs = next(n for n in range(1, 1000) if once + n * stored / 3 < n * live / 3)
    students = next(n for n in range(1, 1000) if once + n * stored < n * live)
    assert (found.break_even_epochs, found.break_even_students) == (epochs, students)
    assert epochs >= 7  # a view saves a teacher's look per epoch, and takes one


def test_gpu_hours_count_every_gpu_and_every_student():
    found = plan.row(GPU, dataclasses.replace(JOB, students=3), 4)
    once = 27_000_000 * 0.002 / HOUR  # 3,297 blocks are no multiple of 4
    assert found.stored_gpu_hours == pytest.approx(once * 3300 / 3297 + 4 * 8192 * 0.002 / HOUR + 300)
    assert found.live_gpu_hours == pytest.approx(450)


def test_a_live_teacher_behind_a_slow_loader_costs_nothing_and_never_pays():
    found = plan.row(changed(load=Cost(0.01, 0.0)), JOB, 1)
    assert found.live.hours == found.stored.hours
    assert (found.break_even_epochs, found.break_even_students) == (None, None)


def test_bytes_of_the_jobs():
    assert plan.sizes(GPU, JOB) == {
        "store": 9e6 * 3 * 100,
        "plane": 9e6 * 600,
        "teacher_pass_images": 9e6 * 3 * 1e5,
        "student_images": 9e6 * 10 * 1e5,
        "student_labels_per_gpu": 9e6 * 10 * 100,
    }


# --- the file of rates


def document(**changes) -> dict:
    return {"rates": dataclasses.asdict(GPU) | changes}


def planned(tmp_path, found: object, *more) -> list:
    path = tmp_path / "rates.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    options = {"images": 50_000, "views": 4, "epochs": 8, "policy": "cifar10", "batch-size": 100, "rates": path}
    options |= {"teacher": "cifar/resnet20@whatever.pth", "student": "cifar/resnet8"}
    return ["plan", *[part for name, value in options.items() for part in (f"--{name}", value)], *more]


def test_a_plan_written_is_a_plan_read(tmp_path, capsys):
    out = tmp_path / "plan.json"
    code, printed, _ = command(capsys, *planned(tmp_path, document()), "--json", out)
    assert code == 0
    printed = " ".join(printed.split())
    for said in ("on 1 GPU stored labels cost fewer", "loader 1,000, teacher 500, student 250", "0.11 teacher"):
        assert said in printed
    assert rates.read(out) == GPU
    found = json.loads(out.read_text())
    assert [row["gpus"] for row in found["plan"]] == [1, 2, 4, 8, 16, 32, 64]
    expected = plan.row(GPU, Job(50_000, 4, 8), 4)
    assert found["plan"][2] == dataclasses.asdict(expected)
    assert command(capsys, *planned(tmp_path, document()), "--json", out, "--read-mb-s", 25, "--students", 2)[0] == 0
    expected = plan.row(GPU, Job(50_000, 4, 8, students=2, read_bytes_s=25_000_000), 8)
    assert expected.stored.bottleneck == "storage"
    assert json.loads(out.read_text())["plan"][3] == dataclasses.asdict(expected)


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ("", "cannot parse"),
        ("\x00\xff", "cannot parse"),
        ("[" * 100_000, "cannot parse"),
        ('{"rates": ' + "9" * 5000 + "}", "cannot parse"),
        ("3", "a mapping with the key rates"),
        ("{}", "a mapping with the key rates"),
        ('{"rates": []}', "a mapping of teacher"),
        (json.dumps(document()) + " " * (1 << 20), "more than"),
        (json.dumps({"rates": {k: v for k, v in document()["rates"].items() if k != "unpack"}}), "missing key unpack"),
        (document(more=1), "unknown key 'more'"),
        (document(digest=math.nan), "digest; found nan"),
        (document(digest=math.inf), "digest; found inf"),
        (document(digest=-1e-9), "digest; found -1e-09"),
        (document(digest="1"), "digest; found '1'"),
        (document(digest=True), "digest; found True"),
        (document(digest=None), "digest; found None"),
        (document(digest=1e300), "digest; found 1e+300"),
        (document(code=10**4000), "code; found a number of 13,288 bits"),
        (document(cores=0), "cores; found 0"),
        (document(cores=2.0), "cores; found 2.0"),
        (document(cores=10**12), "cores; found a number of 40 bits"),
        (document(load=0.001), "load; found 0.001"),
        (document(load={"seconds": 1}), "load: missing key cpu_seconds"),
        (document(load={"seconds": 0, "cpu_seconds": 1}), "load: seconds; found 0"),
        (document(learn={"seconds": math.nan, "cpu_seconds": 1}), "learn: seconds; found nan"),
        (document(hardware="a\nb"), "hardware; found 'a\\nb'"),
        (document(hardware="\x1b[31m"), "hardware; found '\\x1b"),
        (document(hardware="x" * 1000), "hardware"),
        (document(hardware=["x"]), "hardware"),
        (document(device="tpu"), "device; found 'tpu', expected cpu or cuda"),
        (document(decoder="eye"), "decoder; found 'eye'"),
        (document(teacher="cifar/resnet56"), "another teacher; found cifar/resnet56, expected cifar/resnet20"),
        (document(student="cifar/resnet20"), "another student"),
        (document(policy="cifar100"), "another policy"),
        (document(size=33), "another size"),
        (document(batch_size=101), "another batch size"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_in_one_line(found, named, tmp_path, capsys):
    assert named in refused(capsys, *planned(tmp_path, found))


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert "none.json" in refused(capsys, *planned(tmp_path, document()), "--rates", tmp_path / "none.json")
    assert "Is a directory" in refused(capsys, *planned(tmp_path, document()), "--rates", tmp_path)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--images", 0], "--images out of range; found 0"),
        (["--images", 10**400], "--images out of range"),
        (["--images", 10**12 + 1], "--images out of range; found 1000000000001, expected 1 to 1,000,000,000,000"),
        (["--views", -1], "--views out of range"),
        (["--epochs", 0], "--epochs out of range"),
        (["--students", 0], "--students out of range"),
        (["--batch-size", 0], "--batch-size out of range"),
        (["--read-mb-s", 0], "--read-mb-s out of range"),
        (["--read-mb-s", "nan"], "--read-mb-s out of range"),
        (["--read-mb-s", "inf"], "--read-mb-s out of range"),
        (["--read-mb-s", "-3"], "--read-mb-s out of range"),
        (["--classes", 11], "another classes"),
        (["--precision", "bf16"], "another precision"),
        (["--policy", "cifar11"], "did you mean cifar10"),
        (["--json", "/nowhere/plan.json"], "no folder"),
    ],
)
def test_bad_values_are_refused_in_one_line(more, named, tmp_path, capsys):
    assert named in refused(capsys, *planned(tmp_path, document()), *more)


def test_images_come_from_somewhere(capsys):
    arguments = ["plan", "--teacher", "cifar/resnet8", "--student", "cifar/resnet8", "--views", 1, "--epochs", 1]
    assert "--images or --data" in refused(capsys, *arguments)


# --- measured


def measured(digits, *more) -> list:
    options = {"data": digits / "train", "policy": POLICY, "views": 2, "epochs": 3, "batch-size": 16}
    options |= {"teacher": "cifar/resnet14", "student": "cifar/resnet8", "device": "cpu"}
    return ["plan", *[part for name, value in options.items() for part in (f"--{name}", value)], *more]


def test_rates_are_measured_and_read_again(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rates, "_SECONDS", 0.05)
    out = tmp_path / "plan.json"
    code, printed, err = command(capsys, *measured(digits, "--json", out, "--threads", 2))
    assert code == 0, err
    assert "machines" in printed and "GPU" not in printed  # there is none
    found = rates.read(out)
    assert (found.teacher, found.classes, found.batch_size, found.cores) == ("cifar/resnet14", 10, 16, 2)
    job = json.loads(out.read_text())["job"]
    assert job == {"images": 180, "views": 2, "epochs": 3, "students": 1, "read_bytes_s": None}
    # A step has three times the teacher's arithmetic on a smaller network; each stage does something.
    assert min(found.load.seconds, found.teach.seconds, found.learn.seconds) > 1e-5
    assert min(found.digest, found.code, found.check, found.unpack, found.fit) > 0
    again = command(capsys, *measured(digits, "--rates", out, "--threads", 2))
    assert again == (0, printed, "")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--teacher", "cifar/resnet9"], "unknown network cifar/resnet9"),
        (["--student", "cifr/resnet8"], "did you mean cifar?"),
        (["--classes", 9], "--data has other classes; found 10, expected 9"),
        (["--teacher", "cifar/resnet14@none.pth"], "none.pth"),
    ],
)
def test_what_cannot_be_measured_is_refused(more, named, digits, capsys):
    assert named in refused(capsys, *measured(digits), *more)


def test_a_batch_on_a_cpu_is_bounded_by_its_pixels(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "_PIXELS", 7 * 32**2)
    options = {"teacher": "cifar/resnet8", "student": "cifar/resnet8", "views": 1, "epochs": 1, "policy": POLICY}
    planned = config.Plan(**options, data=digits / "train", device="cpu")
    stages = rates.Stages(planned, Index.open(digits / "train"), tmp_path)
    found = stages.rates(0.01)
    assert (found.batch_size, found.measured_batch) == (128, 7)
    assert {len(batch.rows) for batch in stages._batches} == {7}


def test_each_gpu_has_its_share_of_the_cores(monkeypatch):
    options = config.Plan(teacher="a", student="b", views=1, epochs=1)
    monkeypatch.setattr(rates.devices, "pick", lambda machine: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(100)))
    assert rates.share_of_cores(options) == 12
    assert rates.share_of_cores(dataclasses.replace(options, threads=5)) == 5
    monkeypatch.setattr(rates.devices, "pick", lambda machine: torch.device("cpu"))
    assert rates.share_of_cores(options) == 100


def test_a_step_that_does_not_fit_the_gpu_is_one_line(digits, capsys, monkeypatch):
    def full(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rates.Stages, "rates", full)
    assert "does not hold a step; found --batch-size 16; fix: take a smaller" in refused(capsys, *measured(digits))


@pytest.mark.slow
def test_simulated_labels_take_what_a_trained_head_s_do():
    """`bench.labels.simulated`'s logits take 42 bytes per vector of 1000 classes at the default budget."""
    logits = rates.simulated(1000)
    fitted = codecs.fit("subspace", logits[:384], kl=0.05)
    assert 35 < measure(fitted, logits[384:], np.arange(128, dtype=np.uint64)).bytes_per_vector < 55


# --- against runs


def test_the_benchmark_compares_what_ran_with_what_was_planned(tmp_path):
    setting = agreement.Setting("digits", POLICY, "cifar/resnet8", "cifar/resnet8", 64)
    rows, used = agreement.compare(setting, tmp_path, 1, 0.01, 0.01)
    assert [(row["run"], row["pairs"]) for row in rows] == [("teacher pass", 360), ("training", 360)]
    assert len(used) == 3
    for row in rows:
        assert row["off %"] == pytest.approx(100 * (row["predicted s"] / row["measured s"] - 1))
        # No agreement is asked for: a pass and an epoch of 360 digits each took some time and were planned to.
        assert 0 < row["predicted s"] < 1000
    early = agreement.mean(*used[:2])
    assert early.teach.seconds == pytest.approx((used[0].teach.seconds + used[1].teach.seconds) / 2)
    per_pair = early.load.seconds + early.teach.seconds + (early.digest + early.code + early.check) / early.cores
    assert rows[0]["predicted s"] == pytest.approx(360 * per_pair)
