"""Records of a run and the page that they make, for the tests that read it."""

import re
from pathlib import Path

import numpy as np
from support import undrawn
from support.nodes import Node

from pipeline.training import page as run_page

PLOTS = {
    "Accuracy": ("top1", "top5"),
    "Loss and its parts": ("loss", "ce", "kl_o", "kl_a"),
    "Weight of the augmented views": ("w",),
    "Agreement": ("agreement",),
    "Entropies": ("student_entropy", "teacher_entropy"),
    "Learning rate": ("lr",),
    "Throughput": ("images_per_s",),
    "Waiting for data": ("wait_share",),
    "Time of a step": ("times",),
}
MEANS = [key for keys in list(PLOTS.values())[1:-1] for key in keys]
TIMES = ("wait", "forward", "loss", "backward", "optimiser")
PERCENT = {"top1", "top5", "agreement", "wait_share"}
CONFIG = {
    "student": "timm/resnet18",
    "data": "data/train",
    "loss": "ccd",
    "epochs": 9,
    "milestones": [3, 6],
    "val": None,
    "resume": False,
}
RUN = {
    "command": ["/opt/bin/pipeline", "train-student", "--data", "my data/it's", "--out", "r"],
    "versions": {"torch": "2.8.0", "timm": "1.0.20"},
    "device": "NVIDIA H100",
    "machine": "node7",
    "started": "2026-11-21T10:00:00+00:00",
    "world": 8,
    "parameters": 11_689_512,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "teacher": "timm/resnet34",
    "store": "s3://bucket/labels",
}


def records(epochs: int = 3, steps: int = 4, seed: int = 0) -> list[dict]:
    """Step records at 1, 2, … of `steps`, then one of the epoch, all but the second validated; values are random."""
    rng = np.random.default_rng(seed)

    def values(*keys: str) -> dict:
        return dict(zip(keys, rng.uniform(0.1, 0.9, len(keys)).tolist(), strict=True))

    found = []
    for epoch in range(epochs):
        for step in range(1, steps + 1):
            found.append({"epoch": epoch, "step": step, "steps": steps, **values(*MEANS, "scale")})
        last = {"epoch": epoch, **values(*MEANS, "scale"), "seconds": 7.25 * epoch, "times": values(*TIMES)}
        found.append(last if epoch == 1 else {**last, "val": {**values("top1", "top5", "loss"), "samples": 360_000}})
    return found


def written(out: Path, lines: list, config: dict = CONFIG, run: dict = RUN) -> Path:
    """The page of a run with these records."""
    out.mkdir(exist_ok=True)
    assert run_page.write(out, config, run, lines, undrawn.drawn(lines)) == out / "report.html"
    return out / "report.html"


def plots(page: Node) -> dict[str, Node]:
    return {figure.all("figcaption")[0].text(): figure for figure in page.all("figure")}


def cells(node: Node) -> dict[str, list[str]]:
    """Rows of tables by their first cell."""
    return {row[0]: row[1:] for row in ([c.text() for c in tr.all("td")] for tr in node.all("tr")) if row}


def by_id(figure: Node, pattern: str) -> dict[str, Node]:
    found = {node.attributes["id"]: node for node in figure.all("g") if "id" in node.attributes}
    return {name: node for name, node in found.items() if re.fullmatch(pattern, name)}


def scale(figure: Node, axis: str) -> np.ndarray:
    """What takes a coordinate of the SVG to a value, by the ticks: slope and intercept."""
    ticks = by_id(figure, rf"{axis}tick_\d+").values()
    at = [float(tick.all("use")[0].attributes[axis]) for tick in ticks]
    return np.polyfit(at, [float(tick.all("text")[0].text().replace("−", "-")) for tick in ticks], 1)


def line(figure: Node, name: str) -> np.ndarray:
    """Values f64 (n, 2) that a line goes through, as a reader would take them off the axes."""
    path = by_id(figure, name)[name].all("path")[0].attributes["d"]
    points = np.array(re.findall(r"[ML] (\S+) (\S+)", path), float)
    return np.stack([np.polyval(scale(figure, axis), points[:, i]) for i, axis in enumerate("xy")], 1)
