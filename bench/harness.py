"""The one timing harness: arms interleaved round by round, medians with their spread, and on which machine.

An arm is a function that works for a moment and returns a `Slot`. `compare` runs A B C … A B C …, so that whatever
else the machine does meets all arms alike, and a ratio is taken within a round. Loaders live in a `host` each: a
process of its own, idle while others run, so that threads, CPU time and memory of one arm cannot be charged to another.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
from rich.table import Table

from pipeline.system.files import write_atomically
from pipeline.system.terminal import console_out, progress

ROUNDS = 7  # unless the user says otherwise
_TICKS = os.sysconf("SC_CLK_TCK")
T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """What one arm did in one round."""

    items: int
    seconds: float
    """Wall clock."""
    cpu_seconds: float
    """User and system time of the process and its descendants, in steps of 10 ms."""
    thread_cpu_seconds: dict[str, float]
    """The process's own share of it by thread name, without digits; threads of one name are added up."""
    peak_rss_bytes: int
    """Peak resident memory of the processes' whole lives, added up; what they share counts in each."""
    own_bytes: int
    """Their heaps and shared memory when the slot ended, each page once; libraries and cached files left out."""

    @property
    def rate(self) -> float:
        """Items per second."""
        return self.items / self.seconds


def measure(
    steps: Iterator[int],
    *,
    warm: int,
    timed: int,
    clock: Callable[[], float] = time.perf_counter,
    cpu: Callable[[], tuple[float, Mapping[str, float]]] | None = None,
) -> Slot:
    """Time `timed` steps after `warm` untimed ones; a step yields how many items it has done.

    Without a `warm` longer than whatever works ahead behind `steps`, its first results would come for nothing.
    """
    cpu = cpu or cpu_seconds
    for _ in range(warm):
        next(steps)
    cpu_before, threads_before = cpu()
    start = clock()
    items = sum(next(steps) for _ in range(timed))
    seconds = clock() - start
    cpu_after, threads_after = cpu()
    spent = {name: after - threads_before.get(name, 0.0) for name, after in threads_after.items()}
    return Slot(items, seconds, cpu_after - cpu_before, spent, *memory_bytes())


def compare(arms: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each arm gives in each of `rounds`, interleaved. One more goes first, to fill caches, and is dropped."""
    slots: dict[str, list[T]] = {name: [] for name in arms}
    with progress("bench", (rounds + 1) * len(arms), "slots") as advance:
        for number in range(rounds + 1):
            for name, arm in arms.items():
                slot = arm()
                if number:
                    slots[name].append(slot)
                advance(1)
    return slots


def host() -> ProcessPoolExecutor:
    """A process of its own, without what this one has imported or started; it leaves at Ctrl-C without a word."""
    spawn = get_context("spawn")
    return ProcessPoolExecutor(1, spawn, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL))


def median_ms(function: Callable[[], object], seconds: float = 0.2) -> float:
    """Median wall time of a short call in ms, over `seconds` of calls and at least nine."""
    function()  # compiles, allocates
    times: list[float] = []
    while len(times) < 9 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def work(chosen: Path | None) -> Path:
    """Folder for what is made once; below the temporary one where a user has no home, as in a container."""
    if chosen:
        return chosen
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"jda-distill-{os.getuid()}" / "bench"
    return cache / "jda-distill" / "bench"


class Finished:
    """Results by key, in one file that is whole after a kill."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.results: dict[str, dict] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            self.results = {}

    def put(self, key: str, result: dict) -> dict:
        self.results[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.results, indent=1).encode())
        return result


# --- the operating system's books (Linux, as DALI)


def cpu_seconds() -> tuple[float, dict[str, float]]:
    """CPU time so far: of this process with all its descendants; of its own living threads by name, and of the calls
    that `time_calls` counts, which are parts of them."""
    total = sum(_cpu(Path(f"/proc/{pid}/stat"))[1] for pid in _tree(os.getpid()))
    # The system does not know the names of Python's threads; theirs are those of whoever started them.
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    threads: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        name, seconds = _cpu(task / "stat")
        name = re.sub(r"\d+", "", names.get(int(task.name), name)).rstrip(" _-")
        threads[name] = threads.get(name, 0.0) + seconds
    return total, threads | _calls


_calls: dict[str, float] = {}
_calls_lock = threading.Lock()


def time_calls(module: ModuleType, name: str) -> None:
    """From now on count the CPU time that threads spend in a function, as `cpu_seconds`' entry "name()"."""
    function = getattr(module, name)
    if hasattr(function, "__wrapped__"):
        return  # it is counted already

    @wraps(function)
    def timed(*arguments, **options):
        start = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            with _calls_lock:
                _calls[f"{name}()"] = _calls.get(f"{name}()", 0.0) + time.thread_time() - start

    setattr(module, name, timed)


