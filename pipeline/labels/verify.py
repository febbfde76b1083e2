"""Making a share of a store's rows again, and naming the cause of whatever differs.

Every committed block is read and held against its commit. Of a random share of the good rows the pixels are made again
and, given the teacher, its answers. Causes are told apart in this order; what one explains is not laid on the next:

================== ================================================================================================
wrong data set     the manifest or the samples' key hashes contradict the data: nothing else is looked at
teacher differs    its weights or normalisation contradict the manifest (labels are then not compared); or w, which is
                   stored exactly, is off in most rows, by more than this teacher's arithmetic can be
label row damaged  a block that its checksums or commit do not vouch for; or some rows whose digests, w or labels are
                   not their own, as after an exchange of rows and new checksums
pixels differ      the pixels made now have other digests: another decoder, or other files
wrong codec        w agrees, but the labels of all rows say something else than the teacher
================== ================================================================================================

Missing blocks, samples that the teacher pass skipped and samples that cannot be read now are counted, but are no
findings: a store may be verified while it grows. The command exits with 0 if it found nothing, with 1 if it did, and
with 2 for wrong options or a store that cannot be opened.
"""

import functools
import math
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

import cache
from cache import Store, UserError
from pipeline.config import Verify
from pipeline.data.classes import Classes
from pipeline.data.index import Index, open_data
from pipeline.labels import other_classes
from pipeline.labels.epochs import replayed
from pipeline.labels.judge import DAMAGED, TEACHER, Judge
from pipeline.networks import models
from pipeline.networks.teacher import Teacher
from pipeline.system import device as devices
from pipeline.system.terminal import decimal, progress, summary
from pipeline.views import plan
from pipeline.views.batch import Batch
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy

DATA, PIXELS = "wrong data set", "pixels differ"

_LEAST = 64  # rows, in all views together
_LISTED = 20  # findings of each cause


@dataclass
class Report:
    """What was found. Findings are printed on stderr as they come, the first `_LISTED` of each cause."""

    index: Index
    store: Store
    counts: Counter[str] = field(default_factory=Counter)
    """Findings by cause."""
    facts: dict = field(default_factory=dict)
    """For the summary."""

    def add(
        self, cause: str, what: str, view: int | None = None, row: int | None = None, block: int | None = None
    ) -> None:
        """Enter a finding; its block follows from its row."""
        self.counts[cause] += 1
        if self.counts[cause] > _LISTED:
            return
        where = {"view": view, "row": row, "key": row if row is None else self._key(row), "block": block}
        if view is not None and row is not None:
            where["block"] = row // self.store.manifest.block_rows
        place = ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
        print(": ".join(part for part in (cause, place, what) if part), file=sys.stderr)

    def _key(self, row: int) -> str:
        try:
            return repr(self.index.key(row))
        except UserError:  # its shard is gone
            return f"with hash {self.index.records['key_hash'][row]:016x}"


def run(config: Verify) -> None:
    """Print what was verified, and on stderr what was found; SystemExit(1) if that is anything."""
    report = verify(config)
    for cause, count in report.counts.items():
        if count > _LISTED:
            print(f"{cause}: and {count - _LISTED:,} more", file=sys.stderr)
    found = ", ".join(f"{cause}: {count:,}" for cause, count in report.counts.items())
    summary("verification", {"store": config.store, "data": config.data, **report.facts, "findings": found or "none"})
    if found:
        raise SystemExit(1)


