"""The teacher pass: every view of every sample is seen once, and its soft labels are kept.

Blocks of the store are handed out one by one to the processes of the job (`pipeline.labels.array`); a batch never
crosses a block, so a block's labels depend neither on where a killed run stopped nor on who computes it.
"""

import dataclasses
import functools
import json
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from cache import Manifest, Store, UserError
from cache.codec.fidelity import Drift, drift
from kernels.reference import cosine_weight
from pipeline.config import PrecomputeTeacher
from pipeline.data import dali, probes
from pipeline.data.index import Index, matched, open_data
from pipeline.labels import advice, array, other_classes
from pipeline.labels.calibrate import Calibration, calibrate
from pipeline.labels.epochs import numbered_alike
from pipeline.networks import called, models
from pipeline.networks.teacher import Said, Teacher
from pipeline.system import device as devices
from pipeline.system import ranks
from pipeline.system.terminal import counted, decimal, duration, progress, summary
from pipeline.views import plan
from pipeline.views import policy as policies
from pipeline.views.batch import Batch
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy

_CHECKED = 1024  # pairs per block whose labels are decoded again and compared
_BEHIND = 4  # batches whose labels may wait to be coded
_BESIDE = cache.BESIDE_BYTES


def precompute(
    data: str | Path, teacher: str | Callable[[torch.Tensor], Any], store: str | Path, *, views: int, **options: Any
) -> None:
    """As `pipeline precompute-teacher`, from Python. Run again, it resumes.

    `teacher` is NAME@WEIGHTS, or any callable from normalised images f32 (B, 3, S, S) to logits (B, classes), such as
    an ensemble; see `models.of_callable`. `options` are fields of `PrecomputeTeacher`. Raises UserError.
    """
    spec = teacher if isinstance(teacher, str) else called.PREFIX
    config = PrecomputeTeacher(data=Path(data), teacher=spec, store=str(store), views=views, **options)
    index = open_data(other_classes.for_data(config), config.data, "train")
    if isinstance(teacher, str):
        made = functools.partial(models.trained, spec)
    else:
        made = functools.partial(models.of_callable, teacher)
    _run(config, index, other_classes.teacher(config, made, index.class_list))


def run(config: PrecomputeTeacher) -> dict:
    """Create, complete or extend a store; {"pairs", "pairs_per_s"} of this process. Raises UserError for anything in it
    that contradicts the options."""
    machine = other_classes.for_data(config)
    index = open_data(machine, config.data, "train")
    classes = index.class_list if config.teacher_classes else index.classes  # names are compared below
    network = other_classes.teacher(config, functools.partial(models.trained, config.teacher), classes)
    index = matched(index, machine, network.class_list or index.class_list, "--data", f"--teacher {config.teacher}")
    return _run(config, index, network)


def _run(config: PrecomputeTeacher, index: Index, network: models.Network) -> dict:
    turn = array.turn(config.array)
    device = devices.pick(config)
    policy = policies.load(config.policy)
    precision = devices.arithmetic(config.precision, device)
    features = _features_wanted(config)
    teacher = Teacher(network, policy, device, precision, config.compile, config.teacher_size, features)
    if config.dry_run:
        found = calibrate(config, index, policy, teacher)
        _show_plan(config, index, found)
        return {"pairs": 0, "pairs_per_s": found.pairs_per_second}
    if ranks.rank() == 0:
        _open_or_create(config, index, policy, teacher)
    ranks.after_first("store")
    store = cache.open(config.store)

    loader = Loader(
        index,
        policy,
        threads=devices.threads(config),
        decoder=devices.decoder(config.decoder, teacher.device),
        max_bad=config.max_bad,
    )
    started = time.perf_counter()
    blocks, done, outside, rate, wanted = 0, 0, [], 0.0, 0
    for number, todo in enumerate(
        array.rounds(lambda: _together(store.missing_blocks(), config.views_per_decode), turn)
    ):
        wanted += sum(len(views) for views, _ in todo)
        filled = _fill(config, loader, teacher, store, todo, f"blocks.{number}")
        blocks, done, outside, rate = blocks + filled[0], done + filled[1], outside + filled[2], filled[3] or rate
    result = {"pairs": done, "pairs_per_s": rate}
    found = [json.loads(text) for text in ranks.gather("filled", json.dumps([blocks, done, outside]))]
    if ranks.rank():
        return result
    done, outside = sum(pairs for _, pairs, _ in found), [line for _, _, lines in found for line in lines]
    seconds = time.perf_counter() - started
    summary(
        "teacher pass",
        {
            "store": config.store,
            "views computed": f"{done:,} in {counted(sum(count for count, _, _ in found), 'block')}"
            if wanted
            else "none, all were there",
            **({"blocks by process": " + ".join(str(blocks) for blocks, _, _ in found)} if len(found) > 1 else {}),
            "rate": f"{done / seconds:,.0f} pairs/s" if done else "-",
            "codec": f"{store.manifest.codec['name']}, {store.codec.row_bytes / 2:g} bytes per vector in memory",
            "bytes per vector": _bytes(store, 2 * len(index) * config.views),
            "blocks outside the budget": f"{len(outside)}, the first {outside[0]}" if outside else "none",
            "quarantined samples": int((index.records["status"] != 0).sum()),
            "skipped samples": len(loader.skipped.causes),
        },
    )
    return result


