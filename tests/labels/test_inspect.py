"""The page about a store says what the store holds, stands alone, and shows hostile text as text."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import entr, softmax
from support.nodes import CHROMIUM, HOSTILE, Node, section
from support.passes import network, teacher_pass
from support.tars import tar_of

import cache
from cache import codec as codecs
from pipeline import cli
from pipeline.config import PrecomputeTeacher
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels import inspect, precompute
from pipeline.networks import models
from pipeline.views import drawing
from pipeline.views import policy as policies
from pipeline.views.loader import Loader


def inspected(store: Path, data: Path, out: Path, *more) -> Node:
    arguments = ["inspect", store, "--data", data, "--out", out, "--device", "cpu", *more]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return Node(out.read_text())


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    models.save_weights(network(digits), path)
    return f"cifar/resnet8@{path}"


@pytest.fixture(scope="module")
def labels(digits, teacher, tmp_path_factory) -> Path:
    """With dither, so that every row needs the key of its sample and view."""
    return teacher_pass(digits, teacher, tmp_path_factory.mktemp("labels") / "labels.zarr", codec="subspace")


@pytest.fixture(scope="module")
def file(labels, digits, teacher, tmp_path_factory) -> Path:
    """The page of a whole store, with its teacher."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    inspected(labels, digits, out, "--teacher", teacher)
    return out


@pytest.fixture(scope="module")
def page(file) -> Node:
    return Node(file.read_text())


def pairs_of(page: Node) -> list[tuple[Node, int, int]]:
    """Article, view and row of each pair."""
    found = page.all("article")
    return [(node, int(node.attributes["data-view"]), int(node.attributes["data-row"])) for node in found]


def pixels_of(store, index: Index, view: int, row: int) -> torch.Tensor:
    """u8 (2, S, S, 3), by the loader."""
    policy = policies.load(POLICY)
    request = np.array([row]), drawing.of(index.records[[row]], store.manifest.seed, view, policy)
    (batch,) = Loader(index, policy, threads=1).batches([request])
    return batch.images[:, 0]


def test_pictures_are_the_loaders_pixels(page, labels, digits):
    store, index = cache.open(labels), Index.open(digits)
    pairs = pairs_of(page)
    assert len(pairs) == 12 and len({(view, row) for _, view, row in pairs}) == 12
    assert {view for _, view, _ in pairs} == {0, 1} and len({row for *_, row in pairs}) > 6
    for article, view, row in pairs:
        sources = [image.attributes["src"].removeprefix("data:image/png;base64,") for image in article.all("img")]
        shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
        np.testing.assert_array_equal(shown, pixels_of(store, index, view, row).numpy())
        assert index.key(row) in article.text()
        mask = drawing.of(index.records[[row]], store.manifest.seed, view, policies.load(POLICY))["mask"][0]
        fired = [op.name for i, op in enumerate(policies.load(POLICY).table) if mask >> i & 1]
        assert article.all("figcaption")[1].text() == "augmented: " + (", ".join(fired) or "another crop")


def test_top_classes_are_those_of_the_labels_and_of_the_teacher(page, labels, digits, teacher):
    """In the order original, augmented; before coding above after coding."""
    store, index = cache.open(labels), Index.open(digits)
    planes = [store.load_plane(view) for view in range(2)]
    network = models.create(teacher, 10).module.eval()
    for article, view, row in pairs_of(page):
        encoded, weight = planes[view].gather(np.array([row]))
        decoded = store.codec.decode(encoded, store.dither_keys(view, np.array([row])))[0]
        with torch.inference_mode():
            raw = network(pixels_of(store, index, view, row).permute(0, 3, 1, 2) / 127.5 - 1).numpy()
        tables = article.all("table")
        assert [table.all("caption")[0].text() for table in tables] == ["before coding"] * 2 + ["after coding"] * 2
        for table, logits in zip(tables, (*raw, *decoded), strict=True):
            p = softmax(logits.astype(np.float64))
            best = np.sort(p)[::-1][:5]
            rows = table.all("tr")
            np.testing.assert_allclose([float(r.attributes["data-p"]) for r in rows], best, rtol=1e-4)
            np.testing.assert_allclose([p[int(r.attributes["data-class"])] for r in rows], best, rtol=1e-4)
            shown = [float(r.all("td")[1].text().removesuffix(" %")) for r in rows]
            np.testing.assert_allclose(shown, 100 * best, atol=0.051)
            for r in rows:
                true = int(r.attributes["data-class"]) == index.records["label"][row]
                assert (r.attributes["class"] == "label") == true
        assert f"w = {weight[0]:.4f}" in article.text()


