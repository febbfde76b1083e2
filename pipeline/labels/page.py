"""The HTML page about a store."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from cache import Store, UserError
from cache import codec as codecs
from pipeline.data.index import Index
from pipeline.system.html import BLUE, GREY, document, svg
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
    return document(
        "pipeline/labels/page.html",
        title=f"Soft labels of {manifest.teacher}",
        about=f"{manifest.samples:,} samples, {manifest.views:,} views, {manifest.classes:,} classes; "
        f"policy {manifest.policy.get('name', '?')}, code {manifest.codec['name']}; store {store.path}",
        store=manifest,
        committed=len(there),
        sizes=_sizes(store, there),
        losses=_losses(manifest.fidelity, manifest.temperature),
        views=_views(store, there),
        cards=[_card(index, pair) for pair in pairs],
        looked=looked,
        figures=_figures(manifest.fidelity.get("budget"), manifest.temperature, looked),
        blocks=[(view, block, f"{kl:.4g}", f"{slope:.4f}") for view, block, kl, slope in looked.fidelity],
        quarantined=_quarantined(index),
        skipped=_skipped(index, looked),
        definitions={**fields, "codec": _described(manifest.codec)},
    )


def _sizes(store: Store, there: list) -> list[tuple]:
    """Rows of bytes of this code on disk and in memory, and of the plain ones."""
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
    return rows


def _losses(fidelity: dict, temperature: float) -> list[tuple[str, object]]:
    """Rows of what the manifest says was measured when the code was chosen."""
    if not fidelity:
        return []
    kl = fidelity.get("kl")
    rows = [
        *((f"KL divergence at T = {t}, nats", value) for t, value in (kl if isinstance(kl, dict) else {}).items()),
        (f"budget at T = {temperature:g}, nats", fidelity.get("budget")),
        ("slope of decoded on true logits", fidelity.get("slope")),
        ("the largest logit stays the largest", fidelity.get("agreement")),
        ("pairs measured", fidelity.get("pairs")),
    ]
    return [(name, f"{v:.4g}" if isinstance(v, float) else v) for name, v in rows]


def _views(store: Store, there: list) -> list[tuple]:
    """Rows of how many blocks of each are committed."""
    blocks = store.manifest.blocks
    committed = np.bincount([view for view, _ in there], minlength=store.manifest.views)
    return [
        (f"view {view}", f"{count:,} of {blocks:,}", "complete" if count == blocks else "incomplete")
        for view, count in enumerate(committed.tolist())
    ]


def _card(index: Index, pair: Pair) -> dict:
    """A pair as a page shows it: pictures of (base64 of a PNG, caption), answers of (caption, rows)."""
    label = -1 if index.class_list.unlabelled else int(index.records["label"][pair.row])
    captions = "original", f"augmented: {', '.join(pair.fired) or 'another crop'}"
    said = (("before coding", pair.before), ("after coding", pair.after))
    return {
        "view": pair.view,
        "row": pair.row,
        "name": _class_name(index, label),
        "about": f"{_key(index, pair.row)}, row {pair.row:,}, view {pair.view}; w = {pair.weight:.4f}",
        "small": pair.pixels.shape[1] <= 64,
        "pictures": [(_png(pixels), caption) for pixels, caption in zip(pair.pixels, captions, strict=True)],
        "answers": [(caption, _top(index, each, label)) for caption, both in said if both is not None for each in both],
    }


def _top(index: Index, logits: np.ndarray, label: int) -> list[tuple[int, float, str, bool]]:
    """Class, probability at T = 1, name, and whether it is the label."""
    p = softmax(logits, 1)
    best = np.argsort(-p, kind="stable")[:_TOP].tolist()
    return [(c, float(p[c]), _class_name(index, c), c == label) for c in best]


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _figures(budget: object, temperature: float, looked: Looked) -> list[tuple[str, Markup]]:
    """Of the distributions; they have no captions."""
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
        (kl, per_block(kl, budget), "committed block", f"KL(T = {temperature:g}), nats; dashed: budget"),
        (slope, per_block(slope, 1.0), "committed block", "slope of the labels; dashed: unbiased"),
    )
    return [
        ("", svg(f"plot {number}", draw, below, beside))
        for number, (values, draw, below, beside) in enumerate(plots)
        if np.isfinite(values).any()
    ]


def _quarantined(index: Index) -> dict:
    """Their number, and with their causes those that `prepare` wrote down."""
    rows, written = [], 0
    file = index.path / "quarantine.jsonl"
    with open(file, errors="surrogateescape") if file.exists() else io.StringIO() as lines:
        for written, line in enumerate(lines, 1):
            if written <= _LISTED:
                try:
                    entry = json.loads(line)
                    rows.append([entry.get(name) for name in ("key", "cause", "shard", "offset")])
                except (ValueError, AttributeError):
                    rows.append([line])
    return {"count": int((index.records["status"] != 0).sum()), "rows": rows, "left_out": written - len(rows)}


def _skipped(index: Index, looked: Looked) -> dict:
    """Their number in the blocks looked at, and some of them."""
    some = list(looked.skipped.items())[:_LISTED]
    rows = [(_key(index, row), f"{row:,}", ", ".join(map(str, views))) for row, views in some]
    return {"count": len(looked.skipped), "rows": rows, "left_out": len(looked.skipped) - len(rows)}


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