def _features_wanted(config) -> bool:
    """Whether the store keeps features: as asked, or as it does already. Raises UserError where that is at odds."""
    if config.features and config.codec != "auto":
        fix = "leave --codec out, or --features"
        raise UserError("--features has a code of its own", found=f"--codec {config.codec}", fix=fix)
    if not cache.exists(config.store):
        return config.features
    kept = cache.open(config.store).manifest.codec["name"]
    if config.features and kept != "features":
        fix = "leave --features out, or run precompute-teacher into another store"
        raise UserError("the store keeps no features", found=f"codec {kept}", expected="features", fix=fix)
    return kept == "features"


def _fill(
    config, loader: Loader, teacher: Teacher, store: Store, todo: array.Work, name: str
) -> tuple[int, int, list[str], float]:
    """Compute the missing blocks that fall to this process: their number, pairs, those the code does not suit, and
    pairs per second once the first batch was there. `name` is that of the hand-out."""
    index = loader.index
    sizes = [len(views) * len(good_rows(index, store, block)) for views, block in todo]
    under_way: deque[tuple[_Block, bool]] = deque()  # the block of each batch under way, and whether it is its last
    blocks, done, outside, first = 0, 0, [], None
    with progress("teacher", sum(sizes), "pairs", show=ranks.rank() == 0) as advance, _Later() as later:

        def parts() -> Iterator[plan.Part]:
            ours = 0
            for number in ranks.hand_out(name, len(todo)):
                views, at = todo[number]
                views = [view for view in views if not array.committed(store, view, at)]  # by another job meanwhile
                if not views:
                    continue
                advance(sum(sizes[ours:number]))  # what other processes have taken
                ours = number + 1
                rows = good_rows(index, store, at)
                filling, left = [_Block(store, view, at, rows) for view in views], len(rows)
                for part in plan.cut(views, rows, config.batch_size):
                    left -= len(part[1])
                    under_way.extend((block, not left) for block in filling)
                    yield part

        requests = plan.requests(index, loader.policy, config.seed, parts())
        for batch in loader.batches(requests, digests=True):
            block, last = under_way.popleft()
            if len(batch.rows):
                later(block.put, batch, teacher.said(batch))
            if last:
                later(block.finish, outside)
                blocks += 1
            done += len(batch.rows)
            first = first or (time.perf_counter(), done)
            advance(len(batch.rows))
    # The first batch pays for the start.
    steady = (done - first[1]) / (time.perf_counter() - first[0]) if first else 0.0
    return blocks, done, outside, steady


