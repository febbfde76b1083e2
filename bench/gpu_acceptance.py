"""`pipeline bench gpu-acceptance`: on a GPU machine, in nine minutes, everything that this package claims about GPUs.

Copy the repository there and run, from its root (nothing need be installed but what `pyproject.toml` names, with DALI,
scikit-learn, pytest and hypothesis; wheels in a folder on PYTHONPATH will do):

    python -m bench.gpu_acceptance --json found.json --out acceptance

Each part is a process of its own with a limit. The JSON is written after each; the most important come first:

    tests        the tests marked `gpu`
    kernels      the loss against its floor, eager PyTorch and torch.compile; a size at a time
    data         ImageNet-like images for the parts below, unless `--data` names a prepared set
    end-to-end   steps of ResNet-18 at 224 pixels on labels alone, on stored labels and with ResNet-34 in the loop
    waiting      how long a student waits for its batches, with no other arm beside it while the loader works
    loader       pairs per second, against what one would write without it
    decoding     the same of the loader whose decoder and pixel kernels run on the GPU; and images per second of DALI
                 alone, which no loader that decodes by it can pass

What failed or ran out of time has its last lines in table `parts`, and its whole output in OUT; the exit code is then
1. Table `verdicts` holds what was found against the targets. Without a GPU all parts run shortened: tests are only
collected, kernels counted, and no target is held against a CPU's figure.
"""

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from subprocess import DEVNULL
from unittest import mock
from xml.etree import ElementTree

import numpy as np

from bench import harness
from pipeline import cli
from pipeline.config import Bench
from pipeline.system.terminal import console_out

Tables = dict[str, list[dict]]

_ROOT = Path(__file__).absolute().parents[1]
_BUDGET_S = 530.0  # nine minutes, less what imports and tables take
_GRACE_S = 8.0  # between SIGINT, at which pytest still writes its report, and SIGKILL
_COLUMNS = 8  # that a terminal has room for; the JSON has all
_FIELDS = ("name", "driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "memory.total")
_FLOORS = {"4096×1000": "≤ 2", "4096×21841": "≤ 1.18", "1024×1000": "≤ 2", "1024×100": None}  # as they are measured
_UNMEASURED = "not measured"


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]
    limit_s: float
    found: Path
    """File that the command writes; removed before."""
    read: Callable[[Path], tuple[str, Tables]]
    """What the file says, in a few words and as tables. ValueError or LookupError if it says nothing of the kind."""
    needs: tuple[str, ...] = ()
    """Modules without which the part is not run."""


def run(config: Bench) -> dict:
    """Run all parts, print tables and write the `harness.document`; SystemExit(1) if a part failed.

    `config.out` is a folder for output (else in `harness.work`), `config.json` the file to write (else OUT/found.json).
    """
    import torch

    from pipeline.data.index import Index

    gpu = torch.cuda.is_available()
    out = (config.out or harness.work(config.work) / "gpu-acceptance").absolute()
    out.mkdir(parents=True, exist_ok=True)
    given = Index.open(config.data, "train").path if config.data else None
    machine = harness.machine() | {"nvidia_smi": _nvidia_smi()}
    found: dict = {}

    def save(tables: Tables) -> None:
        options, judged = {**vars(config), "gpu": gpu}, {"verdicts": verdicts(tables, gpu)}
        about = {"machine": machine, "options": options, "unit": "parts", "reference": "", "arms": {}}
        found.update(harness.document("gpu-acceptance", tables=tables | judged, **about))
        harness.write(config.json or out / "found.json", found)

    with tempfile.TemporaryDirectory(dir=out) as made:
        rows = run_parts(_parts(out, given, Path(made) / "data", gpu), out, _BUDGET_S, save)
    for title, table in sorted(found["tables"].items(), key=lambda item: item[0] in ("verdicts", "parts")):
        columns = list(dict.fromkeys(column for row in table for column in row))[:_COLUMNS]
        shown = [{column: "–" if row.get(column) is None else row[column] for column in columns} for row in table]
        if shown:
            harness.show_table(title, shown)
    if any(row["ok"] == "no" for row in rows):
        raise SystemExit(1)
    return found


def _nvidia_smi() -> dict[str, str] | None:
    query = f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"
    line = harness._output("nvidia-smi", "-i", "0", *query)
    return dict(zip(_FIELDS, line.split(", "), strict=False)) if line else None


# --- parts