def test_the_manifest_is_shown_whole(page, labels):
    manifest, text = cache.open(labels).manifest, section(page, "Manifest").text()
    for field in dataclasses.fields(manifest):
        assert field.name in text
    for value in (manifest.dataset, manifest.teacher, manifest.teacher_weights, str(manifest.seed)):
        assert value in text
    for name, magnitude in manifest.policy["ops"]:
        assert f"{name}, {magnitude}" in text
    for name, number in manifest.versions.items():
        assert f"{name} {number}" in text
    lost = section(page, "What the code loses").text()
    for temperature, value in manifest.fidelity["kl"].items():
        assert f"T = {temperature}, nats {value:.4g}" in lost
    assert f"slope of decoded on true logits {manifest.fidelity['slope']:.4g}" in lost and "budget" in lost


def test_sizes_are_those_on_disk(page, labels):
    rows = [[cell.text() for cell in row.all("td")] for row in section(page, "Size").all("tr")[1:]]
    sizes = {name: (float(vector.removesuffix(" B")), view, whole) for name, vector, view, whole, _ in rows}
    on_disk = sum(path.stat().st_size for path in (labels / "pairs/c").rglob("*") if path.is_file())
    assert sizes["labels on disk"][0] == pytest.approx(on_disk / (180 * 2 * 2), abs=0.005)
    assert sizes["labels on disk"][2] == (f"{on_disk} B" if on_disk < 1000 else f"{on_disk / 1000:.3g} kB")
    assert sizes["dense fp16, for comparison"] == (20, "7.2 kB", "14.4 kB")
    assert sizes["dense int8, for comparison"] == (18, "6.48 kB", "13 kB")
    whole = sum(path.stat().st_size for path in labels.rglob("*") if path.is_file())
    assert sizes["store: labels, w, digests and all else, on disk"][0] == pytest.approx(whole / (180 * 2 * 2), rel=1e-3)
    assert sizes["labels in memory"][0] == cache.open(labels).codec.row_bytes / 2


def test_distributions_are_those_of_the_planes(labels):
    """Independent figures from whole planes, as the store is smaller than the sample."""
    store = cache.open(labels)
    looked = inspect._look(store, [(view, block) for view in range(2) for block in range(3)])
    planes = [store.load_plane(view) for view in range(2)]
    np.testing.assert_array_equal(looked.weight, np.concatenate([plane.weight for plane in planes]))
    logits = np.concatenate([store.codec.decode(p.codes, store.dither_keys(p.view, slice(None))) for p in planes])
    for temperature, found in looked.entropy.items():
        expected = entr(softmax(logits.astype(np.float64) / temperature, axis=-1)).sum(-1)
        np.testing.assert_allclose(found, expected.ravel(), atol=1e-5)  # a matrix product of float32
    assert looked.fidelity == [(v, b, *store.read_block(v, b).fidelity.tolist()) for v in range(2) for b in range(3)]


def test_plots_are_inline_and_follow_the_pages_colours(page, labels):
    figures = section(page, "Distributions").all("svg")
    assert len(figures) == 5
    said = [figure.text() for figure in figures]
    for text, words in zip(said, ("w = 1 + cos", "T = 1", "T = 4", "KL(T = 4)", "slope"), strict=True):
        assert words in text
    ticks = [[float(tick) for tick in re.findall(r"(?<![\w.])\d\.\d+", text)] for text in said]
    assert 0 < max(ticks[3]) < 0.2, "KL"
    assert 0.8 < min(ticks[4]) <= 1 <= max(ticks[4]) < 1.2, "slopes"
    table = [[cell.text() for cell in row.all("td")] for row in section(page, "Distributions").all("tr")[1:]]
    store = cache.open(labels)
    for view, block, kl, slope in table:
        found = store.read_block(int(view), int(block)).fidelity
        assert (kl, slope) == (f"{found[0]:.4g}", f"{found[1]:.4f}")
    assert len(table) == 6


def test_svgs_are_well_formed(file):
    found = re.findall(r"<svg.*?</svg>", file.read_text(), re.DOTALL)
    for text in found:
        ElementTree.fromstring(text)
        assert "currentColor" in text and "#000000" not in text
    assert len(found) == 5


def test_nothing_is_loaded_from_elsewhere(file, page):
    for node in page.all():
        assert node.tag not in ("script", "link", "iframe", "object", "base", "form")
        for name, value in node.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"url\((?!#)|@import", file.read_text())


def test_the_sample_is_bounded_and_says_so(labels, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "_SAMPLED", 50)
    monkeypatch.setattr(inspect, "_BLOCKS", 2)
    page = inspected(labels, digits, tmp_path / "r.html", "--samples", 3)
    assert "50 pairs, drawn at random from 2 of 6 committed blocks" in section(page, "Distributions").text()
    assert len(pairs_of(page)) == 3
    assert "before coding" not in page.text()


