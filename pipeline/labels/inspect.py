"""Looking at a store: sizes, what the code loses, and pictures of what the teacher saw, on one page.

Memory is bounded by blocks: one is read at a time, `_BLOCKS` at the most, and `_SAMPLED` rows are looked at in all.
"""

import functools
from collections.abc import Iterator

import numpy as np

import cache
from cache import Store
from pipeline.config import Inspect
from pipeline.data.index import open_data
from pipeline.labels import other_classes, page
from pipeline.labels.epochs import numbered_alike, replayed
from pipeline.labels.page import Looked, Pair, softmax
from pipeline.networks import models
from pipeline.networks.teacher import Teacher
from pipeline.system import device as devices
from pipeline.system.files import write_atomically
from pipeline.system.terminal import decimal, summary
from pipeline.views import mixing, plan
from pipeline.views.loader import Loader

_BLOCKS = 256
_SAMPLED = 20_000


def run(config: Inspect) -> None:
    """Write the page. Raises UserError if store, data and teacher do not belong together, or a block is damaged."""
    machine = other_classes.for_data(config)
    index = open_data(machine, config.data, "train")
    store = cache.open(config.store)
    manifest = store.manifest
    cache.check(manifest, dataset=index.fingerprint, samples=len(index), classes=index.classes)
    index = numbered_alike(index, machine, manifest)
    policy, decoder = replayed(manifest)
    teacher = None
    if config.teacher is not None:
        precision = manifest.versions.get("precision", "fp32")
        network = other_classes.teacher(config, functools.partial(models.trained, config.teacher), index.class_list)
        teacher = Teacher(network, policy, devices.pick(config), precision, size=manifest.teacher_size)
        cache.check(manifest, teacher=teacher.name, teacher_weights=teacher.fingerprint)
    missing = set(store.missing_blocks())
    there = [(v, b) for v in range(manifest.views) for b in range(manifest.blocks) if (v, b) not in missing]
    looked = _look(store, there)
    loader = Loader(index, policy, threads=devices.threads(config), decoder=decoder, max_bad=config.max_bad)
    pairs = list(_pairs(store, loader, teacher, _spread(there, config.samples)))
    html = page.render(store, index, there, looked, pairs)
    write_atomically(config.out, html)
    summary(
        "page",
        {
            "file": config.out,
            "size": decimal(len(html)),
            "view pairs": len(pairs),
            "labels sampled": f"{len(looked.weight):,} pairs of {looked.blocks:,} blocks",
            "missing blocks": f"{len(missing):,} of {manifest.views * manifest.blocks:,}",
        },
    )


def _look(store: Store, there: list[tuple[int, int]]) -> Looked:
    """Read blocks, evenly spread over those that are there."""
    rng = np.random.default_rng(0)
    some = [block for block, _ in _spread(there, min(len(there), _BLOCKS))]
    weight, fidelity, skipped = [np.empty(0, np.float32)], [], {}
    entropy = {temperature: [np.empty(0)] for temperature in (1, 4)}
    for view, number in some:
        block = store.read_block(view, number)
        start, _ = store.block_range(number)
        rows, unlabelled = _rows_of(store, number, block.weight)
        for row in unlabelled.tolist():
            skipped.setdefault(row, []).append(view)
        rows = np.sort(rng.choice(rows, min(len(rows), _SAMPLED // len(some) or 1), replace=False))
        logits = store.codec.decode(block.codes[rows - start], store.dither_keys(view, rows))
        weight.append(block.weight[rows - start])
        for temperature, found in entropy.items():
            p = softmax(logits, temperature)
            found.append(-(p * np.log(np.maximum(p, 1e-300))).sum(-1).ravel())
        fidelity.append((view, number, float(block.fidelity[0]), float(block.fidelity[1])))
    joined = {temperature: np.concatenate(found) for temperature, found in entropy.items()}
    return Looked(len(some), np.concatenate(weight), joined, fidelity, skipped)


def _rows_of(store: Store, block: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows i64 of a block with labels, and those that the teacher pass skipped."""
    start, stop = store.block_range(block)
    good, without = store.status[start:stop] == 0, np.isnan(weight)
    return start + np.flatnonzero(good & ~without), start + np.flatnonzero(good & without)


def _spread(blocks: list[tuple[int, int]], count: int) -> list[tuple[tuple[int, int], int]]:
    """`count` picks evenly over the blocks: each block with how many fall on it."""
    picks = [blocks[at * len(blocks) // count] for at in range(count)] if blocks else []
    return [(block, picks.count(block)) for block in dict.fromkeys(picks)]


def _pairs(store: Store, loader: Loader, teacher: Teacher | None, picks) -> Iterator[Pair]:
    """Random pairs of the blocks picked, as many of each as `picks` says."""
    rng = np.random.default_rng(0)
    for (view, number), count in picks:
        block = store.read_block(view, number)
        labelled, _ = _rows_of(store, number, block.weight)
        rows = np.sort(rng.choice(labelled, min(count, len(labelled)), replace=False))
        if not len(rows):
            continue
        (request,) = plan.requests(loader.index, loader.policy, store.manifest.seed, [(view, rows)])
        (batch,) = loader.batches([request])
        if not len(batch.rows):
            continue
        at = batch.rows - store.block_range(number)[0]
        after = store.codec.decode(block.codes[at], store.dither_keys(view, batch.rows))
        before = teacher(batch).cpu().numpy() if teacher else None
        pixels = batch.images.cpu().numpy().swapaxes(0, 1)
        for i, row in enumerate(batch.rows.tolist()):
            place = np.searchsorted(rows, row)
            mask = int(request.views["mask"][place, 0])
            fired = tuple(op.name for bit, op in enumerate(loader.policy.table) if mask >> bit & 1)
            if request.mixes is not None:
                fired += mixing.named(request.mixes[place, 0])
            said = None if before is None else before[i]
            yield Pair(view, row, pixels[i], float(block.weight[at[i]]), fired, after[i], said)
