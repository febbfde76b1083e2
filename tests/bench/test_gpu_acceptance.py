"""What a GPU machine has to show: parts fail alone, nothing found is lost, and targets are judged as stated."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from bench import gpu_acceptance, gpu_steps
from bench.gpu_acceptance import Part, run_limited, run_parts
from bench.kernels import suite as kernels
from cache import UserError
from pipeline import cli
from pipeline.config import Bench, Prepare

WRITE = "import json, pathlib, sys\npathlib.Path(sys.argv[1]).write_text(json.dumps({'%s': [{'a': 1}]}))\n"


def part(folder: Path, name: str, code: str, needs: tuple[str, ...] = (), limit_s: float = 600) -> Part:
    """A tiny process that is told where to write."""
    found = folder / f"{name}.json"
    return Part("A", name, (sys.executable, "-c", code, str(found)), limit_s, found, gpu_acceptance.read_tables, needs)


@pytest.fixture
def limit(monkeypatch):
    """limit(ready): time is up for a process as soon as the file `ready` is there."""
    wait = subprocess.Popen.wait

    def expires_with(ready: Path, limit_s: float = 500) -> float:
        def waits(process, timeout: float | None = None):
            if timeout != limit_s:
                return wait(process, timeout)
            while not ready.exists():
                assert process.poll() is None, "it left before"
                os.sched_yield()
            raise subprocess.TimeoutExpired(process.args, limit_s)

        monkeypatch.setattr(subprocess.Popen, "wait", waits)
        return limit_s

    return expires_with


# --- parts


def test_a_part_that_fails_keeps_what_it_found_and_stops_no_other(tmp_path):
    saved = []
    rows = run_parts(
        [
            part(tmp_path, "bad", WRITE % "half" + "print('on its way')\nsys.exit('last words')"),
            part(tmp_path, "good", WRITE % "whole"),
        ],
        tmp_path,
        600,
        lambda tables: saved.append(json.loads(json.dumps(tables))),
    )
    assert [(row["part"], row["ok"]) for row in rows] == [("bad", "no"), ("good", "yes")]
    first, *lines = rows[0]["what"].splitlines()
    assert first == "exit code 1" and sorted(lines[-2:]) == ["last words", "on its way"]
    assert [len(tables["parts"]) for tables in saved] == [1, 2]  # after each part
    assert saved[0]["half"] == [{"a": 1}] and "whole" not in saved[0]
    assert saved[1]["half"] == saved[1]["whole"] == [{"a": 1}]


def test_a_part_without_a_result_fails_even_where_an_earlier_run_left_one(tmp_path):
    none, broken = (
        part(tmp_path, "none", ""),
        part(tmp_path, "broken", "open(__import__('sys').argv[1], 'w').write('{')"),
    )
    none.found.write_text('{"stale": []}')
    saved = []
    rows = run_parts([none, broken], tmp_path, 600, saved.append)
    assert [row["ok"] for row in rows] == ["no", "no"]
    assert "no result: FileNotFoundError" in rows[0]["what"] and "no result: JSONDecodeError" in rows[1]["what"]
    assert saved[-1].keys() == {"parts"}


def test_a_part_out_of_time_is_killed_with_its_children(tmp_path, monkeypatch, limit):
    """Shell and child ignore SIGINT; the child holds the pipe open as long as it lives, which is a minute."""
    monkeypatch.setattr(gpu_acceptance, "_GRACE_S", 0.05)
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    script = "trap '' INT; exec 3>alive; sleep 60 & echo '{\"half\": []}' >tmp; mv tmp found; echo late; wait"
    found = tmp_path / "found"
    command = ("sh", "-c", f"cd {tmp_path}; {script}")
    slow = Part("A", "slow", command, limit(found), found, gpu_acceptance.read_tables)
    saved = []
    rows = run_parts([slow, part(tmp_path, "good", WRITE % "whole")], tmp_path, 10_000, saved.append)
    assert [row["ok"] for row in rows] == ["no", "yes"]
    assert rows[0]["what"].startswith("out of time after 500 s") and rows[0]["what"].endswith("late")
    assert saved[-1]["half"] == []
    assert select.select([reader], [], [], 30)[0] and os.read(reader, 1) == b""  # nobody holds it any more
    os.close(reader)


def test_children_that_a_part_leaves_behind_are_killed(tmp_path):
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    assert run_limited(("sh", "-c", f"exec 3>{tmp_path}/alive; sleep 60 & exit 7"), tmp_path / "log", 600) == 7
    assert select.select([reader], [], [], 30)[0] and os.read(reader, 1) == b""
    os.close(reader)


# What children of a shell's background job inherit; pytest itself takes three seconds to start for each.
@pytest.mark.parametrize("handler", [signal.SIG_IGN, pytest.param(signal.default_int_handler, marks=pytest.mark.slow)])
def test_tests_out_of_time_still_report_those_that_ran(tmp_path, limit, handler, request):
    before = signal.signal(signal.SIGINT, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    ready, report = tmp_path / "ready", tmp_path / "tests.xml"
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, signal\n"
        "def test_quick(): pass\n"
        "def test_wrong(): assert 1 + 1 == 3, 'sum'\n"
        f"def test_slow():\n    pathlib.Path({str(ready)!r}).touch()\n    signal.pause()\n"
    )
    options = ("-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), f"--junitxml={report}")
    command = (sys.executable, "-m", "pytest", str(tmp_path), *options)
    assert run_limited(command, tmp_path / "log", limit(ready)) is None
    what, tables = gpu_acceptance.read_tests(report)
    assert what == "1 passed, 1 failed, 0 skipped"
    (failure,) = tables["failures"]
    assert failure["test"].endswith("test_slow::test_wrong") and failure["said"].startswith("AssertionError: sum")


def test_without_a_package_or_time_a_part_is_not_run(tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    rows = run_parts([part(tmp_path, "lame", code, ("nvidia.daly",))], tmp_path, 600, lambda tables: None)
    assert [(row["ok"], row["what"]) for row in rows] == [("not run", "not run: nvidia-daly is not installed")]
    rows = run_parts([part(tmp_path, "late", code)], tmp_path, gpu_acceptance._GRACE_S, lambda tables: None)
    assert [(row["ok"], row["what"]) for row in rows] == [("no", "not run: no time is left")]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("needs", "ending"), [((), "sys.exit(3)"), (("no_such_module",), "")])
def test_the_json_is_there_after_each_part_and_a_failure_decides_the_exit_code(
    tmp_path, monkeypatch, capsys, needs, ending
):
    found = tmp_path / "found.json"
    reads = f"assert json.load(open({str(found)!r}))['tables']['parts'][0]['part'] == 'first'\n"
    fakes = [
        part(tmp_path, "first", WRITE % "one"),
        part(tmp_path, "second", WRITE % "two" + reads),
        part(tmp_path, "third", WRITE % "three" + ending, needs),
    ]
    monkeypatch.setattr(gpu_acceptance, "_parts", lambda *_: fakes)
    config = Bench(suite="gpu-acceptance", json=found, out=tmp_path / "out")
    if ending:
        with pytest.raises(SystemExit) as stop:
            gpu_acceptance.run(config)
        assert stop.value.code == 1
    else:
        gpu_acceptance.run(config)
    document = json.loads(found.read_text())
    parts = {row["part"]: row["ok"] for row in document["tables"]["parts"]}
    assert parts == {"first": "yes", "second": "yes", "third": "no" if ending else "not run"}
    assert document["suite"] == "gpu-acceptance" and "nvidia_smi" in document["machine"]
    assert document["tables"]["two"] == [{"a": 1}] and document["tables"]["verdicts"]
    shown = capsys.readouterr().out
    assert "second: 1 rows" in shown and "stored / ce" in shown


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("given", [None, Path("/set")])
def test_every_command_is_one_that_the_command_line_takes(tmp_path, gpu, given):
    parts = gpu_acceptance._parts(tmp_path, given, tmp_path / "new" / "data", gpu)
    names = {
        "A": ["once", "tests", "pixels", "losses"],
        "B": ["data", "decoders", "rates", "whole", "end-to-end"],
        "C": ["compiled", "data", "waiting"],
    }
    for call, expected in names.items():
        mine = [part for part in parts if part.call == call]
        assert [part.name for part in mine] == [name for name in expected if name != "data" or not given]
        # What they may take together leaves time to write what was found.
        assert sum(part.limit_s for part in mine) <= gpu_acceptance.CALLS[call] - gpu_acceptance._GRACE_S
    schemas = {"bench": Bench, "prepare": Prepare}
    for each in parts:
        if each.command[1:3] == ("-m", "pipeline"):
            command, *arguments = each.command[3:]
            options = cli._parse(command, schemas[command], arguments)
            if command == "bench":
                assert options.json == each.found and options.data == (given or tmp_path / "new" / "data")
        elif each.name != "tests":
            code = each.command[2]
            compile(code, each.name, "exec")
            assert callable(getattr(gpu_steps, re.search(r"gpu_steps[.](\w+)", code)[1])), code
            assert ("TRITON_INTERPRET" in code) != gpu
        assert each.call != "A" or not each.needs  # DALI is not there yet
    (tests,) = (part for part in parts if part.name == "tests")
    files = {Path(word).name for word in tests.command if word.endswith(".py")}
    assert {"test_ccd.py", "test_jda_gpu.py"} <= files and "test_index.py" not in files


@pytest.mark.parametrize("of", gpu_steps._PIXELS)
def test_the_pixels_that_parts_are_held_to_are_those_of_the_cpus_kernels(of):
    assert zlib.crc32(gpu_steps.on_cpu(*of)) == gpu_steps._PIXELS[of]


def test_without_a_gpu_parts_have_five_times_as_long(tmp_path, monkeypatch):
    """Another's work on the same cores is no failure; with a GPU limits are what they are."""
    given = []
    monkeypatch.setattr(gpu_acceptance, "run_parts", lambda parts, *more: given.append((parts, more[1])) or [])
    monkeypatch.setattr(gpu_acceptance.harness, "show_table", lambda *_: None)
    for gpu, times in ((True, 1), (False, 5)):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        with suppress(KeyError):  # nothing was saved
            gpu_acceptance.run(Bench(suite="gpu-acceptance", arms="A", out=tmp_path))
        parts, budget_s = given.pop()
        assert budget_s == times * 230 and {part.name: part.limit_s for part in parts}["once"] == times * 25


