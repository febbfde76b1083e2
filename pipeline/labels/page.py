"""The HTML page about a store."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cache import Store, UserError
from cache import codec as codecs
from pipeline.data.index import Index
from pipeline.system.html import BLUE, GREY, document, note, svg, table
from pipeline.system.terminal import decimal

_LISTED = 200  # keys in a list
_TOP = 5


class Looked(NamedTuple):
    """What some blocks hold."""

    blocks: int
    weight: np.ndarray
    """f32 (n,), w of sampled pairs."""
    entropy: dict[int, np.ndarray]
    """T -> f64 (2 n,), of the decoded softmax, nats."""
    fidelity: list[tuple[int, int, float, float]]
    """View, block, KL and slope."""
    skipped: dict[int, list[int]]
    """Rows that the teacher pass skipped -> in which views."""


class Pair(NamedTuple):
    view: int
    row: int
    pixels: np.ndarray
    """u8 (2, S, S, 3)."""
    weight: float
    fired: tuple[str, ...]
    """Operations that made the augmented view, in their order."""
    after: np.ndarray
    """f32 (2, C), decoded."""
    before: np.ndarray | None
    """f32 (2, C), the teacher's."""


def _described(codec: dict) -> dict:
    """A codec's config with the sizes of its arrays."""
    return {
        name: _described(value)
        if isinstance(value, dict)
        else f"{len(value) * 3 // 4:,} bytes"
        if isinstance(value, str) and name != "name"
        else value
        for name, value in codec.items()
    }


def render(store: Store, index: Index, there: list, looked: Looked, pairs: list[Pair]) -> bytes:
    """The page about a store of which the blocks (view, block) of `there` are committed.

    UTF-8; of a key that is none, the bytes are shown.
    """
    manifest = store.manifest
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    sections = {
        "Size": _sizes(store, there),
        "What the code loses": _losses(manifest.fidelity, manifest.temperature),
        "Completeness": _completeness(store, there),
        "View pairs": _gallery(index, pairs),
        "Distributions": note(
            f"{len(looked.weight):,} pairs, drawn at random from {looked.blocks:,} of {len(there):,} committed blocks."
        )
        + _plots(manifest.fidelity.get("budget"), manifest.temperature, looked),
        "Samples without labels": _without_labels(index, looked),
        "Manifest": _definitions({**fields, "codec": _described(manifest.codec)}),
    }
    about = (
        f"{manifest.samples:,} samples, {manifest.views:,} views, {manifest.classes:,} classes; "
        f"policy {manifest.policy.get('name', '?')}, code {manifest.codec['name']}; store {store.path}"
    )
    return document(f"Soft labels of {manifest.teacher}", about, sections)


def _sizes(store: Store, there: list) -> str:
    """Bytes of this code on disk and in memory, and of the plain ones."""
    samples, count, classes = store.manifest.samples, store.manifest.views, store.manifest.classes
    pairs = sum(stop - start for start, stop in (store.block_range(block) for _, block in there))
    stored = store.sizes()
    parts = store.label_bytes(), stored["weight"] + stored["digest"], sum(stored.values())
    disk, beside, whole = (size / (2 * pairs) if pairs else math.nan for size in parts)
    fp16, int8 = (codecs.make(name, classes=classes).row_bytes / 2 for name in ("fp16", "int8"))
    kinds = {
        "labels on disk": disk,
        "labels in memory": store.codec.row_bytes / 2,
        "w and digests": beside,
        "store: labels, w, digests and all else, on disk": whole,
        "dense fp16, for comparison": fp16,
        "dense int8, for comparison": int8,
    }
    rows = []
    for name, vector in kinds.items():
        if math.isnan(vector):
            cells = ("-",) * 4
        else:
            sizes = (decimal(vector * 2 * samples), decimal(vector * 2 * samples * count))
            cells = (f"{vector:.4g} B", *sizes, f"{fp16 / vector:.3g} ×")
        rows.append((name, *cells))
    head = ("", "per vector", f"view of {samples:,} pairs", f"{count:,} views", "smaller than fp16")
    scaled = "" if len(there) == count * store.manifest.blocks else " Scaled up from the blocks that are there."
    return table(head, rows) + note(f"Memory holds one view at a time, two while the next loads.{scaled}")


def _losses(fidelity: dict, temperature: float) -> str:
    """What the manifest says was measured when the code was chosen."""
    if not fidelity:
        return "<p>Not measured when the store was made.</p>"
    kl = fidelity.get("kl")
    rows = [
        *((f"KL divergence at T = {t}, nats", value) for t, value in (kl if isinstance(kl, dict) else {}).items()),
        (f"budget at T = {temperature:g}, nats", fidelity.get("budget")),
        ("slope of decoded on true logits", fidelity.get("slope")),
        ("the largest logit stays the largest", fidelity.get("agreement")),
        ("pairs measured", fidelity.get("pairs")),
    ]
    return table(("", ""), [(name, f"{v:.4g}" if isinstance(v, float) else v) for name, v in rows])


def _completeness(store: Store, there: list) -> str:
    blocks = store.manifest.blocks
    committed = np.bincount([view for view, _ in there], minlength=store.manifest.views)
    head = f"<p>{len(there):,} of {blocks * store.manifest.views:,} blocks are committed.</p>"
    rows = [
        (f"view {view}", f"{count:,} of {blocks:,}", "complete" if count == blocks else "incomplete")
        for view, count in enumerate(committed.tolist())
    ]
    return f"{head}<details><summary>per view</summary>{table(('', 'blocks', ''), rows)}</details>"


