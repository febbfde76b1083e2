"""The page of a run says what its records say, draws what there is, and survives numbers of runs that broke down."""

import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support import undrawn
from support.nodes import HOSTILE, Node, section
from support.run_pages import (
    CONFIG,
    MEANS,
    PERCENT,
    PLOTS,
    RUN,
    TIMES,
    by_id,
    cells,
    line,
    plots,
    records,
    scale,
    written,
)

from cache import UserError
from pipeline.system import files
from pipeline.training import page as run_page
from pipeline.training import record as run_record


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("run") / "r", records())


@pytest.fixture(scope="module")
def page(file) -> Node:
    return Node(file.read_text())


def test_the_title_names_student_data_and_loss(page, tmp_path):
    assert page.all("h1")[0].text() == page.all("title")[0].text() == "timm/resnet18 on data/train, ccd"
    assert "3 of 9 epochs" in page.text()
    teacher = Node(written(tmp_path / "t", [], {"teacher": "cifar/resnet8", "data": "d", "epochs": 1}).read_text())
    assert teacher.all("h1")[0].text() == "cifar/resnet8 on d, cross-entropy"


def test_facts_and_options_are_those_of_the_run(page):
    facts = cells(section(page, "Run"))
    for key in ("device", "machine", "started", "teacher", "store"):
        assert facts[key] == [RUN[key]]
    assert facts["processes"] == ["8"] and facts["parameters"] == ["11,689,512"]
    assert facts["versions"] == ["torch 2.8.0, timm 1.0.20"]
    (options,) = section(page, "Run").all("details")
    assert "open" not in options.attributes
    shown = {name: value for name, (value,) in cells(options).items()}
    assert shown == {name: v if isinstance(v, str) else json.dumps(v) for name, v in CONFIG.items()}


def test_a_shell_takes_the_command_back_to_its_arguments(tmp_path):
    """printf stands in for the program, and prints each argument that the shell gives it."""
    arguments = ["a b", "it's", '"$HOME" `id` $(id)', "", "*", "two  spaces\nand a line", HOSTILE, "ünï", "--x=\\n"]
    page = Node(written(tmp_path / "r", [], run={**RUN, "command": ["printf", "%s|", *arguments]}).read_text())
    (command,) = section(page, "Run").all("pre")
    pasted = "".join(command.children)
    said = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, check=True).stdout
    assert said == "".join(f"{argument}|" for argument in arguments)
    assert shlex.split(pasted)[2:] == arguments


def test_figures_are_those_of_the_last_epoch(page):
    last = records()[-1]
    validation = section(page, "Validation")
    head = [cell.text() for cell in validation.all("th")]
    shown = dict(zip(head[1:], cells(validation)["last"], strict=True))
    assert shown["after epochs"] == "3" and shown["samples"] == "360,000"
    assert shown["top-1"] == f"{100 * last['val']['top1']:.2f} %"
    assert shown["top-5"] == f"{100 * last['val']['top5']:.2f} %"
    assert float(shown["loss, nats"]) == pytest.approx(last["val"]["loss"], rel=1e-4)
    rows = cells(section(page, "Training"))
    names = {
        "loss": "loss",
        "ce": "cross-entropy, nats",
        "kl_o": "KL of the original views, nats",
        "kl_a": "KL of the augmented views, nats",
        "w": "mean w",
        "student_entropy": "entropy of the student at T = 1, nats",
        "teacher_entropy": "entropy of the teacher at T = 1, nats",
        "lr": "learning rate",
    }
    for key, name in names.items():
        assert [float(cell) for cell in rows[name]] == [pytest.approx(last[key], rel=1e-4)]
    assert rows["views with the teacher's top class"] == [f"{100 * last['agreement']:.2f} %"]
    assert rows["share of a step spent waiting for data"] == [f"{100 * last['wait_share']:.2f} %"]
    assert rows["images/s"] == [f"{last['images_per_s']:.1f}"] and rows["seconds since the start"] == ["14.5"]
    for part, seconds in last["times"].items():
        assert float(rows[f"{part}, ms per step"][0]) == pytest.approx(1000 * seconds, rel=1e-4)


def test_the_best_epoch_is_shown_beside_the_last(tmp_path):
    lines = [{"epoch": e, "val": {"top1": top1}} for e, top1 in enumerate([math.nan, 0.5, 0.75, math.nan, 0.625])]
    rows = cells(section(Node(written(tmp_path / "r", lines).read_text()), "Validation"))
    assert rows["last"][:2] == ["5", "62.50 %"] and rows["best top-1"][:2] == ["3", "75.00 %"]


def test_a_run_that_broke_down_after_its_last_epoch_shows_the_step(tmp_path):
    lines = [*records(), {"epoch": 3, "step": 2, "steps": 4, "loss": math.nan}]
    page = Node(written(tmp_path / "r", lines).read_text())
    training = section(page, "Training")
    assert [cell.text() for cell in training.all("th")] == ["", "epoch 3, mean", "epoch 4, step 2 of 4"]
    assert cells(training)["loss"] == [f"{lines[-2]['loss']:.5g}", "nan"]
    assert "3 of 9 epochs" in page.text()