def test_calls_are_chosen_by_name():
    assert gpu_acceptance._calls(None) == ["A", "B", "C"] and gpu_acceptance._calls("b,C") == ["B", "C"]
    with pytest.raises(UserError, match="unknown call; found D, expected A, B, C"):
        gpu_acceptance._calls("A,D")


def test_kernels_are_measured_a_size_at_a_time(tmp_path, monkeypatch, capsys):
    """What one size found is kept when another fails; call A has no arm that takes minutes to compile."""
    before, asked = kernels.SIZES, []

    def times(rounds):
        (batch, classes), *others = kernels.SIZES
        assert not others
        asked.append(sorted(kernels._arms(batch, classes)))
        if classes == 21841:
            raise RuntimeError("out of memory")
        return [{"size": f"{batch}×{classes}", "rounds": rounds}]

    monkeypatch.setattr(kernels, "_times", times)
    monkeypatch.setattr(kernels, "_arms", lambda *_: dict.fromkeys(["ours dense", "eager", "compile"]))
    monkeypatch.setattr(gpu_steps, "GPU", True)
    with pytest.raises(SystemExit, match="failed: 4096×21841"):
        gpu_steps.losses(str(tmp_path / "found.json"))
    sizes = [row["size"] for row in json.loads((tmp_path / "found.json").read_text())["kernels"]]
    assert sizes == ["4096×1000", "1024×1000"] and before == kernels.SIZES and asked == [["ours dense"]] * 3
    assert "out of memory" in capsys.readouterr().err
    gpu_steps.compiled(str(tmp_path / "found.json"))
    assert asked[3:] == [["compile", "eager", "ours dense"]] * 2
    assert set(gpu_steps.SIZES) == gpu_acceptance._FLOORS.keys()


