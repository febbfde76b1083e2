"""Every figure of docs/choosing.md is one of a committed result, and so is what a dry run advises."""

import json
import re
import statistics
from functools import cache
from pathlib import Path

import pytest

from pipeline.labels import advice

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text()
RESULTS = dict(re.findall(r"^- `(\w+)` \(\[all\]\((.+?)\)\)", PAGE, re.MULTILINE))
ROWS = re.findall(r"^\|(.+)\|\s*`(\w+): ([\w-]+): ([^`]+)`\s*\|$", PAGE, re.MULTILINE)
T95 = {3: 4.3027, 5: 2.7764, 10: 2.2622}
"""Student's t, 97.5 %, of as many seeds: Fisher and Yates, table III."""


@cache
def found(name: str) -> dict:
    return json.loads((ROOT / "docs" / RESULTS[name]).read_text())


def seeds(name: str, study: str, what: str) -> list[float]:
    """Differences, or accuracies of a setting."""
    tables = found(name)["tables"]
    for table, column in ((f"{study}: differences", "comparison"), (study, "setting")):
        for row in tables[table]:
            if row[column] == what:
                return row["seeds"]
    raise AssertionError(f"{name} has no {study}: {what}")


def interval(values: list[float]) -> tuple[float, float, float]:
    mean, half = statistics.mean(values), T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def test_the_page_has_figures_and_they_have_sources():
    assert {name for _, name, _, _ in ROWS} == set(RESULTS) and len(ROWS) > 20
    assert all((ROOT / "docs" / path).exists() for path in RESULTS.values())


@pytest.mark.parametrize(("cells", "name", "study", "what"), ROWS, ids=[f"{row[1]}-{row[2]}-{row[3]}" for row in ROWS])
def test_a_row_is_what_the_result_says(cells, name, study, what):
    """Mean and 95 % interval of a difference, or mean and deviation of a setting; verdicts follow from intervals."""
    values = seeds(name, study, what)
    mean, low, high = interval(values)
    texts = [cell.strip().strip("*") for cell in cells.split("|")]
    if any(row.get("comparison") == what for row in found(name)["tables"][f"{study}: differences"]):
        figure = f"{signed(mean)} ({signed(low)} … {signed(high)})"
    else:
        figure = f"{mean:.2f} ± {statistics.stdev(values):.2f}"
    assert figure in texts
    if study.endswith("-KL"):  # less is nearer
        low, high = -high, -low
    verdicts = {"seen": low > 0, "contradicted": high < 0, "not told": low <= 0 <= high}
    for text in texts:
        if text in verdicts:
            assert verdicts[text], f"{text}, but {figure}"


def test_no_figure_stands_in_the_prose_alone():
    """Whatever has a decimal point is in one of the cells that the test above looks at."""
    cells = " ".join(row[0] for row in ROWS)
    prose = "\n".join(line for line in PAGE.splitlines() if not re.search(r"\| `\w+: .+` \|$", line))
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`", "", prose)
    figures = re.findall(r"[+−]?\d+\.\d+", prose)
    assert figures and [figure for figure in figures if figure not in cells] == []


def test_a_dry_run_advises_what_was_measured():
    tables = found("fashion")["tables"]["views: differences"]
    epochs = found("fashion")["options"]["epochs"]
    assert epochs == advice.EPOCHS
    measured = {}
    for row in tables:
        if match := re.fullmatch(r"mean of both, (\d+) − \d+ views", row["comparison"]):
            measured[int(match[1])] = interval(row["seeds"])
    assert {count: tuple(round(value, 2) for value in values) for count, values in measured.items()} == advice.VIEWS


def test_the_advice_fits_the_job():
    """It speaks of the most views that were measured and the job has, and of those that its students never see."""
    for views, count in ((1, "1 view for"), (2, "2 views for"), (7, "4 views for"), (500, "8 views for")):
        assert advice.on_views(views).startswith(count) and advice.on_views(views, 500).startswith(count)
    assert advice.on_views(300, 200).startswith("100 of the views are seen by no student of 200 epochs; 8 views")