def test_every_line_goes_through_its_records(page):
    """Read off the SVG by its ticks. An epoch's mean lies in the middle of the epoch, what holds at its end there.

    Bound: coordinates have six decimals; ticks are exact numbers; 1e-4 of a range is a thirtieth of a pixel.
    """
    steps = [record for record in records() if "step" in record]
    epochs = [record for record in records() if "step" not in record]
    seen = 0
    for title, keys in list(PLOTS.items())[:-1]:
        figure = plots(page)[title]
        assert set(by_id(figure, r".*-(steps|epochs)")) == {
            f"{key}-{kind}" for key in keys for kind in (("steps", "epochs") if title != "Accuracy" else ("epochs",))
        }
        for key in keys:
            factor = 100 if key in PERCENT else 1
            if title == "Accuracy":
                expected = {"epochs": [(r["epoch"] + 1, r["val"][key]) for r in epochs if "val" in r]}
            else:
                at = 1 if key == "lr" else 0.5
                expected = {"epochs": [(r["epoch"] + at, r[key]) for r in epochs]}
                expected["steps"] = [(r["epoch"] + r["step"] / 4, r[key]) for r in steps]
            for kind, points in expected.items():
                drawn = line(figure, f"{key}-{kind}")
                np.testing.assert_allclose(drawn, np.array(points) * [1, factor], atol=1e-4 * 3 * factor)
                seen += 1
    assert seen == 2 + 2 * len(MEANS)


def test_bars_stack_the_times_of_the_epochs(page):
    figure = plots(page)["Time of a step"]
    horizontal, vertical = scale(figure, "x"), scale(figure, "y")
    epochs = [record for record in records() if "step" not in record]
    below = np.zeros(len(epochs))
    for part in TIMES:
        bars = by_id(figure, f"times-{part}")[f"times-{part}"].all("path")
        assert len(bars) == len(epochs)
        corners = [np.array(re.findall(r"[ML] (\S+) (\S+)", bar.attributes["d"]), float).T for bar in bars]
        for i, (x, y) in enumerate(corners):
            left, right = sorted(np.polyval(horizontal, [x.min(), x.max()]))
            assert i < left < right < i + 1
            low, high = sorted(np.polyval(vertical, [y.min(), y.max()]))
            top = below[i] + 1000 * epochs[i]["times"][part]
            np.testing.assert_allclose([low, high], [below[i], top], atol=1)  # of up to 4,500 ms
            below[i] = top


def test_lines_are_named_and_bold_ones_are_bold(page):
    figures = plots(page)
    for words in (
        ("top-1", "top-5"),
        ("cross-entropy", "KL, original", "KL, augmented"),
        ("student", "teacher"),
        TIMES,
    ):
        assert any(all(word in figure.text() for word in words) for figure in figures.values())
    widths = {}
    for kind in ("steps", "epochs"):
        style = by_id(figures["Throughput"], f"images_per_s-{kind}").popitem()[1].all("path")[0].attributes["style"]
        widths[kind] = float(re.findall(r"stroke-width: ([\d.]+)", style)[0])
    assert widths["epochs"] >= 2 * widths["steps"]


def without(lines: list[dict], *keys: str) -> list[dict]:
    """Records less some keys, at any depth."""
    dicts = ({k: v for k, v in record.items() if k not in keys} for record in lines)
    return [{k: without([v], *keys)[0] if isinstance(v, dict) else v for k, v in r.items()} for r in dicts]


@pytest.mark.parametrize("title", PLOTS)
def test_a_plot_is_there_if_and_only_if_its_data_are(title, page, tmp_path, monkeypatch):
    assert list(plots(page)) == list(PLOTS)
    monkeypatch.setattr(run_page, "svg", lambda *_: "")  # 17 plots that nobody looks at take a second
    less = Node(written(tmp_path / "less", without(records(), *PLOTS[title])).read_text())
    expected = set(PLOTS) - {title}
    assert set(plots(less)) == expected
    alone = without(records(), *(key for keys in PLOTS.values() for key in keys if keys != PLOTS[title]))
    assert list(plots(Node(written(tmp_path / "alone", alone).read_text()))) == [title]
    not_finite = [blank(record, PLOTS[title]) for record in records()]
    assert set(plots(Node(written(tmp_path / "nan", not_finite).read_text()))) == expected


def blank(record: dict, keys: tuple[str, ...]) -> dict:
    """NaN and infinities for these keys."""
    bad = {"times": dict.fromkeys(TIMES, math.inf)}
    found: dict = {k: bad.get(k, math.nan) if k in keys else v for k, v in record.items()}
    return {**found, "val": blank(found["val"], keys)} if "val" in found else found


def test_a_line_of_two_keys_needs_only_one(tmp_path):
    figures = plots(Node(written(tmp_path / "r", without(records(), "kl_a", "ce")).read_text()))
    assert set(by_id(figures["Loss and its parts"], ".*-epochs")) == {"loss-epochs", "kl_o-epochs"}