# --- what is read


def test_a_report_of_tests_counts_failures_errors_and_skipped(tmp_path):
    (tmp_path / "tests.xml").write_text(
        """<testsuites><testsuite tests="5">
        <testcase classname="a" name="good"/><testcase classname="a" name="fine"><system-out>x</system-out></testcase>
        <testcase classname="a" name="bad"><failure message="1 != 2&#10;more"/><error message="teardown"/></testcase>
        <testcase classname="" name="b"><error message="collection failure"/></testcase>
        <testcase classname="a" name="off"><skipped message="no"/></testcase></testsuite></testsuites>"""
    )
    what, tables = gpu_acceptance.read_tests(tmp_path / "tests.xml")
    assert what == "2 passed, 2 failed, 1 skipped"
    assert tables["failures"] == [{"test": "a::bad", "said": "1 != 2"}, {"test": "::b", "said": "collection failure"}]


@pytest.mark.parametrize("line", ["94/2409 tests collected (2315 deselected) in 4.86s", "94 tests collected in 1.00s"])
def test_collected_tests_are_counted(tmp_path, line):
    (tmp_path / "log").write_text(f"tests/test_a.py::test_of[12 tests collected]\n\n{line}\n")
    assert gpu_acceptance.read_collected(tmp_path / "log")[1] == {"tests": [{"collected": 94}]}
    (tmp_path / "log").write_text("no tests collected (94 deselected) in 1.00s\n")
    with pytest.raises(LookupError):
        gpu_acceptance.read_collected(tmp_path / "log")


