"""The HTML page of a training run, from the records at hand: what was run, where it is, and how it got there.

What a record lacks is left out: kinds of runs differ, and a resumed one may be older than what is recorded today.
"""

import json
import math
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

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


class Course(NamedTuple):
    """Plots, and how many epochs they show."""

    epochs: int
    figures: list[tuple[str, Markup]]
    """Captions and plots."""


def write(out: Path, config: dict, facts: dict, records: list[dict], course: Course | None) -> Path:
    """Write `out`/report.html; returns its path.

    `config` and `facts` are those of config.json and run.json, `records` those of metrics.jsonl. `course` may be older:
    it takes seconds to draw, all else milliseconds. Raises UserError if the page cannot be written.
    """
    steps, epochs = _parted(records)
    trained = _counted(epochs[-1]) if epochs else 0
    network = config.get("student") or config["teacher"]
    page = document(
        "pipeline/training/page.html",
        title=f"{network} on {config['data']}, {config.get('loss', 'cross-entropy')}",
        about=f"{trained:,} of {config['epochs']} epochs; run {out}",
        command=shlex.join(facts["command"]),
        facts=_facts(facts),
        options=[(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in config.items()],
        validation=_validation(epochs),
        training=_training(steps, epochs),
        course=course,
        trained=trained,
    )
    path = out / "report.html"
    write_atomically(path, page)
    return path


def _facts(facts: dict) -> list[tuple[str, object]]:
    """Rows of what a run started with."""
    rows = {
        "started": facts["started"],
        "machine": facts["machine"],
        "device": facts["device"],
        "processes": facts["world"],
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "parameters": f"{facts['parameters']:,}",
        "mean and std of its input": "; ".join(
            ", ".join(f"{value!s:.6}" for value in facts[name][:3]) for name in ("mean", "std")
        ),
        "teacher": facts.get("teacher"),
        "store": facts.get("store"),
    }
    return [(name, value) for name, value in rows.items() if value]


def _validation(epochs: list[dict]) -> list[tuple]:
    """Rows of the last accuracy, and of the best if it is another."""
    found = [(record, record["val"]) for record in epochs if "top1" in record.get("val", {})]
    if not found:
        return []

    def row(name: str, record: dict, val: dict) -> tuple:
        kinds = {"top1": "%", "top5": "%", "loss": "", "samples": ",.0f"}
        return name, f"{_counted(record):,}", *(_shown(val.get(key), form) for key, form in kinds.items())

    finite = [pair for pair in found if _drawable(pair[1]["top1"])] or found
    best = max(finite, key=lambda pair: pair[1]["top1"])
    return [row("last", *found[-1]), *([] if best is found[-1] else [row("best top-1", *best)])]


def _training(steps: list[dict], epochs: list[dict]) -> dict:
    """Table of the last epoch's means and, if it came later, of the last step: where a run breaks down."""
    columns = {}
    if epochs:
        columns[f"epoch {_counted(epochs[-1]):,}, mean"] = epochs[-1]
    if steps and (not epochs or steps[-1]["epoch"] > epochs[-1]["epoch"]):
        step = steps[-1]
        columns[f"epoch {_counted(step):,}, step {step['step']:,} of {step['steps']:,}"] = step
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
    rows = [(name, *(_shown(r.get(key), form) for r in columns.values())) for key, (name, form) in kinds.items()]
    for part in _PARTS:
        rows.append((f"{part}, ms per step", *(_shown(_ms(record, part)) for record in columns.values())))
    return {"head": ("", *columns), "rows": [row for row in rows if any(row[1:])]}


def drawn(records: list[dict]) -> Course:
    """Raises UserError without matplotlib."""
    steps, epochs = _parted(records)
    validated = [{**record["val"], "epoch": record["epoch"]} for record in epochs if "val" in record]
    plots = [(plot.title, plot.beside, _lines(plot, steps, epochs)) for plot in _PLOTS]
    plots.insert(0, (_ACCURACY.title, _ACCURACY.beside, _lines(_ACCURACY, [], validated)))
    plots.append(("Time of a step", "ms per step", _stack(epochs)))
    figures = [(title, svg(title, draw, "epochs", beside)) for title, beside, draw in plots if draw]
    return Course(_counted(epochs[-1]) if epochs else 0, figures)


def _lines(plot: _Plot, steps: list[dict], epochs: list[dict]) -> Callable[[Any], None] | None:
    """Draws a line per key, thin through the steps and bold through the epochs; None without a point."""
    at_steps = [r["epoch"] + r["step"] / r["steps"] for r in steps]
    at_epochs = [r["epoch"] + plot.at for r in epochs]
    kinds = (
        ("steps", at_steps, steps, {"linewidth": 0.6, "alpha": 0.6}),
        ("epochs", at_epochs, epochs, {"linewidth": 1.8}),
    )
    lines = []
    for (key, name), colour in zip(plot.lines.items(), _COLOURS, strict=False):
        for kind, at, records, style in kinds:
            x, y = _points(at, (record.get(key) for record in records))
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
    heights = np.array([[t if _drawable(t) else 0.0 for t in row] for row in times])
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
    pairs = [(x, y) for x, y in zip(at, values, strict=True) if _drawable(y)]
    x, y = np.array(pairs, float).reshape(-1, 2).T
    if len(x) > _DRAWN:
        groups = np.array_split(np.arange(len(x)), _DRAWN // 2)
        kept = np.unique([group[pick(y[group])] for group in groups for pick in (np.argmin, np.argmax)])
        x, y = x[kept], y[kept]
    return x, y


def _parted(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """Those of steps and those of epochs."""
    return [r for r in records if "step" in r], [r for r in records if "step" not in r]


def _ms(record: dict, part: str) -> float | None:
    seconds = record.get("times", {}).get(part)
    return None if seconds is None else 1000 * seconds


def _counted(record: dict) -> int:
    """Epochs trained at the end of this one: records count from 0, people from 1."""
    return record["epoch"] + 1


def _drawable(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) <= _LARGEST


def _shown(value: float | None, form: str = "") -> str:
    """Five digits, or by `form`, of which % is that of a share."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if form == "%" else format(value, form or ",.5g")
