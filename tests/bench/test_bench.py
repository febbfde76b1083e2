"""The timing harness counts what it should, and the arms of the loader benchmark do the work they claim."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import command, refused
from support.images import jpeg, pixels
from support.tars import tar_of

from bench import MODULES, TAKES, harness
from bench.harness import Slot
from bench.loader import arms, pillow, suite
from bench.whole import all as all_suites
from cache import UserError
from kernels.jda.ops import Op
from pipeline.config import Bench
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.system import machine as machines


class Clock:
    """Time that passes only when an arm works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def cpu(self) -> tuple[float, dict[str, float]]:
        return 2 * self.now, {"pair": self.now / 2, "loader": 1.0}

    def work(self, seconds: float, items: int) -> Iterator[int]:
        while True:
            self.now += seconds
            yield items

    def measure(self, steps: Iterator[int], warm: int = 0, timed: int = 1) -> Slot:
        return harness.measure(steps, warm=warm, timed=timed, clock=self, cpu=self.cpu)


def test_a_slot_counts_items_wall_time_and_cpu_time():
    clock = Clock()
    slot = clock.measure(clock.work(0.5, 64), warm=3, timed=4)
    assert (slot.items, slot.seconds, slot.cpu_seconds, slot.rate) == (256, 2.0, 4.0, 128.0)
    assert slot.thread_cpu_seconds == {"pair": 1.0, "loader": 0.0}
    assert slot.peak_rss_bytes > 0 and slot.own_bytes > 0


def test_what_lay_ready_before_the_slot_does_not_count():
    clock = Clock()

    def prefetched() -> Iterator[int]:
        yield from (10, 10, 10)
        yield from clock.work(1.0, 10)

    assert clock.measure(prefetched(), warm=3, timed=5).rate == 10


def test_arms_take_turns_and_the_first_round_is_dropped():
    clock, turns = Clock(), []

    def arm(name: str) -> Callable[[], Slot]:
        def slot() -> Slot:
            turns.append(name)
            return clock.measure(clock.work(100.0 if len(turns) <= 2 else 1.0, 1))

        return slot

    slots = harness.compare({"a": arm("a"), "b": arm("b")}, rounds=3)
    assert turns == ["a", "b"] * 4
    assert [[slot.seconds for slot in mine] for mine in slots.values()] == [[1.0] * 3] * 2


def test_ratios_are_taken_within_a_round():
    """A machine that is slower by the round changes both arms' rates, but not their ratio."""
    clock = Clock()
    slowness = (1.0, 2.0, 4.0, 8.0, 16.0)
    slots = {
        name: [clock.measure(clock.work(slow * seconds, 12)) for slow in slowness]
        for name, seconds in (("ours", 1.0), ("other", 3.0))
    }
    found = harness.summarise(slots, "ours")
    assert found["other"]["ratio"] == pytest.approx(dict.fromkeys(("median", "q1", "q3", "min", "max"), 1 / 3))
    assert found["ours"]["rate"] == {"median": 3.0, "q1": 1.5, "q3": 6.0, "min": 0.75, "max": 12.0}
    assert found["other"]["cpu_ms"]["min"] == pytest.approx(1e3 * 2 * 3 / 12)


def test_a_document_is_json_and_names_machine_versions_and_commit(tmp_path, capsys):
    clock = Clock()
    found = harness.document(
        "loader",
        machine=machines.describe(),
        options={"data": tmp_path, "rounds": 1},
        unit="pairs",
        reference="a",
        arms=harness.summarise({"a": [clock.measure(clock.work(1.0, 5))]}, "a"),
        tables={},
    )
    harness.write(tmp_path / "found.json", found)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    versions = found["machine"]["versions"]
    assert {"python", "torch", "numpy", "numba", "pillow", "zarr", "triton"} < versions.keys()
    assert any(name.startswith("nvidia-dali") for name in versions)
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0)) and found["options"]["data"] == str(tmp_path)
    harness.show(found)
    assert "pairs/s" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot write"):
        harness.write(tmp_path / "no" / "found.json", found)


BUSY = "import time; hold = bytearray(b'x') * (96 << 20)\nwhile time.process_time() < 0.3: pass\nprint(); input()"


def test_a_child_process_counts():
    """CPU time and memory of a living child are found; it burns 0.3 s and holds 96 MiB."""
    before, _ = harness.cpu_seconds()
    _, own_before = harness.memory_bytes()
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        child.stdout.readline()
        after, _ = harness.cpu_seconds()
        peak, own = harness.memory_bytes()
        child.stdin.close()
    assert after - before >= 0.29 and own - own_before >= 96 << 20 and peak > own


