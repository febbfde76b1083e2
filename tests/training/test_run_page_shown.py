"""The page of a run shows hostile text as text, loads nothing, and a browser draws every plot."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.nodes import CHROMIUM, HOSTILE, Node, section
from support.run_pages import CONFIG, MEANS, PLOTS, RUN, cells, plots, records, written


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("run") / "r", records())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Every text that a run's files can hold, and the folder's name, would like to be HTML."""
    bad = HOSTILE
    config = {**{key: f"{bad}{key}" for key in CONFIG}, bad: bad, "nested": {bad: [bad]}, "surrogate": "\udcff"}
    run = {
        **{key: f"{bad}{key}" if isinstance(value, str) else value for key, value in RUN.items()},
        "command": [f"{bad}argument"],
        "versions": {f"{bad}name": f"{bad}number"},
    }
    lines = [{**record, bad: bad} for record in records()]
    for record in lines:
        for inner in ("val", "times"):
            if inner in record:
                record[inner] = {**record[inner], bad: 0.5}
    return written(tmp_path_factory.mktemp("hostile") / bad.replace("/", "").replace(".", ""), lines, config, run)


def test_hostile_text_is_shown_as_text(hostile):
    page = Node(hostile.read_text())
    assert not page.all("script") and not page.all("img")
    text = page.text()
    assert page.all("h1")[0].text() == f"{HOSTILE}student on {HOSTILE}data, {HOSTILE}loss"
    assert f"of {HOSTILE}epochs epochs; run" in text and hostile.parent.name in text
    facts, options = cells(section(page, "Run")), cells(section(page, "Run").all("details")[0])
    for key in ("device", "machine", "started", "teacher", "store"):
        assert facts[key] == [f"{HOSTILE}{key}"]
    for key in CONFIG:
        assert options[key] == [f"{HOSTILE}{key}"]
    assert options[HOSTILE] == [HOSTILE] and options["surrogate"] == ["\\udcff"]
    assert facts["versions"] == [f"{HOSTILE}name {HOSTILE}number"]
    (command,) = page.all("pre")
    assert shlex.split("".join(command.children)) == [f"{HOSTILE}argument"]
    assert list(plots(page)) == list(PLOTS)


@pytest.mark.parametrize("name", ["file", "hostile"])
def test_nothing_is_loaded_from_elsewhere(name, request):
    file = request.getfixturevalue(name)
    for node in Node(file.read_text()).all():
        assert node.tag not in ("script", "link", "iframe", "object", "base", "form", "img")
        for attribute, value in node.attributes.items():
            assert not attribute.startswith("on")
            if attribute in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", file.read_text())


def test_svgs_are_well_formed_and_follow_the_pages_colours(file):
    found = re.findall(r"<svg.*?</svg>", file.read_text(), re.DOTALL)
    for text in found:
        ElementTree.fromstring(text)
        assert "currentColor" in text and "#000000" not in text
    assert len(found) == len(PLOTS)


def browsed(source: str, folder: Path) -> tuple[dict, list[str]]:
    """What a page looks like on a narrow screen, and what the console said."""
    probe = """<head><script>
        const failed = [];
        addEventListener("error", event => failed.push(event.message || event.target.outerHTML), true);
        addEventListener("load", () => {
            const sides = node => { const box = node.getBoundingClientRect(); return [box.width, box.height]; };
            const all = found => [...document.querySelectorAll(found)].map(sides);
            const result = {failed, plots: all(".plots svg"), lines: all('[id$="-epochs"]'), title: document.title,
                wide: document.documentElement.scrollWidth - document.documentElement.clientWidth};
            document.body.innerHTML = "";
            document.body.dataset.result = JSON.stringify(result);
        })</script>"""
    folder.mkdir(exist_ok=True)
    (folder / "page.html").write_text(source.replace("<head>", probe))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command += [f"file://{folder / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    dumped = done.stdout[done.stdout.index("<body") : done.stdout.index("</html>")]
    result = json.loads(Node(dumped).all("body")[0].attributes["data-result"])
    return result, [said for said in done.stderr.splitlines() if "CONSOLE" in said]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.parametrize("name", ["file", "hostile"])
def test_a_browser_shows_every_plot(name, request, tmp_path):
    """On a phone: each has a size, as have its lines; nothing runs, fails to load, or is wider than the screen."""
    result, console = browsed(request.getfixturevalue(name).read_text(), tmp_path)
    assert len(result["plots"]) == len(PLOTS)
    assert all(width > 200 and height > 100 for width, height in result["plots"])
    assert len(result["lines"]) == 2 + len(MEANS)
    assert all(width > 10 and height > 1 for width, height in result["lines"])
    assert result["title"] == Node(request.getfixturevalue(name).read_text()).all("title")[0].text()
    assert result["wide"] <= 0 and not result["failed"] and not console


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_a_browser_would_have_said_what_fails(file, tmp_path):
    """The control of the test above."""
    source = file.read_text().replace("<h1>", '<img src="gone.png" onerror="gone()"><h1>')
    result, (console,) = browsed(source, tmp_path)
    assert "gone.png" in result["failed"][0] and "gone is not defined" in console
