"""Pictures of what the teacher saw and what it said."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from cache import Store, philox
from pipeline import policy as policies
from pipeline import views
from pipeline.checkpoint import write_atomically
from pipeline.index import Index
from pipeline.loader import load


def pairs_page(path: Path, index: Index, store: Store, samples: int = 12) -> None:
    """Write an HTML page of view pairs, evenly spread over the data: pixels as replayed, the teacher's top classes."""
    policy = policies.from_config({**store.manifest.policy, "base": store.manifest.base}, "the store's policy")
    rows = index.good[np.linspace(0, len(index.good) - 1, min(samples, len(index.good))).astype(int)]
    cells = [[f"<b>{html.escape(_class_name(index, int(index.records['label'][row])))}</b>"] for row in rows]
    for view in range(min(store.manifest.views, 3)):
        plane = store.load_plane(view)
        encoded, weight = plane.gather(rows)
        records = index.records[rows]
        stream = philox.stream(store.manifest.seed, records["key_hash"], view)
        logits = store.codec.decode(encoded, stream)
        request = rows, views.of(records, store.manifest.seed, view, policy)
        for batch in load(index, [request], policy, threads=1):
            for i, cell in enumerate(cells):
                pair = (_figure(batch.images[s, i].numpy(), logits[i, s], index) for s in range(2))
                cell.append("".join(pair) + f"<p>w = {weight[i]:.3f}</p>")
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    head = "".join(f"<th>view {view}: original, augmented</th>" for view in range(len(cells[0]) - 1))
    page = f"""<!doctype html><meta charset="utf-8"><title>View pairs</title>
<style>body{{font:14px sans-serif}}td{{padding:6px;vertical-align:top;border-bottom:1px solid #ccc}}
figure{{display:inline-block;margin:4px;width:120px}}img{{width:96px;image-rendering:pixelated}}
figcaption{{font-size:11px;white-space:pre}}p{{margin:2px 4px;font-size:12px}}</style>
<h1>View pairs and the teacher's top classes</h1>
<p>Teacher {html.escape(store.manifest.teacher)}; policy {html.escape(policy.name)}; {store.manifest.views} views;
probabilities at temperature 1.</p><table><tr><th>label</th>{head}</tr>{body}</table>"""
    write_atomically(path, page.encode())


def _figure(pixels: np.ndarray, logits: np.ndarray, index: Index) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    exponentials = np.exp(logits - logits.max())
    share = exponentials / exponentials.sum()
    top = np.argsort(-share)[:3]
    caption = "\n".join(f"{100 * share[c]:5.1f} % {html.escape(_class_name(index, int(c)))}" for c in top)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{caption}</figcaption></figure>'


def _class_name(index: Index, label: int) -> str:
    return index.class_names[label] if index.class_names else str(label)
