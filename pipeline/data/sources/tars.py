"""Tars of samples as WebDataset has them: members that share a key, among them an image and a label."""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from cache.errors import UserError, redacted
from pipeline.data import index
from pipeline.data.ledger import Flaw, Ledger
from pipeline.data.shards import Reader
from pipeline.data.sources.base import EXTENSIONS
from pipeline.data.sources.rules import MAX_LABEL_BYTES, Rules, short

_MAX_IMAGE_BYTES = 1 << 30
_BLOCK, _CHUNK = 512, 1 << 20
_MAX_LINKS = 40  # one behind the other, as Linux allows

_MAGIC = 257, b"ustar"


class Scan(NamedTuple):
    """What the headers and labels of one tar say."""

    shard: str
    records: np.ndarray
    """(n,) RECORD; shard, height, width, crc and status still 0."""
    keys: list[str]
    flaws: list[Flaw | None]
    """Why a sample cannot be used."""
    files: list[int]
    """Members that each sample is."""
    end: int
    """Byte behind the last member."""
    cut: str | None
    """Why nothing could be read from there on; None for a whole tar."""


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    end: int
    """Byte behind it."""
    link: str | None = None
    """The name that a link leads to."""
    regular: bool = True


def only_tars(reader: Reader, pattern: str, shards: list[str], ledger: Ledger) -> list[str]:
    """The shards that a pattern named on purpose, and of those that its wildcards met the tars alone."""
    kept = []
    for shard in shards:
        meant = ".tar" in os.path.basename(shard) or os.path.basename(shard) == os.path.basename(pattern)
        at, magic = _MAGIC
        if meant or reader.read(shard, at, len(magic)) == magic:
            kept.append(shard)
        else:
            ledger.meet()
            ledger.leave(redacted(shard), "not a tar")
    if not kept:
        kinds = "; ".join(ledger.lines())
        raise UserError(f"no tar matches {pattern}", found=kinds, expected="uncompressed tars", fix="check the pattern")
    return kept


def scan(file: BinaryIO, shard: str, ledger: Ledger, rules: Rules | None = None) -> Scan:
    """Samples of a tar: members that share a key, wherever they stand; rows in order of appearance.

    Tars that were joined are read one after the other, and links to members of the same tar lead to them. A tar is
    whole if a block of zeros follows its members. In one that is not, the members before the cut count, and a last
    sample that lacks its image or label goes with the rest. Every member is told to the `ledger`.

    UserError, with the name `shard`, for an unreadable file and for a key that has two members of one extension.
    """
    rules = rules or Rules()
    samples: dict[str, _Sample] = {}  # by key without ./
    last = ""
    try:
        tar = _Tar(file)
        for member in tar.members():
            ledger.meet()
            if reason := _why_not(member):
                ledger.leave(member.name, reason, kind=None if member.regular else "special")
                continue
            key, extension = index.split_name(member.name) or ("", "")
            last = plain(key)
            sample = samples.setdefault(last, _Sample(rules.keyed(key, shard)))
            if extension in sample.members:
                raise duplicate_key(key, shard, shard)
            sample.members[extension] = member
        _follow_links(file, samples, ledger)
        if tar.behind:
            ledger.meet()
            ledger.leave(f"byte {tar.end} of {shard}", "bytes behind the end of a tar", kind=f"of {tar.behind:,} bytes")
        if tar.cut:
            lost = 1
            if last in samples and not samples[last].whole(rules):
                lost += len(samples.pop(last).members)
            ledger.meet()
            ledger.use(lost)
            ledger.quarantine(tar.cut, lost)
        rows, flaws, files = [], [], []
        for sample in samples.values():
            offset, size, label, flaw = _row(file.fileno(), sample, rules)
            rows.append((0, offset, size, 0, 0, label, index.key_hash(sample.key), 0, 0, 0))
            flaws.append(flaw)
            files.append(_account(sample, ledger, rules.labelled))
    except OSError as error:
        raise UserError(f"cannot read shard {shard}", found=error.strerror, fix="check the file") from None
    keys = [sample.key for sample in samples.values()]
    return Scan(shard, np.array(rows, index.RECORD), keys, flaws, files, tar.end, tar.cut)


def plain(key: str) -> str:
    """A key without the ./ that `tar -C folder .` puts before it: with and without, it is one sample."""
    while key.startswith("./"):
        key = key[2:].lstrip("/")
    return key


class _Sample:
    def __init__(self, key: str):
        self.key = key
        self.members: dict[str, _Member] = {}  # by extension
        self.label: str | None = None
        """The extension of the member that has it."""

    @property
    def image(self) -> str | None:
        return next((extension for extension in EXTENSIONS if extension in self.members), None)

    def whole(self, rules: Rules) -> bool:
        return bool(self.image) and (not rules.labelled or any(extension in self.members for extension in rules.labels))