def test_threads_are_known_by_their_python_names():
    done, leave = threading.Event(), threading.Event()

    def burn() -> None:
        while time.thread_time() < 0.2:
            pass
        done.set()
        leave.wait()

    thread = threading.Thread(target=burn, name="burner_7")
    thread.start()
    done.wait()
    _, threads = harness.cpu_seconds()
    leave.set()
    thread.join()
    assert threads["burner"] >= 0.19


def test_the_profile_adds_up():
    """Threads nobody knows are the rest."""
    threads = {"work": 3.2, "decode()": 1.0, "pair()": 2.0, "read": 0.5, "else": 0.1}
    rows = suite.profile([Slot(500, 3.0, 5.0, threads, 0, 0)] * 2)
    assert [(row["stage"], row["share %"]) for row in rows] == [
        ("decode", 20.0),
        ("pair kernel", 40.0),
        ("reading", 10.0),
        ("rest", 30.0),
        ("total", 100.0),
    ]
    assert rows[-1]["CPU ms/pair"] == 10.0


# --- the arms


def test_the_pillow_arm_makes_the_same_bytes(mixed):
    job = arms.Job(mixed.path, batch_size=16, threads=2)
    other = arms.PillowPairs(job)
    batches = arms.jda_distill(job)
    for step in range(22):  # two epochs of 160 images, and views of a third
        expected, labels = other[step]
        assert torch.equal(next(batches), expected)
        assert len(labels) == expected.shape[1] == 16
    batches.close()


EXACT = {"torchvision": ("posterize", "solarize", "equalize", "invert"), "dali": ("posterize", "solarize", "invert")}


@pytest.mark.parametrize("op", dict.fromkeys(arms.POLICY.table), ids=lambda op: f"{op.name}-{op.magnitude:.3g}")
@pytest.mark.parametrize("stock", EXACT)
def test_the_stock_operations_mean_the_same(op, stock):
    """On a smooth image they are Pillow's but for rounding, interpolation and DALI's own equalize: mean absolute
    differences of up to 1.4 levels are theirs, while a wrong sign, direction or magnitude costs over 4."""
    image = pixels(np.random.default_rng(2), 250, 190)
    both = [np.asarray(pillow.operation(image, op, minus), float) for minus in (False, True)]
    if op == ("color", 0.0):
        return np.testing.assert_array_equal(both[0], image)
    found = {"torchvision": with_torchvision, "dali": with_dali}[stock](image, op)
    distance = min(abs(found - expected).mean() for expected in both)
    assert distance == 0 if op.name in EXACT[stock] else distance < 2


def with_torchvision(image: Image.Image, op: Op) -> np.ndarray:
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return arms._torchvision_op(op)(tensor).permute(1, 2, 0).numpy().astype(float)