def _gallery(index: Index, pairs: list[Pair]) -> str:
    if not pairs:
        return "<p>No labels yet.</p>"
    cards = []
    for pair in pairs:
        label = -1 if index.class_list.unlabelled else int(index.records["label"][pair.row])
        captions = "original", f"augmented: {', '.join(pair.fired) or 'another crop'}"
        cells = [
            f"<figure>{_picture(pixels)}<figcaption>{escape(caption)}</figcaption></figure>"
            for pixels, caption in zip(pair.pixels, captions, strict=True)
        ]
        for title, logits in (("before coding", pair.before), ("after coding", pair.after)):
            cells += [] if logits is None else [_top(index, title, said, label) for said in logits]
        about = f"{_key(index, pair.row)}, row {pair.row:,}, view {pair.view}; w = {pair.weight:.4f}"
        cards.append(
            f'<article data-view="{pair.view}" data-row="{pair.row}"><h3>{escape(_class_name(index, label))}</h3>'
            f'<small>{escape(about)}</small><div class="two">{"".join(cells)}</div></article>'
        )
    above = note("What the student sees, and the softmax of its labels at T = 1; the true class is bold.")
    return f'{above}<div class="pairs">{"".join(cards)}</div>'


def _top(index: Index, title: str, logits: np.ndarray, label: int) -> str:
    p = softmax(logits, 1)
    rows = "".join(
        f'<tr data-class="{c}" data-p="{p[c]:.9g}" class="{"label" if c == label else ""}">'
        f'<td>{escape(_class_name(index, c))}</td><td class="n">{100 * p[c]:.1f} %</td></tr>'
        for c in np.argsort(-p, kind="stable")[:_TOP].tolist()
    )
    return f"<table><caption>{title}</caption>{rows}</table>"


def _picture(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    small = ' class="small"' if len(pixels) <= 64 else ""
    return f'<img{small} alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _plots(budget: object, temperature: float, looked: Looked) -> str:
    what = f"KL(T = {temperature:g})"
    kl, slope = (np.array([entry[at] for entry in looked.fidelity]) for at in (2, 3))

    def histogram(values: np.ndarray) -> Callable[[Any], None]:
        return lambda axes: axes.hist(values[np.isfinite(values)], bins=50, color=BLUE)

    def per_block(values: np.ndarray, line: object) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            axes.plot(values, ".", color=BLUE)
            if isinstance(line, int | float):
                axes.axhline(line, color=GREY, linewidth=0.8, linestyle="--")

        return draw

    plots = (
        (looked.weight, histogram(looked.weight), "w = 1 + cos of the pair's logits", "pairs"),
        *((h, histogram(h), f"entropy of the labels at T = {t}, nats", "vectors") for t, h in looked.entropy.items()),
        (kl, per_block(kl, budget), "committed block", f"{what}, nats; dashed: budget"),
        (slope, per_block(slope, 1.0), "committed block", "slope of the labels; dashed: unbiased"),
    )
    drawn = [
        f"<figure>{svg(f'plot {number}', draw, below, beside)}</figure>"
        for number, (values, draw, below, beside) in enumerate(plots)
        if np.isfinite(values).any()
    ]
    rows = [(view, block, f"{kl:.4g}", f"{slope:.4f}") for view, block, kl, slope in looked.fidelity]
    blocks = table(("view", "block", what, "slope"), rows)
    return f'<div class="plots">{"".join(drawn)}</div><details><summary>blocks</summary>{blocks}</details>'


def _without_labels(index: Index, looked: Looked) -> str:
    """The quarantined with their causes, which `prepare` wrote down, and the skipped."""
    quarantined, count = [], 0
    file = index.path / "quarantine.jsonl"
    with open(file, errors="surrogateescape") if file.exists() else io.StringIO() as lines:
        for count, line in enumerate(lines, 1):
            if count <= _LISTED:
                try:
                    entry = json.loads(line)
                    quarantined.append([entry.get(name) for name in ("key", "cause", "shard", "offset")])
                except (ValueError, AttributeError):
                    quarantined.append([line])
    text = f"<p>{int((index.records['status'] != 0).sum()):,} samples are quarantined (status 1).</p>"
    if quarantined:
        text += _listed(("key", "cause", "shard", "byte"), quarantined, count)
    text += f"<p>{len(looked.skipped):,} samples of the blocks looked at were skipped by the teacher pass (w is NaN)."
    text += "</p>"
    if looked.skipped:
        some = list(looked.skipped.items())
        rows = [(_key(index, row), f"{row:,}", ", ".join(map(str, at))) for row, at in some[:_LISTED]]
        text += _listed(("key", "row", "in view"), rows, len(some))
    return text


def _listed(head: tuple, rows: list, count: int) -> str:
    more = f"<p>and {count - _LISTED:,} more</p>" if count > _LISTED else ""
    return f"<details><summary>which</summary>{table(head, rows)}{more}</details>"


def _definitions(values: dict) -> str:
    items = (f"<dt>{escape(str(name))}</dt><dd>{_shown(value)}</dd>" for name, value in values.items())
    return f"<dl>{''.join(items)}</dl>"


def _shown(value: object) -> str:
    """Any JSON value."""
    if isinstance(value, dict):
        return _definitions(value)
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple | dict) for item in value):
            return f"<ol>{''.join(f'<li>{_shown(item)}</li>' for item in value)}</ol>"
        return escape(", ".join(map(str, value)))
    return escape(str(value))


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """f64, over the last axis."""
    x = logits.astype(np.float64) / temperature
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _class_name(index: Index, label: int) -> str:
    return index.class_list.name(label) if label >= 0 else "no label"


def _key(index: Index, row: int) -> str:
    try:
        return index.key(row)
    except UserError:  # its shard is gone
        return f"key hash {index.records['key_hash'][row]:016x}"