def test_an_incomplete_store_shows_what_is_there(labels, digits, tmp_path):
    store = shutil.copytree(labels, tmp_path / "s.zarr")
    for block in ("0/1", "1/0", "1/1", "1/2"):
        (store / "commit/c" / block).unlink()
    page = inspected(store, digits, tmp_path / "r.html")
    assert {(view, row // 64) for _, view, row in pairs_of(page)} == {(0, 0), (0, 2)}
    text = section(page, "Completeness").text()
    assert "2 of 6 blocks are committed" in text
    assert "view 0 2 of 3 incomplete" in text and "view 1 0 of 3 incomplete" in text


def test_an_empty_store_of_a_fitted_code_shows_no_arrays(labels, digits, tmp_path):
    rng = np.random.default_rng(0)
    codec = codecs.fit("subspace", 5 * rng.standard_normal((256, 2, 10)).astype(np.float32), kl=0.05)
    old = cache.open(labels)
    manifest = dataclasses.replace(old.manifest, codec=codec.config, fidelity={})
    store = cache.create(tmp_path / "s.zarr", manifest, old.status, old.key_hash)
    page = inspected(store.path, digits, tmp_path / "r.html")
    assert "No labels yet" in page.text() and "0 of 6" in page.text() and "Not measured" in page.text()
    for value in codec.config.values():
        if isinstance(value, str) and value != "subspace":
            assert value not in (tmp_path / "r.html").read_text()
    assert "basis 90 bytes" in section(page, "Manifest").text()


@pytest.fixture(scope="module")
def hostile(digits, teacher, tmp_path_factory) -> Path:
    """Class names, keys, a policy and quarantined and skipped samples that would like to be HTML."""
    folder = tmp_path_factory.mktemp("hostile")
    index = Index.open(digits)
    members = {}
    for row in range(70):
        name = f"{row:03d}{HOSTILE}".replace(".", "")
        name = f"{row:03d}\udcff\udcfe" if row % 2 else name
        members[f"{name}.jpg"] = b"broken" if row == 4 else index.read(row)
        members[f"{name}.cls"] = str(index.records["label"][row]).encode()
    tar_of(folder / "a.tar", members)
    prepare.build(f"webdataset:{folder}/a.tar", folder / "data", classes=10)
    meta = json.loads((folder / "data/dataset.json").read_text())
    meta["class_names"] = [f"{HOSTILE}{label}" for label in range(10)]
    (folder / "data/dataset.json").write_text(json.dumps(meta))
    policy = folder / "policy.yaml"
    policy.write_text(Path(POLICY).read_text().replace("name: digits", f"name: {json.dumps(HOSTILE)}"))
    store = folder / "s.zarr"
    options = dict(data=folder / "data", teacher=teacher, views=1, policy=str(policy), codec="fp16", device="cpu")
    precompute.run(PrecomputeTeacher(**options, store=str(store)))
    opened = cache.open(store)
    block = opened.read_block(0, 0)
    block.weight[2:4] = np.nan
    opened.write_block(0, 0, *block[:3])
    inspected(store, folder / "data", folder / "report.html")
    return folder / "report.html"


def test_hostile_text_is_shown_as_text(hostile):
    page = Node(hostile.read_text())
    assert not page.all("script") and all("onerror" not in node.attributes for node in page.all())
    shown = re.sub(r"\s+", " ", page.text())
    without = section(page, "Samples without labels").text()
    key = HOSTILE.replace(".", "")
    assert f"{HOSTILE}3" in shown, "a class name"
    assert f"policy {HOSTILE}" in shown
    assert f"004{key}" in without and "1 samples are quarantined" in without
    assert f"002{key}" in without and "003\\udcff\\udcfe" in without and "2 samples of the blocks" in without
    rows = {row for *_, row in pairs_of(page)}
    assert not rows & {2, 3, 4}, "samples without labels have no pictures of theirs"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.parametrize("name", ["file", "hostile"])
def test_a_browser_shows_it_on_a_phone(name, request, tmp_path):
    """Every picture decodes, nothing runs, nothing is wider than the screen."""
    source = request.getfixturevalue(name).read_text()
    probe = """<script>addEventListener("load", () => {
        const images = [...document.images].map(image => image.naturalWidth);
        const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
        document.body.innerHTML = "";
        document.body.dataset.result = JSON.stringify({images, wide, title: document.title});
    })</script></body>"""
    (tmp_path / "page.html").write_text(source.replace("</body>", probe))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    result = json.loads(
        Node(dumped[dumped.index("<body") : dumped.index("</html>")]).all("body")[0].attributes["data-result"]
    )
    assert result["images"] == [32] * 24
    assert result["title"] == "Soft labels of cifar/resnet8"
    assert result["wide"] <= 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--samples", -1), "--samples out of range"),
        (("--out", "/no/such/folder/r.html"), "cannot write"),
        (("--teacher", "cifar/resnet8"), "network cifar/resnet8 has no weights"),
    ],
)
def test_wrong_options_are_one_line(labels, digits, tmp_path, capsys, more, message):
    arguments = ["inspect", labels, "--data", digits, "--out", tmp_path / "r.html", *more]
    assert cli.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "r.html").exists()
