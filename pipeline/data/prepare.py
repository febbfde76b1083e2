"""Images -> WebDataset shards and a checked index.

Every source but existing WebDataset tars is first written as shards; then each shard, written or found, local or
remote, is read once: tar headers and labels become records, and every image is decoded. What cannot be trained on is
quarantined by key, with its cause, and keeps its row. A ledger says what became of every file.
"""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google_crc32c import value as crc32c

from cache.errors import UserError, redacted
from pipeline.config import Prepare
from pipeline.data import classes as class_lists
from pipeline.data import index, tokens
from pipeline.data.addresses import local
from pipeline.data.classes import Classes
from pipeline.data.examine import Item, examine, header
from pipeline.data.ledger import Flaw, Ledger
from pipeline.data.remote import is_remote
from pipeline.data.shards import Reader
from pipeline.data.sources import ANYWHERE, ARGUMENTS, SOURCES, USAGE, info, rules, tars
from pipeline.data.sources.base import Options, Source
from pipeline.data.sources.info import Info
from pipeline.data.sources.rules import Rules
from pipeline.data.sources.tars import Scan, duplicate_key, scan
from pipeline.system.cores import share
from pipeline.system.terminal import decimal, progress, summary

_MAX_INFERRED_CLASSES = 1_000_000  # beyond it a damaged label is likelier than a class
_BATCH_IMAGES, _BATCH_PIXELS = 64, 64 << 20  # under way at once, so that huge photographs do not add up


def run(config: Prepare) -> None:
    """Prepare a data set and print what is in it; see `build`."""
    facts = build(
        config.source,
        config.out,
        classes=config.classes,
        shard_size=config.shard_size,
        seed=config.seed,
        class_order=config.class_order,
        class_map=config.class_map,
        unlabelled=config.unlabelled,
        max_pixels_per_byte=config.max_pixels_per_byte,
        key=config.key,
        label_key=config.label_key,
        labels=config.labels,
    )
    counts = {name: f"{facts[name]:,}" for name in ("classes", "samples", "good", "quarantined", "shards")}
    for name in ("causes", "splits"):
        counts[name] = ", ".join(f"{key}: {count:,}" for key, count in facts[name].items()) or "none"
    images, seconds = decimal(facts["image_bytes"]), f"{facts['seconds']:.1f}"
    summary("prepared", {"out": facts["out"], **counts, "images": images, "seconds": seconds})
    for line in facts["notes"]:  # not in the table, which would break them
        print(line)