def verify(config: Verify) -> Report:
    """Verify a store. Raises UserError for wrong options, or a store that cannot be opened or holds nothing yet."""
    index = open_data(other_classes.for_data(config), config.data, "train")
    store = cache.open(config.store)
    manifest, report = store.manifest, Report(index, store)
    if not _same_data(index, store, report):
        return report
    missing = set(store.missing_blocks())
    total = manifest.views * manifest.blocks
    if len(missing) == total:
        fix = "run precompute-teacher, it resumes"
        raise UserError(f"store {config.store} holds no labels yet", found=f"{total} missing blocks", fix=fix)
    blocks = {view: [b for b in range(manifest.blocks) if (view, b) not in missing] for view in range(manifest.views)}
    policy, decoder = replayed(manifest)
    judge = _judge(config, policy, report)

    chosen = _choose(config, store, blocks)
    groups: deque[_Group] = deque()
    loader = Loader(index, policy, threads=devices.threads(config), decoder=decoder, max_bad=config.max_bad)
    tally = Counter()
    with progress("verify", total - len(missing), "blocks") as advance:

        def parts() -> Iterator[plan.Part]:
            for group in _groups(config.batch_size, blocks, chosen, report, tally, advance):
                groups.append(group)
                yield group.view, group.rows

        for batch in loader.batches(plan.requests(index, policy, manifest.seed, parts()), digests=True):
            group = groups.popleft()
            tally["rows"] += len(batch.rows)
            group, batch = _compare_pixels(group, batch, report)
            if judge and len(batch.rows):
                judge.look(group.view, batch, group.codes, group.weight, group.energy)
    for finding in judge.conclude() if judge else ():
        report.add(*finding)
    good = int((store.status == 0).sum()) * manifest.views
    report.facts = {
        "rows checked": f"{tally['rows']:,} of {good:,}",
        "blocks read": f"{tally['blocks']:,} of {total:,}; {len(missing):,} are missing",
        "bytes read": decimal(store.label_bytes() + tally["bytes"]),
        "samples without labels": f"{tally['skipped']:,} of those drawn: the teacher pass skipped them",
        "samples unreadable now": f"{len(loader.skipped.causes):,}",
        "labels": f"compared with those of {config.teacher}" if judge else "not compared with a teacher",
        **(judge.facts() if judge else {}),
    }
    return report


def _same_data(index: Index, store: Store, report: Report) -> bool:
    """Is it the data set of the store? If not, say how its keys relate to the store's."""
    ours, theirs = index.records["key_hash"], store.key_hash
    both = min(len(ours), len(theirs))
    differ = np.flatnonzero(ours[:both] != theirs[:both])
    try:
        cache.check(store.manifest, dataset=index.fingerprint, samples=len(index), classes=index.classes)
        if not len(differ) and (index.records["status"] == store.status).all():
            return True
        problem = "the store's samples are not those of its manifest"
    except UserError as error:
        problem = str(error)
    if not len(differ):
        rest = "labels, image bytes, sizes or status do not" if len(ours) == len(theirs) else "there are more or fewer"
        report.add(DATA, f"{problem}; the first {both:,} keys agree, {rest}")
        return False
    order = np.argsort(theirs, kind="stable")
    at = order[np.minimum(np.searchsorted(theirs[order], ours), len(theirs) - 1)]  # where the store has each key
    here = np.arange(len(ours))
    foreign = int((theirs[at] != ours).sum())
    if foreign:
        how = f"{foreign:,} of {len(ours):,} keys are foreign to the store"
    elif len(shift := np.unique((at - here) % len(theirs))) == 1:
        how = f"every sample stands {shift[0]} rows further on in the store, round its end"
    elif (at[differ] < len(ours)).all() and (at[at[differ]] == differ).all():
        how = f"{len(differ) // 2:,} pairs of rows are swapped, the first {differ[0]} and {at[differ[0]]}"
    else:
        how = f"the store has these keys in another order, {len(differ):,} rows moved"
    report.add(DATA, f"{problem}; {how}", row=int(differ[0]))
    return False


def _judge(config: Verify, policy: Policy, report: Report) -> Judge | None:
    """Who compares labels; None if no teacher was given, or another one than the manifest says."""
    if config.teacher is None:
        return None
    manifest = report.store.manifest
    precision = manifest.versions.get("precision", "fp32" if config.precision == "auto" else config.precision)
    if config.precision not in ("auto", precision):
        fix = f"give --precision {precision}"
        raise UserError("the teacher pass had another precision", found=config.precision, expected=precision, fix=fix)
    listed = config.teacher_classes and Classes.from_json(manifest.class_list, "the store's manifest")
    made = functools.partial(models.trained, config.teacher)
    network = other_classes.teacher(config, made, listed or manifest.classes)
    size, features = manifest.teacher_size, manifest.codec["name"] == "features"
    teacher = Teacher(network, policy, devices.pick(config), precision, size=size, features=features)
    made_by = {"teacher": teacher.name, "teacher_weights": teacher.fingerprint}
    try:
        cache.check(manifest, **made_by, mean=teacher.mean, std=teacher.std)
    except UserError as error:
        report.add(TEACHER, str(error))
        return None
    return Judge(report.store, teacher)