def memory_bytes() -> tuple[int, int]:
    """(peak_rss_bytes, own_bytes) of this process and its descendants, as `Slot` defines them."""
    peak = own = 0
    for pid in _tree(os.getpid()):
        peak += _kibibytes(f"/proc/{pid}/status", "VmHWM")
        own += _kibibytes(f"/proc/{pid}/smaps_rollup", "Pss_Anon", "Pss_Shmem")
    return peak * 1024, own * 1024


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _tree(int(child))


def _cpu(stat: Path) -> tuple[str, float]:
    """(name, user + system seconds) of a process or thread; proc(5), fields 2, 14 and 15."""
    try:
        name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return "", 0.0
    user, system = rest.split()[11:13]
    return name, (int(user) + int(system)) / _TICKS


def _kibibytes(path: str, *fields: str) -> int:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0].rstrip(":") in fields)


# --- what is reported


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, q1, median, q3, high = (float(value) for value in np.percentile(list(values), (0, 25, 50, 75, 100)))
    return {"median": median, "q1": q1, "q3": q3, "min": low, "max": high}


def summarise(slots: Mapping[str, list[Slot]], reference: str) -> dict[str, dict]:
    """Per arm what `document` keeps; `ratio` is an arm's rate over that of `reference` in the same round."""
    return {
        name: {
            "rate": spread(slot.rate for slot in mine),
            "ratio": spread(slot.rate / base.rate for slot, base in zip(mine, slots[reference], strict=True)),
            "cpu_ms": spread(1e3 * slot.cpu_seconds / slot.items for slot in mine),
            "peak_rss_bytes": max(slot.peak_rss_bytes for slot in mine),
            "own_bytes": max(slot.own_bytes for slot in mine),
            "slots": [dataclasses.asdict(slot) for slot in mine],
        }
        for name, mine in slots.items()
    }


def commit() -> str | None:
    """The source's git commit, `-dirty` where files differ from it; None outside a repository."""
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40")


def _output(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() or None if run.returncode == 0 else None


def document(
    suite: str,
    *,
    machine: dict,
    options: dict,
    unit: str,
    reference: str,
    arms: dict[str, dict],
    tables: dict[str, list[dict]],
) -> dict:
    """One benchmark run as JSON-safe data.

    - `suite`, `date` (UTC, ISO 8601), `commit` (see `commit`), `command` (arguments), `options` (resolved);
    - `machine`: see `pipeline.system.machine.describe`;
    - `unit` of an item, `reference` arm;
    - `arms`: name -> `rate` (items/s), `ratio` (to the reference, same round), `cpu_ms` (per item), each as
      `{median, q1, q3, min, max}` over rounds; `peak_rss_bytes`, `own_bytes` (largest of the rounds); `slots`, one
      `Slot` per round;
    - `tables`: name -> rows, what else the suite found.
    """
    return {
        "suite": suite,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": sys.argv[1:],
        "options": json.loads(json.dumps(options, default=str)),
        "machine": machine,
        "unit": unit,
        "reference": reference,
        "arms": arms,
        "tables": tables,
    }


def write(path: Path, found: dict) -> None:
    """Write a `document` as JSON. Raises UserError if the file cannot be written."""
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def show(found: dict) -> None:
    """Print the machine and the arms of a `document`."""
    about, unit, reference = found["machine"], found["unit"], found["reference"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    console_out.print(
        f"{about['cpu']}, {about['cores']} cores, {about['ram_bytes'] / 2**30:.0f} GiB, GPU {about['gpu'] or 'none'}, "
        f"load {about['load']:.1f} at the start; {versions}; {found['date']}, commit {found['commit'] or 'none'}",
        highlight=False,
    )
    rates, costs = [], []
    for name, arm in found["arms"].items():
        rate, ratio = arm["rate"], arm["ratio"]
        rates.append(
            {
                "arm": name,
                f"{unit}/s": _rate(rate["median"]),
                "quartiles": f"{_rate(rate['q1'])} – {_rate(rate['q3'])}",
                f"× {reference}": ratio["median"],
                "min – max": f"{ratio['min']:.2f} – {ratio['max']:.2f}",
            }
        )
        costs.append(
            {
                "arm": name,
                f"CPU ms/{unit.removesuffix('s')}": arm["cpu_ms"]["median"],
                "quartiles": f"{arm['cpu_ms']['q1']:.2f} – {arm['cpu_ms']['q3']:.2f}",
                "own MiB": f"{arm['own_bytes'] / 2**20:,.0f}",
                "peak RSS MiB": f"{arm['peak_rss_bytes'] / 2**20:,.0f}",
            }
        )
    show_table(f"{found['suite']}: rate, {len(found['arms'][reference]['slots'])} interleaved rounds", rates)
    show_table(f"{found['suite']}: cost", costs)


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def show_table(title: str, rows: list[dict]) -> None:
    """Print rows of one shape; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for at, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if at else "left")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console_out.print(table)