def build(
    source: str,
    out: Path,
    *,
    classes: int | None = None,
    shard_size: int = 4096,
    seed: int = 0,
    threads: int | None = None,
    class_order: str = "lexical",
    class_map: Path | None = None,
    unlabelled: bool = False,
    max_pixels_per_byte: float = 1000,
    key: str = "name",
    label_key: str | None = None,
    labels: Path | None = None,
) -> dict[str, Any]:
    """Build the data set folder `out` from `source` (see `sources.USAGE`); `shard_size` in samples.

    A PATTERN of tars or Parquet files is a path or a URL (s3://bucket/key, hf://datasets/OWNER/NAME/PATH,
    http(s)://host/path) with {braces}, and wildcards but for HTTP. Remote tars stay where they are.

    digits, cifar and idx become `out/train` and `out/val`, all others one data set in `out`. Everything is
    built in a sibling folder that takes the name `out` at the end, so `out` is whole or not there.
    `classes` is for webdataset (else the highest label + 1) and synthetic (else 1000). `class_order` and `class_map`
    are those of `pipeline.data.classes`; `unlabelled` and the last three are those of `sources.base.Options`.

    Returns a summary: out, classes, samples, good, quarantined, causes {cause: count}, shards, image_bytes,
    splits {name: good samples} (empty for a single data set), seconds, files (the record of a `Ledger`), warned {what
    the decoder says: count} and notes, the lines that say what a user should know.
    UserError for an existing `out`, an unusable source, a full disk, duplicate keys, or a source of which
    more than half is unusable.
    """
    start = time.monotonic()
    threads = share() if threads is None else threads
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise UserError(f"the output folder {out} exists", fix="choose another --out or remove it")
    for flag, value, low in (("shard-size", shard_size, 1), ("seed", seed, 0)):
        if value < low:
            raise UserError(f"--{flag} out of range", found=value, expected=f"at least {low}", fix=f"correct --{flag}")
    if classes is not None and not 1 <= classes < 2**31:
        raise UserError("--classes out of range", found=classes, expected="at least 1", fix="correct --classes")
    names = class_lists.read_map(class_map) if class_map else None
    options = Options(seed, threads, classes, class_order, unlabelled, names, key, label_key, labels)
    ledger = Ledger()
    partial_out = out.with_name(f".{out.name}.partial")
    try:
        if partial_out.exists():  # of a killed run
            shutil.rmtree(partial_out)
        partial_out.mkdir(parents=True)
        parts = _build(source, partial_out, options, shard_size, max_pixels_per_byte, ledger)
        ledger.close()
        os.rename(partial_out, out)
    except BaseException as error:
        shutil.rmtree(partial_out, ignore_errors=True)
        if isinstance(error, OSError):  # a source's own have become UserErrors
            fix = "free disk space or choose another --out"
            raise UserError(f"cannot build {out}", found=error.strerror or error, fix=fix) from None
        raise
    causes = sum((part.causes for part in parts.values()), Counter())
    warned = sum((part.warned for part in parts.values()), Counter())
    return {
        "out": str(out),
        "classes": next(iter(parts.values())).classes.count,
        "samples": sum(part.samples for part in parts.values()),
        "good": sum(part.good for part in parts.values()),
        "quarantined": causes.total(),
        "causes": dict(causes.most_common()),
        "shards": sum(part.shards for part in parts.values()),
        "image_bytes": sum(part.image_bytes for part in parts.values()),
        "splits": {name: part.good for name, part in parts.items() if name},
        "seconds": time.monotonic() - start,
        "files": ledger.to_json(),
        "warned": dict(warned.most_common()),
        "notes": _notes(parts, ledger, warned),
    }


class _Part(NamedTuple):
    classes: Classes
    labels: np.ndarray
    """Of the good samples."""
    samples: int
    good: int
    causes: Counter[str]
    first: dict[str, str]
    """Cause -> the first flaw of it, and its key."""
    warned: Counter[str]
    shards: int
    image_bytes: int
    notes: list[str]


def _notes(parts: dict[str, _Part], ledger: Ledger, warned: Counter[str]) -> list[str]:
    notes = [f"files: {ledger}", *(f"left out: {line}" for line in ledger.lines())] if ledger.found else []
    for part in parts.values():
        for cause, count in part.causes.most_common():
            files = f" ({ledger.quarantined[cause]:,} files)" if ledger.quarantined[cause] else ""
            notes.append(f"quarantined: {count:,}{files}: {part.first[cause]}")
    notes += [f"read with a decoder's warning: {count:,}: {text} (see warned.jsonl)" for text, count in warned.items()]
    for name, part in parts.items():
        where = f" in {name}" if name else ""
        remarks = (*class_lists.remarks(part.classes, part.labels), *part.notes)
        notes += [f"note{where}: {remark}" for remark in remarks]
    return notes


def _build(
    source: str, folder: Path, options: Options, shard_size: int, pixels_per_byte: float, ledger: Ledger
) -> dict[str, _Part]:
    """Write shards where the source has none, then the index of each split ("" where there is only one)."""
    kind, _, argument = source.partition(":")
    if kind in ("webdataset", *SOURCES):
        rules.unused(kind, options)
    if kind == "webdataset" and argument:
        reader = Reader()
        shards = tars.only_tars(reader, argument, reader.expand(argument), ledger)
        said = info.beside(reader, shards)
        listed = rules.listed(options) or said.classes
        checks = _Checks(source, listed, rules.of(options, listed), pixels_per_byte, options.threads, said)
        parts = {"": _index(folder, shards, checks, ledger)}
    elif kind in SOURCES and re.fullmatch(ARGUMENTS.get(kind, ".+"), argument, re.DOTALL):
        address = argument if kind in (*ARGUMENTS, *ANYWHERE) else local(argument)
        parts = {}
        for name, split in SOURCES[kind](address, options, ledger).items():
            rules.own_classes(source, split.classes, options)
            part = folder / name
            part.mkdir(exist_ok=True)
            shards = _write_shards(split, part, shard_size)
            checks = _Checks(
                source, split.classes, Rules(labelled=not options.unlabelled), pixels_per_byte, options.threads
            )
            parts[name] = _index(part, shards, checks, ledger, split.files)
            if parts[name].samples != split.count:
                raise UserError(
                    f"{source} has names that WebDataset skips",
                    found=f"{parts[name].samples} of {split.count} samples in the shards",
                    fix="rename folders like __name__",
                )
    else:
        raise UserError("unknown source", found=source, expected=USAGE, fix="correct SOURCE")
    (folder / "ledger.json").write_text(json.dumps(ledger.to_json(), indent=1) + "\n")
    return parts