def run_parts(parts: list[Part], out: Path, budget_s: float, save: Callable[[Tables], None]) -> list[dict]:
    """Run parts one after the other within the budget; `save` gets all tables after each. Returns table `parts`."""
    end = time.monotonic() + budget_s - _GRACE_S
    rows: list[dict] = []
    tables: Tables = {"parts": rows}
    for part in parts:
        started = time.monotonic()
        ok, what, more = _run(part, out / f"{part.name}.log", min(part.limit_s, end - started))
        rows.append({"part": part.name, "seconds": round(time.monotonic() - started, 1), "ok": ok, "what": what})
        tables |= more
        save(tables)
        console_out.print(f"{part.name}: {what}", highlight=False, markup=False)
    return rows


def _run(part: Part, log: Path, limit_s: float) -> tuple[str, str, Tables]:
    """(yes, no or not run; in words; tables)."""
    if limit_s <= 0:
        return "no", "not run: no time is left", {}
    if missing := [module.replace(".", "-") for module in part.needs if not _imports(module)]:
        return "not run", f"not run: {missing[0]} is not installed", {}
    part.found.unlink(missing_ok=True)
    code = run_limited(part.command, log, limit_s)
    faults = [] if code == 0 else [f"out of time after {limit_s:.0f} s" if code is None else f"exit code {code}"]
    what, tables = "", {}
    try:
        what, tables = part.read(part.found)
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        faults.append(f"no result: {type(error).__name__} {error}")
    if not faults:
        return "yes", what, tables
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "no", "\n".join(filter(None, ["; ".join(faults), what, *lines[-6:]])), tables