def with_dali(image: Image.Image, op: Op) -> np.ndarray:
    from nvidia.dali import fn
    from nvidia.dali.auto_aug.core import signed_bin
    from nvidia.dali.pipeline import pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, enable_conditionals=True)
    def graph():
        source = fn.external_source(source=lambda: [np.array(image)], batch=True, layout="HWC")
        return arms._dali_op(op)(source, magnitude_bin=signed_bin(0))

    with warnings.catch_warnings(record=True):  # its auto_aug calls what it has deprecated
        built = graph()
        built.build()
    return np.array(built.run()[0].as_cpu()[0], float)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """24 JPEGs of 96 x 72."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    members = {}
    for i in range(24):
        members |= {f"{i:02d}.jpg": jpeg(rng, 96, 72), f"{i:02d}.cls": b"%d" % (i % 3)}
    tar_of(folder / "s.tar", members)
    prepare.build(f"webdataset:{folder}/s.tar", folder / "data", classes=3)
    return folder / "data"


@pytest.mark.slow  # a minute for a benchmark's table; that its arms see the same pixels has tests of its own
def test_the_loader_benchmark_runs_every_arm(small, tmp_path, capsys):
    options = ["--rounds", 1, "--pairs", 16, "--batch-size", 8, "--threads", 2]
    code, out, err = command(capsys, "bench", "loader", "--data", small, *options, "--json", tmp_path / "found.json")
    assert code == 0 and all(line.startswith("bench ") for line in err.splitlines()), err  # how far, on a slow machine
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["arms"]) == list(arms.ARMS) and found["reference"] == "jda-distill"
    for name, arm in found["arms"].items():
        assert name in out
        (slot,) = arm["slots"]
        assert slot["items"] == 16 and min(slot["seconds"], slot["own_bytes"], slot["peak_rss_bytes"]) > 0
    threads = found["arms"]["jda-distill"]["slots"][0]["thread_cpu_seconds"]
    assert threads.keys() >= set(suite._STAGES.values())
    assert {row["stage"] for row in found["tables"]["profile"]} >= {"decode", "pair kernel", "rest", "total"}
    calls = {row["call"]: row["ms"] for row in found["tables"]["stages"]}
    assert calls.keys() >= {"Pillow decode", "posterize 4", "rotate 26.67", "equalize", "crop and resize, mean box"}
    assert all(ms > 0 for ms in calls.values())


def test_what_a_user_gets_wrong_is_one_line(small, tmp_path, capsys):
    def line(*more) -> str:
        return refused(capsys, "bench", "loader", *more)

    assert "unknown arm pilow; fix: did you mean pillow?" in line("--data", small, "--arms", "jda-distill,pilow")
    assert "unknown arm ; fix: choose from jda-distill" in line("--data", small, "--arms", "")
    assert "no data set at" in line("--data", tmp_path / "none")
    assert "--rounds out of range; found 0, expected 1 to 1,000,000,000" in line("--rounds", 0)
    assert "--threads out of range" in line("--threads", -1)
    assert "no folder for" in line("--data", small, "--json", tmp_path / "none" / "found.json")
    assert "invalid choice" in refused(capsys, "bench", "loder")


def test_what_is_made_once_has_a_place_without_a_home(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert harness.work(tmp_path) == tmp_path
    assert harness.work(None).is_relative_to(tempfile.gettempdir())


def test_an_option_that_a_suite_ignores_is_refused(capsys):
    said = refused(capsys, "bench", "loader", "--batch-size", 32, "--seeds", 3)
    assert "bench loader has no option --seeds; found 3, expected --arms, --batch-size, --data, --json" in said


@pytest.mark.parametrize("suite", MODULES)
def test_a_suite_takes_what_it_looks_at(suite):
    """Both ways, in its module and the file that chooses its data."""
    fields = {field.name for field in dataclasses.fields(Bench)} - {"suite"}
    takes = set(TAKES[suite].split())
    if suite == "all":
        of_suites = {name for one in all_suites.SUITES for name in TAKES[one].split()}
        assert takes == of_suites
        return
    path = Path(importlib.util.find_spec(MODULES[suite]).origin)
    beside = {"claims": "data.py", "codec-transfer": "real.py"}
    text = path.read_text() + (path.with_name(beside[suite]).read_text() if suite in beside else "")
    looked_at = set(re.findall(r"\b(?:config|options)\.([a-z_]+)", text)) & fields
    assert looked_at == takes


def test_an_arm_that_is_killed_or_cannot_read_is_one_line(small, tmp_path):
    job = arms.Job(small, 8, 1)
    with harness.host() as host:
        killed = host.submit(os._exit, 9)
        with pytest.raises(UserError, match="the process of arm decode was killed; fix: free memory"):
            suite._hosted(host, job, "decode", 0, 1)
        assert killed.exception()
    tar_of(tmp_path / "s.tar", {"0.jpg": jpeg(np.random.default_rng(0), 40, 30), "0.cls": b"0"})
    prepare.build(f"webdataset:{tmp_path}/s.tar", tmp_path / "data", classes=1)
    index = Index.open(tmp_path / "data")
    with (tmp_path / "s.tar").open("r+b") as file:
        file.seek(int(index.records["offset"][0]))
        file.write(bytes(int(index.records["size"][0])))
    message = r"arm dali-conditionals failed; found .*; fix: leave it out by --arms"
    with harness.host() as host, pytest.raises(UserError, match=message):
        suite._hosted(host, arms.Job(tmp_path / "data", 1, 1), "dali-conditionals", 0, 1)


def test_the_synthetic_data_set_is_made_once_and_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_SYNTHETIC", "synthetic:2")
    made = suite._synthetic(tmp_path)
    stamp = (made.path / "index.npy").stat().st_mtime_ns
    assert (suite._synthetic(tmp_path).path / "index.npy").stat().st_mtime_ns == stamp
    (made.path / "dataset.json").write_text("{}")
    assert suite._synthetic(tmp_path).fingerprint == made.fingerprint


def test_the_photograph_of_the_stages_has_its_size(small):
    """Where no image is 500 x 375, one is made."""
    image = Image.open(io.BytesIO(suite._photograph(Index.open(small))))
    assert (image.size, image.mode, image.format) == ((500, 375), "RGB", "JPEG")