def _write_shards(source: Source, folder: Path, shard_size: int) -> list[str]:
    """Samples -> shard-000000.tar and so on, the same bytes every time; returns their names."""
    # webdataset imports torch, which would cost every other command a second.
    from webdataset.writer import ShardWriter

    names: list[str] = []
    with ShardWriter(
        str(folder).replace("%", "%%") + "/shard-%06d.tar",
        maxcount=shard_size,
        encoder=False,
        mtime=0,
        verbose=0,
        post=lambda name: names.append(os.path.basename(name)),
    ) as writer:
        for sample in _track(source.samples, source.count, "writing shards", "images"):
            unknown = sample.label is None or source.classes.unlabelled
            label = {} if unknown else {"cls": str(sample.label).encode()}
            writer.write({"__key__": sample.key, sample.extension: sample.image, **label})
    return names


class _Checks(NamedTuple):
    """What the samples of some shards are held against."""

    source: str
    classes: Classes | None
    """None: as many as the labels say."""
    rules: Rules
    pixels_per_byte: float
    threads: int
    said: Info = Info()


def _index(folder: Path, shards: list[str], checks: _Checks, ledger: Ledger, files: int | None = None) -> _Part:
    """Scan and check `shards` (URLs, or paths absolute or relative to `folder`), write the index into `folder`.

    The ledger is told of every member; or, where the shards were written here, each sample is so many `files`.
    """
    scans: list[Scan] = []
    warned: list[dict] = []
    batches = _batches(shards, folder, scans, checks, ledger if files is None else Ledger(), warned)
    examine(batches, checks.threads)
    records = np.concatenate([found.records for found in scans])
    records["shard"] = np.repeat(np.arange(len(scans)), [len(found.records) for found in scans])
    keys = [key for found in scans for key in found.keys]
    flaws = {row: flaw for row, flaw in enumerate(flaw for found in scans for flaw in found.flaws) if flaw}
    classes = checks.classes or Classes(_inferred(records))
    _check_labels(records, flaws, classes.count)
    bad = list(flaws)
    records["status"][bad] = 1
    for name in ("height", "width", "cmyk"):
        records[name][bad] = 0

    quarantine = [
        {"key": None, "shard": redacted(shard), "offset": found.end, "cause": found.cut}
        for shard, found in zip(shards, scans, strict=True)
        if found.cut
    ]
    first = {line["cause"]: f"{line['cause']}, {line['shard']}" for line in reversed(quarantine)}
    members = [number for found in scans for number in found.files]
    for row, flaw in sorted(flaws.items()):
        shard, offset = redacted(shards[records["shard"][row]]), int(records["offset"][row])
        line = {"key": keys[row], "shard": shard, "offset": offset}
        quarantine.append(line | {"cause": flaw.cause} | ({"found": flaw.found} if flaw.found else {}))
        first.setdefault(flaw.cause, f"{flaw}, key {keys[row]!r}")
        ledger.quarantine(flaw.cause, members[row] if files is None else files)
    counts = Counter(line["cause"] for line in quarantine)
    good = len(records) - len(flaws)
    if good == 0 or good < len(quarantine):
        worst = cause = ""
        if counts:
            worst, times = counts.most_common(1)[0]
            found = next((flaw.found for flaw in flaws.values() if flaw.cause == worst and flaw.found), "")
            cause = f", most often: {worst} ({times})" + (f", found {found}" if found else "")
        left = "; ".join(f"{count:,} {reason}" for reason, count in ledger.left_out.most_common(2))
        raise UserError(
            f"most of {checks.source} is unusable" if good else f"nothing in {checks.source} is usable",
            found=f"{good} good and {len(quarantine)} bad samples{cause}" + (f"; left out: {left}" if left else ""),
            expected="at least half of them good",
            fix=tars.fix(worst),
        )
    index.write(folder, records, shards, quarantine, source=redacted(checks.source), classes=classes)
    if warned:
        (folder / "warned.jsonl").write_text("".join(json.dumps(line) + "\n" for line in warned))
    labels = records["label"][records["status"] == 0]
    remarks = Counter(line["warning"] for line in warned)
    size = int(records["size"].sum(dtype=np.int64))
    notes = checks.said.remarks(shards, [len(found.records) for found in scans])
    if any(map(tokens.signed, shards)):
        notes.append("dataset.json keeps signed URLs, which open the shards until they expire; only you may read it")
    return _Part(classes, labels, len(records), good, counts, first, remarks, len(shards), size, notes)