def _together(missing: list[tuple[int, int]], most: int) -> list[tuple[list[int], int]]:
    """Missing (view, block)s as (views, block): up to `most` views of a block, for which its samples are decoded once.

    A batch is still of one view and within a block, so the labels do not depend on it.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for view, block in missing:
        found.setdefault((view // most, block), []).append(view)
    return [(views, block) for (_, block), views in found.items()]


class _Later:
    """Work done in order by one thread behind the caller's back: the teacher waits neither for codes nor for the disk.

    An error surfaces at one of the next calls, or at the end.
    """

    def __enter__(self) -> "_Later":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="code")
        self._waiting: deque[Future] = deque()
        return self

    def __call__(self, function, *arguments) -> None:
        self._waiting.append(self._thread.submit(function, *arguments))
        while len(self._waiting) > _BEHIND or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def __exit__(self, kind, *_) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()


class _Block:
    """The arrays of one block while it fills; quarantined rows stay zero, the weight of skipped ones NaN."""

    def __init__(self, store: Store, view: int, block: int, rows: np.ndarray):
        self.store, self.view, self.block = store, view, block
        self.start, stop = store.block_range(block)
        self.codes = np.zeros((stop - self.start, store.codec.row_bytes), np.uint8)
        self.weight = np.zeros(stop - self.start, np.float32)
        self.weight[rows - self.start] = np.nan
        self.digest = np.zeros((stop - self.start, 2), np.uint32)
        self.energy = np.zeros((stop - self.start, store.energies), np.float32)
        self.energy[rows - self.start] = np.nan
        self._sample: list[tuple[np.ndarray, np.ndarray]] = []  # rows and their logits, of the first pairs

    def put(self, batch: Batch, said: Said) -> None:
        """Code what was said of a batch; w = 1 + cos of the raw logits, in float64."""
        at, logits = batch.rows - self.start, said.logits
        assert batch.digests is not None
        self.weight[at] = cosine_weight(logits[:, 0].double(), logits[:, 1].double()).float().cpu().numpy()
        if self.store.energies:
            self.energy[at] = -logits.double().logsumexp(2).float().cpu().numpy()
        answers = logits.cpu().numpy()
        coded = answers if said.coded is logits else said.coded.cpu().numpy()
        self.codes[at] = self.store.codec.encode(coded, self.store.dither_keys(self.view, batch.rows))
        self.digest[at] = batch.digests
        if sum(len(rows) for rows, _ in self._sample) < _CHECKED:
            self._sample.append((batch.rows, answers))

    def finish(self, outside: list[str]) -> None:
        """Commit the block; if its labels are worse than the code promises, say so and add to `outside`."""
        if array.committed(self.store, self.view, self.block):
            return  # by another job, to the same bytes
        found = Drift()
        if self._sample:
            rows = np.concatenate([rows for rows, _ in self._sample])
            answers = np.concatenate([answers for _, answers in self._sample])
            dither_keys = self.store.dither_keys(self.view, rows)
            found = drift(
                self.store.codec, answers, self.codes[rows - self.start], dither_keys, self.store.manifest.temperature
            )
        lost = found.kl, found.slope
        energy = self.energy if self.store.energies else None
        self.store.write_block(self.view, self.block, self.codes, self.weight, self.digest, lost, energy)
        if complaint := found.beyond(self.store.manifest.fidelity.get("budget")):
            outside.append(f"view {self.view}, block {self.block}: {complaint}")
            print(f"labels beyond the budget: {outside[-1]}", file=sys.stderr)


def good_rows(index: Index, store: Store, block: int) -> np.ndarray:
    """Rows i64 of a block that are not quarantined."""
    start, stop = store.block_range(block)
    return start + np.flatnonzero(index.records["status"][start:stop] == 0)


def _open_or_create(config, index: Index, policy: Policy, teacher: Teacher) -> None:
    """Make the store, or check that it is the one that the options describe, and extend it where they ask for more."""
    status, key_hash = index.records["status"], index.records["key_hash"]
    if not cache.exists(config.store):
        found = calibrate(config, index, policy, teacher)
        manifest = _manifest(config, index, policy, teacher, found.codec.config, found.to_json())
        _announce(manifest, found)
        try:
            cache.create(config.store, manifest, status, key_hash)
            return
        except UserError:
            if not cache.exists(config.store):
                raise  # else another process has made it meanwhile: it is joined
    store = cache.open(config.store)
    made = store.manifest
    numbered_alike(index, config, made)
    wanted = _manifest(config, index, policy, teacher, made.codec, made.fidelity)
    if probes.decoder_of(made.decoder) == probes.decoder_of(wanted.decoder):
        probes.check(made.decoder, made.versions)
        wanted = dataclasses.replace(wanted, decoder=made.decoder)  # a store from before there were probes has none
    if not config.energy:
        wanted = dataclasses.replace(wanted, energy=made.energy)
    if config.codec not in ("auto", made.codec["name"]):
        raise UserError(
            "the store has another codec",
            found=made.codec["name"],
            expected=config.codec,
            fix="give the store's --codec, or run precompute-teacher into another store",
        )
    for flag, what, wished, found in (
        ("--kl-budget", "KL budget", config.kl_budget, made.fidelity.get("budget")),
        ("--temperature", "temperature", config.temperature, made.temperature),
    ):
        if wished not in (None, found):
            fix = f"leave {flag} out, or run precompute-teacher into another store"
            raise UserError(f"the store has another {what}", found=found, expected=wished, fix=fix)
    if wanted.samples > made.samples and policy.mix:
        what, fix = "a store of mixed views cannot grow with its data set", "run precompute-teacher into another store"
        raise UserError(what, found=f"{wanted.samples:,} samples", expected=f"{made.samples:,}", fix=fix)
    if wanted.views > made.views or wanted.samples > made.samples:
        cache.extend(store, wanted, status, key_hash)
    else:
        cache.check(made, **wanted.identity())


def _manifest(config, index: Index, policy: Policy, teacher: Teacher, codec: dict, fidelity: dict) -> Manifest:
    return Manifest(
        **teacher.on(index, policy),
        samples=len(index),
        seed=config.seed,
        views=config.views,
        decoder=probes.identity(devices.decoder(config.decoder, teacher.device)),
        codec=codec,
        block_rows=config.block_rows,
        versions={name: version(name) for name in ("torch", "numpy", "zarr", "numba")}
        | {"decoding": dali.version(), "python": platform.python_version()}
        | {"device": str(teacher.device), "precision": teacher.precision},
        fidelity=fidelity,
        class_list=index.class_list.to_json(),
        energy=config.energy or None,
    )


def _bytes(store: Store, vectors: int) -> str:
    whole = sum(store.sizes().values())
    return f"{store.label_bytes() / vectors:.1f} on disk, {whole / vectors:.1f} with w, digest and all else"


def _announce(manifest: Manifest, found: Calibration) -> None:
    print(f"labels: {_described(found)}; {_size(manifest.samples, manifest.views, found)}", flush=True)
    if found.agreement:
        print(f"teacher: agrees with the labels of {found.agreement}", flush=True)
        found.agreement.warn(f"teacher {manifest.teacher}")


def _described(found: Calibration) -> str:
    kl = ", ".join(f"T = {temperature:g}: {value:.2g}" for temperature, value in found.fidelity.kl.items())
    noise = "" if found.feature_noise is None else f", {found.feature_noise:.1%} noise in features"
    return (
        f"{found.codec.config['name']}, {found.fidelity.bytes_per_vector:.1f} bytes per vector on disk, "
        f"{found.fidelity.bytes_per_vector + _BESIDE / 2:.1f} with w and digest, "
        f"{found.codec.row_bytes / 2:g} in memory; KL in nats at {kl}; slope {found.fidelity.slope:.4f}{noise}"
    )


def _size(samples: int, views: int, found: Calibration) -> str:
    view = samples * (2 * found.fidelity.bytes_per_vector + _BESIDE)
    return f"{decimal(view)} per view of {samples:,} samples, {decimal(view * views)} for {views} views"


def _show_plan(config, index: Index, found: Calibration) -> None:
    if found.agreement:
        found.agreement.warn(f"teacher {config.teacher}")
    samples = len(index)
    left = index.usable * config.views
    if cache.exists(config.store):
        store = cache.open(config.store)
        missing = set(store.missing_blocks())
        made = [(v, b) for v in range(store.manifest.views) for b in range(store.manifest.blocks)]
        left -= sum(len(good_rows(index, store, block)) for view, block in made if (view, block) not in missing)
    summary(
        "dry run: nothing was written",
        {
            "agrees with the labels of": found.agreement or "none, there are no labels",
            "codec": _described(found),
            "store": _size(samples, config.views, found),
            "one plane in memory": decimal(samples * found.codec.row_bytes),
            "pairs to compute": f"{left:,}",
            "rate": f"{found.pairs_per_second:,.0f} pairs/s in this process",
            "time": duration(left / found.pairs_per_second) if found.pairs_per_second else "-",
            "advice": advice.on_views(config.views),
        },
    )