def test_a_gap_of_nan_does_not_hide_the_rest(tmp_path):
    lines = [{"epoch": e, "loss": math.nan if e == 2 else e / 8} for e in range(6)]
    drawn = line(plots(Node(written(tmp_path / "r", lines).read_text()))["Loss and its parts"], "loss-epochs")
    np.testing.assert_allclose(drawn[[0, -1]], [[0.5, 0], [5.5, 0.625]], atol=1e-3)


def test_one_record_is_a_mark(tmp_path):
    figure = plots(Node(written(tmp_path / "r", [{"epoch": 0, "step": 1, "steps": 4, "loss": 2.5}]).read_text()))
    (group,) = by_id(figure["Loss and its parts"], "loss-steps").values()
    assert len(group.all("use")) == 1, "a line through one point is invisible"


def test_of_many_steps_the_spikes_are_drawn_and_the_page_stays_small(tmp_path):
    """Thinned to 800 points of at most 26 bytes each per line; 11 lines, and as much again for axes and styles."""
    rng = np.random.default_rng(0)
    lines = [{"epoch": e, "step": s, "steps": 2000, **dict.fromkeys(MEANS, 0.5)} for e in range(5) for s in range(2000)]
    for record, noise in zip(lines, rng.uniform(0, 0.1, len(lines)), strict=True):
        record.update({key: record[key] + noise for key in MEANS})
    lines[6789]["loss"] = 3.0
    lines[1234]["loss"] = -2.0
    file = written(tmp_path / "r", lines)
    drawn = line(plots(Node(file.read_text()))["Loss and its parts"], "loss-steps")
    for at, value in ((6789, 3.0), (1234, -2.0)):
        x = lines[at]["epoch"] + lines[at]["step"] / 2000
        assert np.abs(drawn - [x, value]).max(1).min() < 0.01
    assert len(drawn) <= 800 and file.stat().st_size < 2 * 11 * 800 * 26


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e308, -1e308, 1e30, 5e-324, 0, -1])
def test_wild_numbers_are_survived(value, tmp_path):
    """Alone, and beside ordinary ones; warnings are errors here."""

    def wild(record: dict) -> dict:
        return {
            k: wild(v) if isinstance(v, dict) else v if k in ("epoch", "step", "steps") else value
            for k, v in record.items()
        }

    alone = [wild(record) for record in records()]
    assert "<h1>" in written(tmp_path / "r", [*records()[:5], *alone[5:]]).read_text()
    page = Node(written(tmp_path / "r", alone).read_text())
    for text in re.findall(r"<svg.*?</svg>", (tmp_path / "r" / "report.html").read_text(), re.DOTALL):
        assert not re.search(r"\b(nan|inf)\b", ElementTree.canonicalize(text))
    assert cells(section(page, "Training"))["loss"] == [format(value, ",.5g")]


def test_plots_may_be_older_than_the_rest(tmp_path):
    """They take seconds to draw, and the rest milliseconds."""
    lines = records()
    page = Node(run_page.write(tmp_path, CONFIG, RUN, lines, undrawn.drawn(lines[:5])).read_text())
    assert "3 of 9 epochs" in page.text() and "Drawn after epoch 1." in section(page, "Course").text()
    assert len(line(plots(page)["Loss and its parts"], "loss-steps")) == 4
    page = Node(run_page.write(tmp_path, CONFIG, RUN, lines, None).read_text())
    assert "3 of 9 epochs" in page.text() and "Not drawn yet." in page.text() and not plots(page)


def test_an_epoch_has_a_page_unless_the_last_is_a_second_old_and_plots_every_five_minutes(tmp_path, monkeypatch):
    clock, lines, seen = SimpleNamespace(now=0.0, monotonic=lambda: clock.now), [], []
    monkeypatch.setattr(run_record, "time", clock)
    monkeypatch.setattr(run_page, "drawn", undrawn.drawn)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config: Any = SimpleNamespace(out=tmp_path, tensorboard=False, wandb=None)
    writers = run_record.Writers(config, True, RUN, lines)
    for epoch, clock.now in enumerate([0.5, 1.0, 2.0, 300.0, 302.0, 310.0]):
        lines.append({"epoch": epoch, "loss": 0.5})
        writers.epoch(epoch, epoch + 1, {})
        text = Node((tmp_path / "report.html").read_text()).text()
        seen.append((int(re.findall(r"(\d) of 9 epochs", text)[0]), "Loss and its parts" in text))
    assert seen == [(1, False), (1, False), (3, False), (4, False), (5, True), (6, True)]
    assert "Drawn after epoch 5." in text
    writers.close()
    assert "Drawn after" not in (tmp_path / "report.html").read_text()


def test_the_same_records_make_the_same_page(file):
    before = file.read_bytes()
    assert written(file.parent, records()).read_bytes() == before


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = written(tmp_path / "r", [])
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"cannot write .*report\.html"):
        patched.setattr(files.os, "replace", full)
        written(tmp_path / "r", records())
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