def test_documents_of_another_suite_are_read(tmp_path):
    steps = [{"arm": "ce", "ms/step": 80.0}, {"arm": "stored", "ms/step": 100.0}]
    document = {"options": {"batch_size": 256}, "tables": {"step": steps, "break-even": [{"epochs": 3}]}}
    (tmp_path / "waiting.json").write_text(json.dumps(document))
    what, tables = gpu_acceptance.read_steps(tmp_path / "waiting.json")
    assert [row["pairs/s"] for row in tables["waiting"]] == [3200.0, 2560.0] and "stored 100.0 ms" in what
    assert tables["break-even"] == [{"epochs": 3}] and "step" not in tables


@pytest.mark.slow
def test_the_whole_runs_without_a_gpu(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.gpu_acceptance",
        "--json",
        tmp_path / "found.json",
        "--out",
        tmp_path / "out",
    ]
    root = Path(gpu_acceptance.__file__).parents[1]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    tables = json.loads((tmp_path / "found.json").read_text())["tables"]
    assert len(tables["parts"]) == 12 and {row["ok"] for row in tables["parts"]} == {"yes"}
    assert tables["tests"][0]["collected"] >= 94
    assert {row["differing bytes"] for row in tables["decoders"]} == {0}
    assert [row["arm"] for row in tables["end-to-end"]] == ["ce", "stored", "live"]
    assert [row["arm"] for row in tables["decoding"]] == ["loader, cpu", "DALI alone, cpu"]
    found = {row["claim"]: row["found"] for row in tables["verdicts"]}
    assert found["step, stored / ce"] > 0 and found["waiting, % of a step"] >= 0