def _check_keys(scans: list[Scan], holders: dict[int, int]) -> None:
    """The last scan may repeat no key, nor the hash of one: identity hangs on it. `holders`: key hash -> scan."""
    for key, hashed in zip(scans[-1].keys, scans[-1].records["key_hash"].tolist(), strict=True):
        if (short := tars.plain(key)) != key:
            hashed = index.key_hash(short)
        if hashed not in holders:
            holders[hashed] = len(scans) - 1
            continue
        other = scans[holders[hashed]]
        twin = next(twin for twin in other.keys if index.key_hash(tars.plain(twin)) == hashed)
        if tars.plain(twin) == short:
            raise duplicate_key(key, other.shard, scans[-1].shard)
        raise UserError(
            "two keys have the same 64-bit hash",
            found=f"{twin!r} in {other.shard} and {key!r} in {scans[-1].shard}",
            fix="rename one of the two samples",
        )


def _inferred(records: np.ndarray) -> int:
    """The number of classes that the labels ask for."""
    classes = max(int(records["label"].max(initial=-1)) + 1, 1)
    if classes > _MAX_INFERRED_CLASSES:
        raise UserError("the highest label is no class", found=classes - 1, fix="give the count by --classes")
    return classes


def _check_labels(records: np.ndarray, flaws: dict[int, Flaw], classes: int) -> None:
    """Add rows with a label outside [0, classes) to `flaws`."""
    label = records["label"]
    for row in np.flatnonzero((label < 0) | (label >= classes)):
        flaws.setdefault(int(row), Flaw(f"label outside [0, {classes})", str(label[row])))


def _batches(
    shards: list[str], folder: Path, scans: list[Scan], checks: _Checks, ledger: Ledger, warned: list[dict]
) -> Iterator[list[Item]]:
    """Scan shard after shard, appending to `scans`; images that may be decoded together. Fills crc and cmyk."""
    reader = Reader()
    holders: dict[int, int] = {}
    batch: list[Item] = []
    batch_pixels = 0
    for name in _track(shards, len(shards), "checking shards", "shards"):
        shard = name if is_remote(name) else str(folder / name)
        with reader.open(shard, folder) as file:
            found = scan(file, redacted(shard), ledger, checks.rules)
            scans.append(found)
            _check_keys(scans, holders)
            if not checks.classes:
                _inferred(found.records)  # for its error, which should not wait for the last shard
            for row, record in enumerate(found.records):
                image = os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
                record["crc"] = crc32c(image)
                if found.flaws[row]:
                    continue
                found.flaws[row], pixels, record["cmyk"] = header(image, checks.pixels_per_byte)
                if found.flaws[row]:
                    continue
                if len(batch) == _BATCH_IMAGES or (batch and batch_pixels + pixels > _BATCH_PIXELS):
                    yield batch
                    batch, batch_pixels = [], 0
                batch.append(_item(image, found, row, warned))
                batch_pixels += pixels
    if batch:
        yield batch


def _item(image: bytes, found: Scan, row: int, warned: list[dict]) -> Item:
    def tell(result: tuple[int, int] | Flaw) -> None:
        if isinstance(result, Flaw):
            found.flaws[row] = result
        else:
            found.records["height"][row], found.records["width"][row] = result

    def remark(text: str) -> None:
        warned.append({"key": found.keys[row], "shard": found.shard, "warning": text})

    return Item(image, bool(found.records["cmyk"][row]), tell, remark)


def _track(items: Iterable, total: int, what: str, unit: str) -> Iterator:
    with progress(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)