class _Tar:
    """The members of all the tars that lie in one file, and how it ends."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._length = os.fstat(file.fileno()).st_size
        self.end = 0
        self.cut: str | None = None
        self.behind = 0  # bytes that are no tar

    def members(self) -> Iterator[_Member]:
        """Every whole member but folders; then `end`, `cut` and `behind` are known."""
        start = 0
        while True:
            for member in self._part(start):
                self.end = member.end
                if member.name or not member.regular:
                    yield member
            if os.pread(self._file.fileno(), _BLOCK, self.end) != bytes(_BLOCK):
                if start and self.end == start:  # nothing of it is a tar
                    self.end, self.behind = start, self._length - start
                elif self.end or not self._length:
                    self.cut = "tar ends early"
                else:
                    self.cut = "not an uncompressed tar"
                return
            start = self._after_zeros(self.end)
            if start is None:
                return
            self.end = start

    def _part(self, start: int) -> Iterator[_Member]:
        """Members of the tar that begins at `start`; stops where it ends or breaks off. Folders have no name."""
        self._file.seek(start)
        try:
            with tarfile.open(fileobj=self._file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while member := tar.next():
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep every header
                    if member.size < 0 or member.offset_data + member.size > self._length:
                        return
                    link = None
                    if member.issym():
                        link = posixpath.join(posixpath.dirname(member.name), member.linkname)
                    elif member.islnk():
                        link = member.linkname
                    regular = link is not None or (member.isreg() and not member.issparse())
                    name = "" if member.isdir() else member.name
                    yield _Member(name, member.offset_data, member.size, tar.offset, link, regular or member.isdir())
        except (tarfile.TarError, UnicodeError, ValueError, OverflowError):
            return

    def _after_zeros(self, at: int) -> int | None:
        """The block of the first byte from `at` on that is not zero; None if there is none."""
        while chunk := os.pread(self._file.fileno(), _CHUNK, at):
            if rest := chunk.lstrip(b"\0"):
                return (at + len(chunk) - len(rest)) // _BLOCK * _BLOCK
            at += len(chunk)
        return None


def _why_not(member: _Member) -> str | None:
    """Why a member is no part of a sample; None if its name makes it one."""
    if not member.regular:
        return "not a regular file"
    name = plain(member.name)
    if re.match(r"__[^/]*__($|/)", name):
        return "WebDataset's own, as __meta__/ is"
    if posixpath.basename(name).startswith("."):
        return "hidden"
    if "." not in posixpath.basename(name):
        return "without a dot in the name"
    return None if index.split_name(member.name) else "without a key in the name"


def _follow_links(file: BinaryIO, samples: dict[str, _Sample], ledger: Ledger) -> None:
    """Put in each link's place what it leads to; those that lead out of the tar are left out."""
    if not any(member.link is not None for sample in samples.values() for member in sample.members.values()):
        return
    places = {_inside(member.name): member for member in _Tar(file).members() if member.regular}
    for key, sample in list(samples.items()):
        for extension, member in list(sample.members.items()):
            target: _Member | None = member
            for _ in range(_MAX_LINKS):
                if target is None or target.link is None:
                    break
                target = places.get(_inside(target.link))
            if target is None or target.link is not None:
                ledger.leave(member.name, "a link that leads out of the tar")
                del sample.members[extension]
            else:
                sample.members[extension] = target
        if not sample.members:
            del samples[key]


def _inside(name: str) -> str:
    return posixpath.normpath(name) if not name.startswith("/") else name


def _account(sample: _Sample, ledger: Ledger, labelled: bool) -> int:
    """Tell the ledger of a sample's members; how many of them are the sample's files."""
    used = [sample.image, sample.label] if labelled else [sample.image]
    used = [extension for extension in used if extension] if all(used) else list(sample.members)
    for extension, member in sample.members.items():
        if extension not in used:
            ledger.leave(member.name, f"beside an image{' and its label' * labelled}", kind=extension)
    ledger.use(len(used))
    return len(used)


def _row(descriptor: int, sample: _Sample, rules: Rules) -> tuple[int, int, int, Flaw | None]:
    """Offset, size, label, and why it cannot be used; the first member's offset if none is an image."""
    members = sample.members
    found = f"members {', '.join(members)}"
    if sample.image is None:
        dotted = [extension for extension in members if extension.rpartition(".")[2] in EXTENSIONS]
        flaw = Flaw("no image", short(found))
        if dotted:
            many = f", and so on for {len(dotted)} images under one key" if dotted[1:] else ""
            flaw = Flaw(f"a dot in the name: its extension is {short(dotted[0])}{many}")
        return next(iter(members.values())).offset, 0, -1, flaw
    image = members[sample.image]
    if image.size > _MAX_IMAGE_BYTES:
        return image.offset, 0, -1, Flaw(f"over {_MAX_IMAGE_BYTES} bytes")
    if not rules.labelled:
        return image.offset, image.size, 0, None
    flaws = []
    for extension in (extension for extension in rules.labels if extension in members):
        sample.label = sample.label or extension  # the likeliest, should none of them do
        _, offset, size, *_ = members[extension]
        if size > MAX_LABEL_BYTES:
            label = Flaw("no label", f"{size:,} bytes of {extension}")
        else:
            label = rules.label(extension, os.pread(descriptor, size, offset))
        if not isinstance(label, Flaw):
            sample.label = extension
            return image.offset, image.size, label, None
        flaws.append(label)
    return image.offset, image.size, -1, flaws[0] if flaws else Flaw("no label", short(found))


def fix(cause: str) -> str:
    """What to do about a flaw that most samples have."""
    fixes = {
        "label is": "write labels as whole numbers, or list the names by --class-order FILE",
        "no label": "put a NAME.cls with a number, or a NAME.json with a label, beside each image, or see --label-key",
        "a dot in": "rename the files, for a key ends at its first dot",
        "label ou": "give the number of classes by --classes, from 1 above the highest label",
        "not an u": "unpack it",
    }
    return fixes.get(cause[:8], "check the source")


def duplicate_key(key: str, first: str, second: str) -> UserError:
    return UserError(
        f"duplicate key {key!r}",
        found=f"it in {first} and in {second}",
        fix="give every sample a key of its own, as --key shard/name does where each shard has its own names",
    )
