"""The page of `pipeline bench all`: plots and every table of its suites, in one HTML file that loads nothing."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pipeline.system import html

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2")
_OURS, _THEIRS = _COLOURS[0], "#9aa5b1"
_PHASES = ("wait", "forward", "loss", "backward", "optimiser")

Draw = Callable[[Any], None]


def render(found: dict) -> bytes:
    """The page of a document of `bench.whole.all`."""
    about, suites = found["machine"], found["suites"]
    return html.document(
        "bench/whole/page.html",
        title="Benchmarks of jda-distill",
        about=f"{about['cpu']}, {about['cores']} cores, {about['gpu'] or 'no GPU'}; "
        f"{found['date']}, commit {found['commit'] or 'none'}",
        machine=_machine(found),
        sections=[_section(name, suites[name]) for name in _SECTIONS if name in suites],
    )


def _machine(found: dict) -> list[tuple[str, object]]:
    about = found["machine"]
    rows = [(name, about[name]) for name in ("cpu", "cores", "gpu", "kernel")]
    rows += [("memory", f"{about['ram_bytes'] / 2**30:.0f} GiB"), ("load at the start", f"{about['load']:.1f}")]
    rows += list(about["versions"].items())
    rows.append(("command", "pipeline " + " ".join(map(str, found["command"]))))
    return rows


def _section(name: str, suite: dict) -> dict:
    """Of a suite: `title`, `figures` of (caption, SVG), `tables` of (title, head, rows)."""
    title, plots = _SECTIONS[name]
    figures = [
        (caption, html.svg(f"{name} {number}", draw, below, beside))
        for number, (caption, below, beside, draw) in enumerate(plots(suite))
    ]
    tables = {"arms": [_arm(arm, row) for arm, row in suite["arms"].items()]} | suite["tables"]
    return {"title": title, "figures": figures, "tables": [_table(*each) for each in tables.items() if each[1]]}


def _arm(name: str, row: dict) -> dict:
    shown = {"arm": name}
    for key in ("rate", "ratio", "cpu_ms"):
        if key in row:
            shown |= {key: row[key]["median"], f"{key} q1": row[key]["q1"], f"{key} q3": row[key]["q3"]}
    return shown


def _table(title: str, rows: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    head = list(dict.fromkeys(key for row in rows for key in row))
    return title, head, [[_shown(row.get(key, "")) for key in head] for row in rows]


def _shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _bars(rows: Iterable[tuple[str, float, float, float]], ours: str) -> Draw:
    """Lying bars of (name, median, q1, q3), the first on top; a line from quartile to quartile."""
    names, values, low, high = zip(*rows, strict=True)

    def draw(axes: Any) -> None:
        at = np.arange(len(names))
        colours = [_OURS if name.startswith(ours) else _THEIRS for name in names]
        errors = np.abs(np.array([low, high]) - values)
        axes.barh(at, values, xerr=errors, color=colours, error_kw={"elinewidth": 1, "ecolor": "#555"})
        axes.set_yticks(at, names)
        axes.invert_yaxis()

    return draw


def _spread(name: str, found: dict) -> tuple[str, float, float, float]:
    return name, found["median"], found["q1"], found["q3"]


def _end_to_end(suite: dict):
    rows = suite["tables"]["step"]
    phases = [phase for phase in _PHASES if any(f"{phase} ms" in row for row in rows)]

    def stacked(axes: Any) -> None:
        left = np.zeros(len(rows))
        for phase, colour in zip(phases, _COLOURS, strict=False):
            values = np.array([row.get(f"{phase} ms", 0.0) for row in rows])
            axes.barh(range(len(rows)), values, left=left, color=colour, label=phase)
            left += values
        axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
        axes.invert_yaxis()
        axes.figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize="x-small")

    yield "A student's step by its phases, medians", "ms", "", stacked
    if "× ce" in rows[0]:
        spread = [(row["arm"], row["× ce"], row["× ce q1"], row["× ce q3"]) for row in rows]
        yield "The step against that of cross-entropy alone, same round", "× ce", "", _bars(spread, "stored")
    for row in suite["tables"].get("break-even", ()):
        caption = f"What the teacher costs, {row['live teacher']}: in the loop, or once for ten views"
        yield caption, "epochs trained on ImageNet-1k", "hours", _even(row)


def _even(row: dict) -> Draw:
    def draw(axes: Any) -> None:
        epochs = row["epochs until 10 views have paid"]
        last = 2 * epochs if 0 < epochs < math.inf else 100
        x = np.linspace(0, max(last, 20), 200)
        axes.plot(x, x * row["h saved per epoch"], color=_THEIRS, label="live teacher")
        axes.plot(x, np.minimum(np.ceil(x), 10) * row["h per view"], color=_OURS, label="stored, each view once")
        axes.legend(frameon=False, fontsize="small")

    return draw


def _loader(suite: dict):
    arms, ours = suite["arms"], suite["reference"]
    yield (
        "View pairs through each loader, medians and quartiles", "pairs/s", "",
        _bars([_spread(name, arm["rate"]) for name, arm in arms.items()], ours),
    )  # fmt: skip
    yield (
        "CPU time of a pair", "ms", "",
        _bars([_spread(name, arm["cpu_ms"]) for name, arm in arms.items()], ours),
    )  # fmt: skip
    parts = [row for row in suite["tables"].get("profile", ()) if row["stage"] != "total"]
    if parts:
        bars = [(row["stage"], *[row["CPU ms/pair"]] * 3) for row in parts]
        yield f"Where {ours} spends it", "ms", "", _bars(bars, "")


def _store(suite: dict):
    formats = suite["tables"]["formats"]
    for teacher in dict.fromkeys(row["teacher"] for row in formats):
        yield (
            f"Label formats on logits of {teacher}; filled: unbiased",
            "bytes per vector on disk", "KL(T = 4), nats",
            _frontier([row for row in formats if row["teacher"] == teacher]),
        )  # fmt: skip
    read = [(row["reader"], *[row["MB/s"]] * 3) for row in suite["tables"]["storage"]]
    yield "Reading a view's labels, cold", "MB/s", "", _bars(read, "this store")


def _frontier(rows: list[dict]) -> Draw:
    def draw(axes: Any) -> None:
        for row in rows:
            colour = _OURS if row["format"].startswith("subspace") else _COLOURS[1]
            fill = "full" if abs(row["slope"] - 1) <= 0.02 else "none"
            axes.plot(row["on disk"], max(row["KL T=4"], 1e-7), "o", color=colour, fillstyle=fill, markersize=4)
        ours = sorted((row["on disk"], row["KL T=4"]) for row in rows if row["format"].startswith("subspace"))
        axes.plot(*zip(*ours, strict=True), color=_OURS, linewidth=1, label="this store")
        axes.plot([], [], "o", color=_COLOURS[1], markersize=4, label="other formats")
        axes.set(xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize="small")

    return draw


def _kernels(suite: dict):
    if times := suite["tables"].get("time"):
        for size in dict.fromkeys(row["size"] for row in times):
            mine = [row for row in times if row["size"] == size]
            kind = next(key for key in ("replayed cold µs", "replayed µs", "called µs") if key in mine[0])
            bars = [(row["arm"], *[row.get(kind, row["called µs"])] * 3) for row in mine]
            bars.append(("floor, bf16 dense", *[mine[0]["floor µs"]] * 3))
            yield f"Loss and gradient, {size}, {kind.removesuffix(' µs')}", "µs", "", _bars(bars, "ours")
    else:
        launches = [(row["path"], *[row["forward"] + row["backward"]] * 3) for row in suite["tables"]["operators"]]
        yield "Launches of loss and gradient (nothing is timed without a GPU)", "launches", "", _bars(launches, "these")
    moved = [row for row in suite["tables"]["bytes"] if row["classes"] == 1000 and row["student"] == "bf16"]
    bars = [(f"labels {row['teacher']}", *[row["bytes"] / 1000] * 3) for row in moved]
    yield "What a pair of 1000 classes moves, student in bf16", "kB", "", _bars(bars, "labels subspace")


_SECTIONS = {
    "end-to-end": ("End to end", _end_to_end),
    "loader": ("Loader", _loader),
    "store": ("Store", _store),
    "kernels": ("Loss kernels", _kernels),
}