def _choose(config: Verify, store: Store, blocks: dict[int, list[int]]) -> dict[int, np.ndarray]:
    """Rows i64 to look at, ascending, of each view: good ones of its committed blocks."""
    rng = np.random.default_rng(config.seed)
    good = np.flatnonzero(store.status == 0)
    there = [(view, good[np.isin(good // store.manifest.block_rows, found)]) for view, found in blocks.items()]
    chosen, drawn = {}, 0
    # Views with few rows first, so that the others make up for what those have not.
    for at, (view, rows) in enumerate(sorted(there, key=lambda item: len(item[1]))):
        least = math.ceil((_LEAST - drawn) / (len(there) - at))
        count = min(len(rows), max(math.ceil(config.fraction * len(rows)), least))
        chosen[view] = np.sort(rng.choice(rows, count, replace=False))
        drawn += count
    return chosen


class _Group(NamedTuple):
    """Chosen rows of one view, as they are stored."""

    view: int
    rows: np.ndarray
    """i64 (n,), ascending."""
    codes: np.ndarray
    weight: np.ndarray
    digest: np.ndarray
    energy: np.ndarray
    blocks: dict[int, np.ndarray]
    """Block -> the digests of all its rows."""

    def take(self, at: np.ndarray | slice) -> "_Group":
        """Some of the rows."""
        arrays = (self.rows[at], self.codes[at], self.weight[at], self.digest[at], self.energy[at])
        return _Group(self.view, *arrays, self.blocks)


def _groups(
    size: int, blocks: dict[int, list[int]], chosen: dict[int, np.ndarray], report: Report, tally: Counter, advance
) -> Iterator[_Group]:
    """Read every committed block, one at a time; of whole ones the chosen rows that have labels, `size` together."""
    for view, numbers in blocks.items():
        parts: list[_Group] = []
        for number in numbers:
            advance(1)
            if (part := _read(view, number, chosen[view], report, tally)) is None:
                continue
            parts.append(part)
            while sum(len(part.rows) for part in parts) >= size:
                joined = _joined(parts)
                yield joined.take(slice(size))
                parts = [joined.take(slice(size, None))._replace(blocks=part.blocks)]
        if any(len(part.rows) for part in parts):
            yield _joined(parts)


def _read(view: int, number: int, chosen: np.ndarray, report: Report, tally: Counter) -> _Group | None:
    """The chosen rows of a block; None if it is damaged."""
    store = report.store
    try:
        block = store.read_block(view, number)
    except UserError as error:
        if not str(error).startswith(f"store {store.path} is damaged"):
            raise  # the disk or the server failed, which says nothing of the labels
        report.add(DAMAGED, str(error), view, block=number)
        return None
    start, stop = store.block_range(number)
    rows = chosen[(chosen >= start) & (chosen < stop)]
    labelled = ~np.isnan(block.weight[rows - start])
    tally.update(blocks=1, bytes=sum(array.nbytes for array in block[1:]), skipped=int((~labelled).sum()))
    rows = rows[labelled]
    at = rows - start
    arrays = block.codes[at], block.weight[at], block.digest[at], block.energy[at]
    return _Group(view, rows, *arrays, {number: block.digest})


def _joined(parts: list[_Group]) -> _Group:
    return _Group(
        parts[0].view,
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.digest for part in parts]),
        np.concatenate([part.energy for part in parts]),
        {number: digest for part in parts for number, digest in part.blocks.items()},
    )


def _compare_pixels(group: _Group, batch: Batch, report: Report) -> tuple[_Group, Batch]:
    """Report rows whose pixels have other digests; the other rows of both."""
    assert batch.digests is not None
    group = group.take(np.searchsorted(group.rows, batch.rows))
    now = cache.pair_digest(batch.digests)
    differ = now != group.digest
    for i in np.flatnonzero(differ):
        row, made = int(group.rows[i]), now[i]
        block = row // report.store.manifest.block_rows
        elsewhere = np.flatnonzero(group.blocks[block] == made)
        if len(elsewhere):
            its = report.store.block_range(block)[0] + int(elsewhere[0])
            report.add(DAMAGED, f"what its pixels' digests should be stands at row {its}", group.view, row)
        else:
            what = f"CRC-32 {made:08x} of both views made now, {group.digest[i]:08x} in the store"
            report.add(PIXELS, what, group.view, row)
    same = np.flatnonzero(~differ)
    return group.take(same), Batch(batch.rows[same], batch.labels[same], batch.images[:, same], None)
