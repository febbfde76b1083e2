"""The teacher pass: every view of every sample is seen once, and its soft labels are kept.

Blocks of the store are worked through in order, view by view; a batch never crosses a block, so a block's labels do
not depend on where a killed run stopped.
"""

import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice

import numpy as np
import torch
from nvidia.dali import __version__ as dali_version

import cache
from cache import Manifest, Store, UserError, philox
from cache import codec as codecs
from kernels.reference import cosine_weight
from pipeline import decode, models, views
from pipeline import device as devices
from pipeline import policy as policies
from pipeline.config import PrecomputeTeacher
from pipeline.index import Index
from pipeline.loader import Batch, Request, load
from pipeline.policy import Policy
from pipeline.report import progress, summary
from pipeline.skipped import Skipped


def run(config: PrecomputeTeacher) -> None:
    """Create or complete a store. Raises UserError for anything in an existing store that contradicts the options."""
    if config.views < 1:
        raise UserError("too few views", found=config.views, expected="at least 1")
    device = devices.pick(config)
    index = devices.open_data(config, config.data, "train")
    policy = policies.load(config.policy)
    teacher = models.create(config.teacher, index.classes)
    normalise = devices.Normalise(teacher.mean or policy.mean, teacher.std or policy.std, device)
    module = devices.place(teacher.module, device).eval()
    models.probe(teacher, policy.base.size)
    store = _open_or_create(config, _manifest(config, index, policy, teacher, device), index)

    todo = store.missing_blocks()
    blocks = len({block for _, block in todo})
    started = time.perf_counter()
    skipped = Skipped(index, config.max_bad)
    plans = [(view, block, good_rows(index, store, block)) for view, block in todo]
    batches = load(
        index,
        plan(index, policy, config, plans),
        policy,
        threads=devices.threads(config),
        decoder=devices.decoder(config.decoder, device),
        digests=True,
        skipped=skipped,
    )
    done = 0
    with progress("teacher", sum(len(rows) for _, _, rows in plans), "pairs") as advance:
        for view, block, rows in plans:
            arrays = _Block(store, block, rows)
            for batch in islice(batches, -(-len(rows) // config.batch_size)):
                if not len(batch.rows):
                    continue
                arrays.put(batch, *_labels(module, normalise, batch, config.precision, store, view, index))
                advance(len(batch.rows))
            store.write_block(view, block, arrays.pairs, arrays.weight, arrays.digest)
            done += len(rows)
    seconds = time.perf_counter() - started
    summary(
        "teacher pass",
        {
            "store": config.store,
            "views computed": f"{done:,} in {len(todo)} blocks ({blocks} distinct)" if todo else "none, all were there",
            "rate": f"{done / seconds:,.0f} pairs/s" if done else "-",
            "bytes per vector": store.codec.row_bytes / 2,
            "label bytes": f"{store.codec.row_bytes * len(index) * config.views:,}",
            "quarantined samples": int((index.records["status"] != 0).sum()),
            "skipped samples": len(skipped.causes),
        },
    )


def good_rows(index: Index, store: Store, block: int) -> np.ndarray:
    """Rows i64 of a block that are not quarantined."""
    start, stop = store.block_range(block)
    return start + np.flatnonzero(index.records["status"][start:stop] == 0)


def plan(index: Index, policy: Policy, config, blocks: list) -> Iterator[Request]:
    """Batches of each (view, block, rows), never across blocks."""
    for view, _, rows in blocks:
        for at in range(0, len(rows), config.batch_size):
            part = rows[at : at + config.batch_size]
            yield part, views.of(index.records[part], config.seed, view, policy)


@torch.inference_mode()
def _labels(module, normalise, batch: Batch, precision, store, view, index) -> tuple[np.ndarray, np.ndarray]:
    """Encoded logits u8 (B, row_bytes) and w = 1 + cos f32 (B,), the cosine taken in float64 of the raw logits."""
    device = normalise.scale.device
    with devices.autocast(device, precision):
        logits = torch.stack([module(normalise(images)) for images in batch.images], dim=1).float()
    weight = cosine_weight(logits[:, 0].double(), logits[:, 1].double()).float()
    stream = philox.stream(store.manifest.seed, index.records["key_hash"][batch.rows], view)
    return store.codec.encode(logits.cpu().numpy(), stream), weight.cpu().numpy()


class _Block:
    """The arrays of one block while it fills; quarantined rows stay zero, the weight of skipped ones NaN."""

    def __init__(self, store: Store, block: int, rows: np.ndarray):
        self.start, stop = store.block_range(block)
        self.pairs = np.zeros((stop - self.start, store.codec.row_bytes), np.uint8)
        self.weight = np.zeros(stop - self.start, np.float32)
        self.weight[rows - self.start] = np.nan
        self.digest = np.zeros((stop - self.start, 2), np.uint32)

    def put(self, batch: Batch, pairs: np.ndarray, weight: np.ndarray) -> None:
        at = batch.rows - self.start
        assert batch.digests is not None
        self.pairs[at], self.weight[at], self.digest[at] = pairs, weight, batch.digests


def _manifest(config, index: Index, policy: Policy, teacher: models.Network, device: torch.device) -> Manifest:
    described = policy.to_config()
    return Manifest(
        dataset=index.fingerprint,
        samples=len(index),
        classes=index.classes,
        teacher=teacher.name,
        teacher_weights=teacher.fingerprint,
        mean=tuple(teacher.mean or policy.mean),
        std=tuple(teacher.std or policy.std),
        base=described.pop("base"),
        policy=described,
        seed=config.seed,
        views=config.views,
        size=policy.base.size,
        decoder=decode.identity(devices.decoder(config.decoder, device)),
        codec=codecs.make(config.codec, classes=index.classes).config,
        block_rows=config.block_rows,
        versions={name: version(name) for name in ("torch", "numpy", "zarr", "numba")}
        | {"dali": dali_version, "python": platform.python_version()}
        | {"device": str(device), "precision": config.precision},
    )


def _open_or_create(config, manifest: Manifest, index: Index) -> Store:
    if not config.store.exists():
        return cache.create(config.store, manifest, index.records["status"])
    store = cache.open(config.store)
    cache.check(store.manifest, **manifest.identity())
    return store
