"""`pipeline bench gpu-acceptance`: on a GPU machine everything that this package claims about GPUs, in three calls.

Copy the repository there and run, from its root (nothing need be installed; wheels in a folder on PYTHONPATH will do):

    python -m bench.gpu_acceptance --arms A --json found-a.json --out acceptance     230 s, without DALI
    python -m bench.gpu_acceptance --arms B --json found-b.json --out acceptance     270 s
    python -m bench.gpu_acceptance --arms C --json found-c.json --out acceptance     170 s

Each part is a process of its own with a limit, and none needs a package that it does not use. The JSON is written
after each; the most valuable come first:

    A   once        every kernel once: does it compile and run, and is it right
        tests       the tests marked `gpu`
        pixels      the pair kernel by parts, on 256 images of 500 pixels
        losses      the loss of dense, int8 and subspace labels against its floor
    B   data        ImageNet-like images for the parts below, unless `--data` names a prepared set
        decoders    by each decoder the loader's bytes, with and without digests, and a bad image among good ones
        rates       pairs per second of the loader, and images per second of DALI alone, which none can pass
        whole       two blocks of a teacher pass, then a student's steps
        end-to-end  steps of ResNet-18 at 224 pixels on labels alone, on stored labels and with ResNet-34 in the loop
    C   compiled    the loss beside eager PyTorch and torch.compile
        waiting     how long a student waits for its batches, with no other arm beside it while the loader works

What failed or ran out of time has its last lines in table `parts`, and its whole output in OUT; the exit code is then
1. Table `verdicts` holds what was found against the targets. Without a GPU all parts run shortened: tests are only
collected, kernels interpreted or counted, limits are five times as long, and no target is held against a CPU's figure.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from subprocess import DEVNULL
from xml.etree import ElementTree

from bench import harness
from cache import UserError
from pipeline import cli
from pipeline.config import Bench
from pipeline.system import machine as machines
from pipeline.system.terminal import console_out

Tables = dict[str, list[dict]]

_ROOT = Path(__file__).absolute().parents[1]
CALLS = {"A": 230.0, "B": 270.0, "C": 170.0}
"""Call -> seconds that its parts may take together."""
_PATIENCE = 5
"""Times its limit that a part may take without a GPU: what is rehearsed there is that it works, beside other work."""
_GRACE_S = 8.0  # between SIGINT, at which pytest still writes its report, and SIGKILL
_COLUMNS = 8  # that a terminal has room for; the JSON has all
_FIELDS = ("name", "driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "memory.total")
_FLOORS = {"4096×1000": "≤ 2", "4096×21841": "≤ 1.18", "1024×1000": "≤ 2"}
_UNMEASURED = "not measured"


@dataclass(frozen=True)
class Part:
    call: str
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

    gpu, calls = torch.cuda.is_available(), _calls(config.arms)
    out = (config.out or harness.work(config.work) / "gpu-acceptance").absolute()
    out.mkdir(parents=True, exist_ok=True)
    given = Index.open(config.data, "train").path if config.data else None
    machine = machines.describe() | {"nvidia_smi": _nvidia_smi()}
    found: dict = {}

    def save(tables: Tables) -> None:
        options, judged = {**vars(config), "gpu": gpu}, {"verdicts": verdicts(tables, gpu)}
        about = {"machine": machine, "options": options, "unit": "parts", "reference": "", "arms": {}}
        found.update(harness.document("gpu-acceptance", tables=tables | judged, **about))
        harness.write(config.json or out / "found.json", found)

    with tempfile.TemporaryDirectory(dir=out) as made:
        parts = [part for part in _parts(out, given, Path(made) / "data", gpu) if part.call in calls]
        parts = [replace(part, limit_s=part.limit_s * (1 if gpu else _PATIENCE)) for part in parts]
        rows = run_parts(parts, out, sum(CALLS[call] for call in calls) * (1 if gpu else _PATIENCE), save)
    for title, table in sorted(found["tables"].items(), key=lambda item: item[0] in ("verdicts", "parts")):
        columns = list(dict.fromkeys(column for row in table for column in row))[:_COLUMNS]
        shown = [{column: "–" if row.get(column) is None else row[column] for column in columns} for row in table]
        if shown:
            harness.show_table(title, shown)
    if any(row["ok"] == "no" for row in rows):
        raise SystemExit(1)
    return found


def _calls(chosen: str | None) -> list[str]:
    calls = list(CALLS) if chosen is None else chosen.upper().split(",")
    if unknown := [call for call in calls if call not in CALLS]:
        raise UserError("unknown call", found=unknown[0], expected=", ".join(CALLS), fix="check --arms")
    return calls


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
        for name, table in more.items():
            tables[name] = tables.get(name, []) + table
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
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore it
        process = subprocess.Popen(
            command, cwd=_ROOT, stdin=DEVNULL, stdout=output, stderr=output, process_group=0, preexec_fn=heard
        )
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
    """`given` is a prepared data set, or one is made at `new`. What makes it may take no longer than what it is for."""
    data, python = given or new, sys.executable
    # Other files need more packages; and what another version of a library deprecates is no fault of the GPU.
    files = [str(path) for path in sorted(_ROOT.glob("tests/**/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    options = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", "--continue-on-collection-errors")
    tests = (python, "-m", "pytest", *files, *options)
    interpreted = "" if gpu else "import os\nos.environ['TRITON_INTERPRET'] = '1'\n"

    def own(call: str, name: str, limit_s: float, *paths: Path, needs: tuple[str, ...] = ()) -> Part:
        code = f"{interpreted}from bench import gpu_steps\ngpu_steps.{name}{tuple(map(str, paths))!r}"
        return Part(call, name, (python, "-c", code), limit_s, paths[0], read_tables, needs)

    def step(call: str, name: str, limit_s: float, arms: str, rounds: int) -> Part:
        sized = ("--batch-size", 256 if gpu else 4, "--rounds", rounds if gpu else 1)
        found = out / f"{name}.json"
        small = () if gpu else ("--student", "cifar/resnet8", "--teacher", "cifar/resnet8x4")
        more = ("--data", data, "--work", out, "--json", found, "--arms", arms, *sized, *small)
        command = (python, "-m", "pipeline", "bench", "end-to-end", *map(str, more))
        return Part(call, name, command, limit_s, found, read_steps, ("nvidia.dali", "zarr", "timm"))

    report, read = (out / "tests.xml", read_tests) if gpu else (out / "tests.log", read_collected)
    how = (f"--junitxml={report}",) if gpu else ("--collect-only",)
    decoding = ("nvidia.dali",)

    def made(call: str, limit_s: float) -> list[Part]:
        code = f"{interpreted}from bench import gpu_steps\ngpu_steps.data({str(data)!r})"
        file = data / "dataset.json"
        part = Part(call, "data", (python, "-c", code), limit_s, file, lambda _: ("prepared", {}), decoding)
        return [] if given else [part]

    return [
        own("A", "once", 25, out / "once.json"),
        Part("A", "tests", (*tests, *how), 120, report, read),
        own("A", "pixels", 30, out / "pixels.json"),
        own("A", "losses", 45, out / "losses.json"),
        *made("B", 30),
        own("B", "decoders", 60, out / "decoders.json", data, needs=decoding),
        own("B", "rates", 60, out / "rates.json", data, needs=decoding),
        own("B", "whole", 40, out / "whole.json", data, needs=(*decoding, "zarr")),
        step("B", "end-to-end", 72, "ce,stored,live", 60),
        own("C", "compiled", 110, out / "compiled.json"),
        *made("C", 20),
        step("C", "waiting", 32, "loaded", 60),
    ]


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
    """What `gpu_steps` wrote."""
    tables = json.loads(found.read_text())
    return ", ".join(f"{len(rows)} rows" for rows in tables.values()), tables


def read_steps(found: Path) -> tuple[str, Tables]:
    """`bench end-to-end`: tables of the name of the file, and `break-even`."""
    document = json.loads(found.read_text())
    batch_size, tables = document["options"]["batch_size"], dict(document["tables"])
    rows = [row | {"pairs/s": 1e3 * batch_size / row["ms/step"]} for row in tables.pop("step")]
    return ", ".join(f"{row['arm']} {row['ms/step']:.1f} ms" for row in rows), {found.stem: rows, **tables}


def verdicts(tables: Tables, gpu: bool) -> list[dict]:
    """Rows {claim, target, found, met}; met is yes, no, does not apply or not measured, without a GPU always that."""
    by = {name: {row.get("arm"): row for row in rows} for name, rows in tables.items()}
    rows = [_tests(tables), *_decoders(tables), *_kernels(tables.get("kernels", [])), *_steps(by)]
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


def _decoders(tables: Tables) -> Iterator[dict]:
    found = {row["decoder"]: row for row in tables.get("decoders", [])}
    rates = {row["arm"]: row["per second"] for row in tables.get("decoding", [])}
    for name in ("gpu", "gpu-hw", "gpu-both"):
        row = found.get(name, {})
        yield _verdict(f"{name}: bytes unlike the CPU's pixel kernel", row.get("differing bytes"), "≤ 0")
        harmed = row.get("one bad image") and int(row["one bad image"] != "skipped")
        yield _verdict(f"{name}: a bad image harms others", harmed, "≤ 0")
        if name != "gpu-both":
            share = _ratio(rates.get(f"loader, {name}"), rates.get(f"DALI alone, {name}"))
            yield _verdict(f"{name}: loader / DALI alone", share, "≥ 0.9")


def _kernels(rows: list[dict]) -> Iterator[dict]:
    at = {(row.get("size"), row.get("arm")): row for row in rows}
    for size, of_floor in _FLOORS.items():
        for form, compiled in (("dense", "compile"), ("int8", "compile int8")):
            ours = at.get((size, f"ours {form}"), {})
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
    loader = decoding.get("loader, gpu-hw") or decoding.get("loader, gpu") or decoding.get("loader, cpu") or {}
    student = None if waited is None or waited >= 1 else step["pairs/s"] / (1 - waited)
    faster = _ratio(loader.get("per second"), student)
    yield _verdict("pairs/s, loader / student", faster)
    waiting = _verdict("waiting, % of a step", None if waited is None else 100 * waited, "≤ 2")
    if waiting["met"] == "no" and (faster is None or faster <= 1):  # it is claimed where the loader is faster
        waiting["met"] = _UNMEASURED if faster is None else "does not apply"
    yield waiting


if __name__ == "__main__":
    sys.exit(cli.main(["bench", "gpu-acceptance", *sys.argv[1:]]))
