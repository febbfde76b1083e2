"""The HTML page that a training run leaves behind: what was run, where it ended, and how it got there.

Its sources may be those of a killed run and cut short: whatever is missing or malformed there is left out here.
"""

import json
import math
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.system.files import write_atomically
from pipeline.system.html import document, svg

_DRAWN = 800  # points of a line, more than a plot has pixels across
_MARKED = 40  # points that are marked: a line through one point is invisible
_LARGEST = 1e30  # beyond it matplotlib's own arithmetic overflows
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2")
_PARTS = ("wait", "forward", "loss", "backward", "optimiser")  # of a step


class _Plot(NamedTuple):
    title: str
    beside: str
    lines: dict[str, str]
    """Key of the records -> name in the legend."""
    factor: float = 1.0
    at: float = 0.5
    """Where in its epoch an epoch's value belongs: a mean in the middle."""
    from_zero: bool = False


_PLOTS = (
    _Plot(
        "Loss and its parts",
        "loss",
        {"loss": "loss", "ce": "cross-entropy", "kl_o": "KL, original", "kl_a": "KL, augmented"},
    ),
    _Plot("Weight of the augmented views", "mean w", {"w": "w"}),
    _Plot("Agreement", "same top class, % of views", {"agreement": "agreement"}, 100.0),
    _Plot("Entropies", "at T = 1, nats", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    _Plot("Learning rate", "learning rate", {"lr": "lr"}, at=1.0, from_zero=True),
    _Plot("Throughput", "images/s", {"images_per_s": "images/s"}, from_zero=True),
    _Plot("Waiting for data", "share of a step, %", {"wait_share": "wait"}, 100.0, from_zero=True),
)
_ACCURACY = _Plot("Accuracy", "validation accuracy, %", {"top1": "top-1", "top5": "top-5"}, 100.0, 1.0)


def write(out: Path) -> Path:
    """Write `out`/report.html from config.json, metrics.jsonl and run.json of that folder; returns its path.

    Raises UserError if the page cannot be written.
    """
    config, facts = _object(_read(out / "config.json")), _object(_read(out / "run.json"))
    steps, epochs = _records(_read(out / "metrics.jsonl"))
    network = config.get("student") or config.get("teacher") or "a network"
    title = f"{network} on {config.get('data', 'unknown data')}, {config.get('loss', 'cross-entropy')}"
    trained = f"{_counted(epochs[-1]) if epochs else 0:,.0f} of {config.get('epochs', '?')} epochs"
    path = out / "report.html"
    page = document(
        "pipeline/training/page.html",
        title=title,
        about=f"{trained}; run {out}",
        **_run(config, facts),
        validation=_validation(epochs),
        training=_training(steps, epochs),
        figures=_course(steps, epochs),
    )
    write_atomically(path, page)
    return path


def _normalisation(facts: dict) -> str | None:
    """Of the channels, as the network has them."""
    both = [facts.get("mean"), facts.get("std")]
    if not all(isinstance(each, list) for each in both):
        return None
    return "; ".join(", ".join(f"{value!s:.6}" for value in each[:3]) for each in both if each)


def _run(config: dict, facts: dict) -> dict:
    """`command`, `facts` and `options`, as a page shows them."""
    command, versions = facts.get("command"), facts.get("versions")
    rows = {
        "started": facts.get("started"),
        "machine": facts.get("machine"),
        "device": facts.get("device"),
        "processes": facts.get("world"),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "parameters": _shown(_number(facts, "parameters"), ",.0f"),
        "mean and std of its input": _normalisation(facts),
        "teacher": facts.get("teacher"),
        "store": facts.get("store"),
    }
    return {
        "command": shlex.join(map(str, command)) if isinstance(command, list) else None,
        "facts": [(name, value) for name, value in rows.items() if value not in (None, "")],
        "options": [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in config.items()],
    }


def _validation(epochs: list[dict]) -> list[tuple]:
    """Rows of the last accuracy, and of the best if it is another."""
    found = [pair for pair in _validated(epochs) if _number(pair[1], "top1") is not None]
    if not found:
        return []

    def row(name: str, record: dict, val: dict) -> tuple:
        kinds = {"top1": "%", "top5": "%", "loss": "", "samples": ",.0f"}
        return name, f"{_counted(record):,.0f}", *(_shown(_number(val, key), form) for key, form in kinds.items())

    finite = [pair for pair in found if _drawable(_number(pair[1], "top1"))] or found
    best = max(finite, key=lambda pair: pair[1]["top1"])
    return [row("last", *found[-1]), *([] if best is found[-1] else [row("best top-1", *best)])]


def _training(steps: list[dict], epochs: list[dict]) -> dict:
    """Table of the last epoch's means and, if it came later, of the last step: where a run breaks down."""
    columns = {}
    if epochs:
        columns[f"epoch {_counted(epochs[-1]):,.0f}, mean"] = epochs[-1]
    if steps and (not epochs or steps[-1]["epoch"] > epochs[-1]["epoch"]):
        step = steps[-1]
        of = f" of {_shown(_number(step, 'steps'), ',.0f')}" if _number(step, "steps") else ""
        columns[f"epoch {_counted(step):,.0f}, step {step['step']:,.0f}{of}"] = step
    kinds = {
        "loss": ("loss", ""),
        "ce": ("cross-entropy, nats", ""),
        "kl_o": ("KL of the original views, nats", ""),
        "kl_a": ("KL of the augmented views, nats", ""),
        "w": ("mean w", ""),
        "agreement": ("views with the teacher's top class", "%"),
        "student_entropy": ("entropy of the student at T = 1, nats", ""),
        "teacher_entropy": ("entropy of the teacher at T = 1, nats", ""),
        "lr": ("learning rate", ""),
        "scale": ("scale of the loss", ",.0f"),
        "images_per_s": ("images/s", ",.1f"),
        "wait_share": ("share of a step spent waiting for data", "%"),
        "seconds": ("seconds since the start", ",.1f"),
    }
    rows = [(name, *(_shown(_number(r, key), form) for r in columns.values())) for key, (name, form) in kinds.items()]
    for part in _PARTS:
        rows.append((f"{part}, ms per step", *(_shown(_ms(record, part)) for record in columns.values())))
    return {"head": ("", *columns), "rows": [row for row in rows if any(row[1:])]}


def _course(steps: list[dict], epochs: list[dict]) -> list[tuple[str, Markup]]:
    """Captions and plots."""
    validated = [{**val, "epoch": record["epoch"]} for record, val in _validated(epochs)]
    sources = [(_ACCURACY, [], validated), *((plot, steps, epochs) for plot in _PLOTS)]
    drawn = [(plot.title, plot.beside, _lines(plot, *records)) for plot, *records in sources]
    drawn.append(("Time of a step", "ms per step", _stack(epochs)))
    return [(title, svg(title, draw, "epochs", beside)) for title, beside, draw in drawn if draw]


def _lines(plot: _Plot, steps: list[dict], epochs: list[dict]) -> Callable[[Any], None] | None:
    """Draws a line per key, thin through the steps and bold through the epochs; None without a point."""
    at_steps = [r["epoch"] + r["step"] / (_number(r, "steps") or math.nan) for r in steps]
    at_epochs = [r["epoch"] + plot.at for r in epochs]
    kinds = (
        ("steps", at_steps, steps, {"linewidth": 0.6, "alpha": 0.6}),
        ("epochs", at_epochs, epochs, {"linewidth": 1.8}),
    )
    lines = []
    for (key, name), colour in zip(plot.lines.items(), _COLOURS, strict=False):
        for kind, at, records, style in kinds:
            x, y = _points(at, (_number(record, key) for record in records))
            if len(x):
                lines.append((x, plot.factor * y, name, {**style, "color": colour, "gid": f"{key}-{kind}"}))
    if not lines:
        return None

    def draw(axes: Any) -> None:
        handles = {}
        for x, y, name, style in lines:
            (handles[name],) = axes.plot(x, y, marker="." if len(x) <= _MARKED else "", **style)
        if plot.from_zero:
            axes.set_ylim(bottom=0)
        _legend(axes, handles)

    return draw


def _stack(epochs: list[dict]) -> Callable[[Any], None] | None:
    """Draws a bar per epoch, of the parts of its mean step; None without times."""
    timed = [record for record in epochs if any(_drawable(_ms(record, part)) for part in _PARTS)]
    if not timed:
        return None
    every = math.ceil(len(timed) / _DRAWN)
    start = np.array([record["epoch"] for record in timed[::every]], float)
    # Both sides of each bar, then a gap.
    x = np.stack([start + 0.05 * every, start + 0.95 * every, np.full(len(start), math.nan)], 1).ravel()
    times = [[_ms(record, part) for part in _PARTS] for record in timed[::every]]
    heights = np.array([[t if t is not None and _drawable(t) else 0.0 for t in row] for row in times])
    tops = heights.cumsum(1)

    def draw(axes: Any) -> None:
        handles = {}
        for i, (part, colour) in enumerate(zip(_PARTS, _COLOURS, strict=True)):
            if heights[:, i].any():
                low, high = (np.repeat(values, 3) for values in (tops[:, i] - heights[:, i], tops[:, i]))
                handles[part] = axes.fill_between(x, low, high, color=colour, linewidth=0, gid=f"times-{part}")
        axes.set_ylim(bottom=0)
        _legend(axes, handles)

    return draw


def _legend(axes: Any, handles: dict[str, Any]) -> None:
    """Above the axes, where it hides nothing; none for a single line, which the axis names."""
    if len(handles) > 1:
        options: Any = {"loc": "upper center", "ncols": 3, "frameon": False, "fontsize": "small"}
        axes.figure.legend(handles.values(), handles.keys(), **options)


def _points(at: Iterable[float], values: Iterable[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Finite points f64 (n,), thinned: of many, the lowest and the highest of each group, so that spikes stay."""
    pairs = [(x, y) for x, y in zip(at, values, strict=True) if y is not None and _drawable(x) and _drawable(y)]
    x, y = np.array(pairs, float).reshape(-1, 2).T
    if len(x) > _DRAWN:
        groups = np.array_split(np.arange(len(x)), _DRAWN // 2)
        kept = np.unique([group[pick(y[group])] for group in groups for pick in (np.argmin, np.argmax)])
        x, y = x[kept], y[kept]
    return x, y


def _records(text: str) -> tuple[list[dict], list[dict]]:
    """Step and epoch records in the order of training; of one step or epoch logged again after a resume, the last."""
    steps, epochs = {}, {}
    for line in text.split("\n"):
        record = _object(line)
        epoch = _number(record, "epoch")
        if not _drawable(epoch):
            continue
        if "step" not in record:
            epochs[epoch] = record
        elif _drawable(step := _number(record, "step")):
            steps[epoch, step] = record
    return [steps[at] for at in sorted(steps)], [epochs[at] for at in sorted(epochs)]


def _validated(epochs: list[dict]) -> list[tuple[dict, dict]]:
    """Epoch records with what their validation found."""
    return [(record, record["val"]) for record in epochs if isinstance(record.get("val"), dict)]


def _ms(record: dict, part: str) -> float | None:
    times = record.get("times")
    seconds = _number(times, part) if isinstance(times, dict) else None
    return None if seconds is None else 1000 * seconds


def _counted(record: dict) -> float:
    """Epochs trained at the end of this one: records count from 0, people from 1."""
    return record["epoch"] + 1


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(record: dict, key: str) -> float | None:
    """None if absent or not a number; NaN and infinity are numbers: a page should say that a run ended so."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _drawable(value: float | None) -> bool:
    return value is not None and abs(value) <= _LARGEST


def _shown(value: float | None, form: str = "") -> str:
    """Five digits, or by `form`, of which % is that of a share."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if form == "%" else format(value, form or ",.5g")