@cache
def _imports(module: str) -> bool:
    """Whether it can be imported, tried in a process of its own: a broken one may take its process along."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def run_limited(command: tuple[str, ...], log: Path, limit_s: float) -> int | None:
    """Run a command with its output in `log`; its exit code, or None if it was stopped at the limit.

    It is then interrupted, and killed if it has not left after `_GRACE_S`. In any case all processes of its group are
    gone afterwards, so that none of them disturbs what is measured next.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=_ROOT, stdin=DEVNULL, stdout=output, stderr=output, process_group=0)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _parts(out: Path, given: Path | None, new: Path, gpu: bool) -> list[Part]:
    """`given` is a prepared data set, or one is made at `new`."""
    data, python, needs = given or new, sys.executable, ("nvidia.dali", *(() if given else ("sklearn",)))
    # Other files need more packages; and what another version of a library deprecates is no fault of the GPU.
    files = [str(path) for path in sorted(_ROOT.glob("tests/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    options = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", "--continue-on-collection-errors")
    tests = (python, "-m", "pytest", *files, *options)

    def own(name: str, function: Callable, limit_s: float, *paths: Path) -> Part:
        call = f"from bench.gpu_acceptance import {function.__name__} as measure\nmeasure{tuple(map(str, paths))!r}"
        return Part(name, (python, "-c", call), limit_s, paths[0], read_tables, needs if data in paths else ())

    def bench(name: str, suite: str, limit_s: float, read: Callable, *options: object) -> Part:
        found = out / f"{name}.json"
        options = ("--data", data, "--work", out, "--json", found, *options)
        return Part(name, (python, "-m", "pipeline", "bench", suite, *map(str, options)), limit_s, found, read, needs)

    if gpu:
        first = Part("tests", (*tests, f"--junitxml={out / 'tests.xml'}"), 170, out / "tests.xml", read_tests)
        steps, alone, batch_size, images = 200, 100, 256, 1024
        loader = ("jda-distill,pillow,torchvision", "--rounds", 3)
    else:
        first = Part("tests", (*tests, "--collect-only"), 170, out / "tests.log", read_collected)
        steps, alone, batch_size, images = 3, 3, 4, 64
        loader = ("jda-distill,pillow", "--rounds", 1, "--pairs", 64, "--batch-size", 16)
    make = (python, "-m", "pipeline", "prepare", f"synthetic:{images}", "--out", str(data))
    made = Part("data", make, 60, data / "dataset.json", lambda _: ("prepared", {}), needs)
    sized = ("--batch-size", batch_size, "--rounds")
    return [
        first,
        own("kernels", measure_kernels, 190, out / "kernels.json"),
        *([] if given else [made]),
        bench("end-to-end", "end-to-end", 130, read_steps, "--arms", "ce,stored,live", *sized, steps),
        bench("waiting", "end-to-end", 70, read_steps, "--arms", "loaded", *sized, alone),
        bench("loader", "loader", 90, read_loader, "--arms", *loader),
        own("decoding", measure_decoding, 70, out / "decoding.json", data),
    ]


# --- what parts of their own do, in their processes


def _each(found: str, title: str, jobs: Mapping[str, Callable[[], list[dict]]]) -> None:
    """Fill a table job by job, written after each; one that fails is named at the end and stops none."""
    rows, failed = [], []
    for name, job in jobs.items():
        try:
            rows += job()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        Path(found).write_text(json.dumps({title: rows}))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def measure_kernels(found: str) -> None:
    """`bench kernels`, a size at a time; without a GPU what it counts quickly."""
    import torch

    from bench.kernels import suite as kernels

    def of(size: str) -> list[dict]:
        sizes = (tuple(map(int, size.split("×"))),)
        with mock.patch.object(kernels, "SIZES", sizes):  # else nothing is known before all are done
            return kernels._times(harness.ROUNDS)

    if torch.cuda.is_available():
        _each(found, "kernels", {size: partial(of, size) for size in _FLOORS})
    else:
        _each(found, "kernels", {"operators": kernels._operators, "errors": kernels._errors})


def measure_decoding(found: str, data: str) -> None:
    """Pairs per second of this loader by each decoder, and images per second of DALI alone, fed from memory."""
    import torch
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    from bench.loader import arms
    from pipeline.views.loader import Loader

    gpu, threads = torch.cuda.is_available(), len(os.sched_getaffinity(0))
    job = arms.Job(Path(data), 256 if gpu else 16, threads)
    index = arms.opened(job.data)
    encoded = [[np.frombuffer(index.read(row), np.uint8) for row in arms.part_of(job, step)[1]] for step in range(4)]

    def pairs(decoder: str) -> Iterator[int]:
        plan = map(partial(arms.request, job), itertools.count())
        batches = Loader(index, arms.POLICY, threads=threads, decoder=decoder).batches(plan)
        return (len(batch.rows) for batch in batches)

    def images(decoder: str) -> Iterator[int]:
        source, device = itertools.cycle(encoded), None if decoder == "cpu" else 0
        how = {} if device is None else {"device": "mixed", "hw_decoder_load": float(decoder == "gpu-hw")}
        how |= {"output_type": types.DALIImageType.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
        graph = Pipeline(job.batch_size, threads, device_id=device, exec_dynamic=True, prefetch_queue_depth=2)
        with graph:
            given = fn.external_source(source=lambda: next(source), batch=True, dtype=types.DALIDataType.UINT8)
            graph.set_outputs(fn.decoders.image(given, **how))
        graph.build()
        return (len(decoded) for (decoded,) in arms._runs(graph))

    decoders = ("gpu", "gpu-hw", "cpu") if gpu else ("cpu",)
    jobs = {f"loader, {name}": partial(pairs, name) for name in decoders}
    jobs |= {f"DALI alone, {name}": partial(images, name) for name in decoders}
    _each(found, "decoding", {name: partial(_rate, name, steps) for name, steps in jobs.items()})


def _rate(name: str, steps: Callable[[], Iterator[int]]) -> list[dict]:
    done = steps()
    slots = [harness.measure(done, warm=8, timed=8) for _ in range(3)]  # up to 6 batches lie ready at a slot's start
    rate = harness.spread(slot.rate for slot in slots)
    cpu_ms = statistics.median(1e3 * slot.cpu_seconds / slot.items for slot in slots)
    return [{"arm": name, "per second": rate["median"], "min": rate["min"], "max": rate["max"], "CPU ms": cpu_ms}]


# --- what they have found


def read_tests(report: Path) -> tuple[str, Tables]:
    """pytest's JUnit XML: table `tests` of counts, `failures` of names and first lines."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    failures, tests = [], int(suite.attrib["tests"])  # one that was interrupted is listed, and not counted here
    for case in suite:
        for fault in [*case.iter("failure"), *case.iter("error")][:1]:
            said = (fault.get("message") or "").partition("\n")[0][:200]
            failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "said": said})
    skipped = sum(case.find("skipped") is not None for case in suite)
    counts = {"passed": tests - len(failures) - skipped, "failed": len(failures), "skipped": skipped}
    return ", ".join(f"{count} {how}" for how, count in counts.items()), {"tests": [counts], "failures": failures}


def read_collected(log: Path) -> tuple[str, Tables]:
    """What `pytest --collect-only -q` printed."""
    collected = int(re.findall(r"^(\d+)(?:/\d+)? tests? collected", log.read_text(), re.MULTILINE)[-1])
    return f"{collected} collected", {"tests": [{"collected": collected}]}


def read_tables(found: Path) -> tuple[str, Tables]:
    """What `_each` wrote."""
    tables = json.loads(found.read_text())
    return ", ".join(f"{len(rows)} rows" for rows in tables.values()), tables


def read_steps(found: Path) -> tuple[str, Tables]:
    """`bench end-to-end`: tables of the name of the file, and `break-even`."""
    document = json.loads(found.read_text())
    batch_size, tables = document["options"]["batch_size"], dict(document["tables"])
    rows = [row | {"pairs/s": 1e3 * batch_size / row["ms/step"]} for row in tables.pop("step")]
    return ", ".join(f"{row['arm']} {row['ms/step']:.1f} ms" for row in rows), {found.stem: rows, **tables}


def read_loader(found: Path) -> tuple[str, Tables]:
    """`bench loader`: a row per arm."""
    rows = [
        {"loader": name, **{f"pairs/s {at}": arm["rate"][at] for at in ("median", "min", "max")}}
        for name, arm in json.loads(found.read_text())["arms"].items()
    ]
    return ", ".join(f"{row['loader']} {row['pairs/s median']:,.0f} pairs/s" for row in rows), {"loader": rows}


def verdicts(tables: Tables, gpu: bool) -> list[dict]:
    """Rows {claim, target, found, met}; met is yes, no, does not apply or not measured, without a GPU always that."""
    by = {name: {row.get("arm"): row for row in rows} for name, rows in tables.items()}
    rows = [_tests(tables), *_kernels(tables.get("kernels", [])), *_steps(by)]
    return rows if gpu else [row | {"met": _UNMEASURED} for row in rows]


def _verdict(claim: str, found: float | None, target: str = "–") -> dict:
    """A target is ≤ or ≥, a blank and a bound."""
    met = _UNMEASURED if found is None else "–"
    if found is not None and target != "–":
        bound = float(target[2:])
        met = "yes" if (found <= bound if target[0] == "≤" else found >= bound) else "no"
    return {"claim": claim, "target": target, "found": found, "met": met}


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _tests(tables: Tables) -> dict:
    counts = tables.get("tests", [{}])[0]
    ended = any(row["part"] == "tests" and row["ok"] == "yes" for row in tables["parts"])
    known = counts.get("failed") or (ended and counts.get("passed"))  # those that did not come to run may fail
    return _verdict("tests marked gpu that fail", counts["failed"] if known else None, "≤ 0")


def _kernels(rows: list[dict]) -> Iterator[dict]:
    at = {(row.get("size"), row.get("arm")): row for row in rows}
    for size, of_floor in _FLOORS.items():
        for form, compiled in (("dense", "compile"), ("int8", "compile int8")):
            ours = at.get((size, f"ours {form}"), {})
            if of_floor:
                found = _ratio(ours.get("replayed cold µs"), ours.get("floor µs"))
                yield _verdict(f"{size} {form} / floor, replayed cold", found, of_floor)
            yield _verdict(f"{size} {form}, peak memory / gradient", ours.get("peak / gradient"), "≤ 1.02")
            for other, target in ((compiled, "≥ 1.5"), *((("eager", "≥ 10"),) if form == "dense" else ())):
                for how in ("called", "replayed"):
                    found = _ratio(at.get((size, other), {}).get(f"{how} µs"), ours.get(f"{how} µs"))
                    yield _verdict(f"{other.split()[0]} / {size} {form}, {how}", found, target)


def _steps(by: dict[str, dict]) -> Iterator[dict]:
    for arm, target in (("stored", "≤ 1.05"), ("live", "–")):
        yield _verdict(f"step, {arm} / ce", by.get("end-to-end", {}).get(arm, {}).get("× ce"), target)
    step, decoding = by.get("waiting", {}).get("loaded", {}), by.get("decoding", {})
    waited = _ratio(step.get("wait ms"), step.get("ms/step"))
    loader = decoding.get("loader, gpu") or decoding.get("loader, cpu") or {}
    student = None if waited is None or waited >= 1 else step["pairs/s"] / (1 - waited)
    faster = _ratio(loader.get("per second"), student)
    yield _verdict("pairs/s, loader / student", faster)
    waiting = _verdict("waiting, % of a step", None if waited is None else 100 * waited, "≤ 2")
    if waiting["met"] == "no" and (faster is None or faster <= 1):  # it is claimed where the loader is faster
        waiting["met"] = _UNMEASURED if faster is None else "does not apply"
    yield waiting


if __name__ == "__main__":
    sys.exit(cli.main(["bench", "gpu-acceptance", *sys.argv[1:]]))
