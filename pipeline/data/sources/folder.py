"""Folders of images, a class each: ROOT/class/**/name.jpg; without labels, images anywhere in a folder."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache.errors import UserError
from pipeline.data.classes import UNLABELLED, Classes, nfc, numbered
from pipeline.data.ledger import Ledger, kind_of
from pipeline.data.sources import flat
from pipeline.data.sources.base import EXTENSIONS, Options, Sample, Source, key_of, read

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
_RESOURCE_FORKS = "__MACOSX"  # what macOS packs beside the files, under their names


def folder(path: str, options: Options, ledger: Ledger) -> dict[str, Source]:
    """A class per folder of `path`, numbered by `options.order`; files in an order shuffled by `options.seed`.

    Links are followed, but no folder is read twice for one class. Hidden files, what is no image by its extension, and
    whatever is no regular file are left out, and the ledger says so. A key is the path without its extension; dots and
    percent signs of the file name are percent-escaped, and files that differ only in their extension keep it, so that
    every file has a key of its own.

    UserError for an unreadable folder, one without images, and the parent of train/ and val/.
    """
    if options.labels:
        return flat.flat(path, options.labels, options, ledger)
    try:
        names, files = _sorted_out(path, ledger, options.unlabelled)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}", found=error.strerror, fix="give a folder of folders") from None
    if not files:
        flat.refuse(path, ledger)
        there = ", ".join(f"{count:,} {reason}" for reason, count in ledger.left_out.most_common())
        raise UserError(
            f"no images in {path}",
            found=there or "no files",
            expected=f"ROOT/{'' if options.unlabelled else 'class/'}name with one of {', '.join(EXTENSIONS)}",
            fix="check the path",
        )
    if options.unlabelled:
        nobody = Classes(options.classes or 1, None, UNLABELLED)
        return {"": Source(_samples(path, files, [0] * len(files), options.seed), len(files), nobody, files=1)}
    if _are_splits(path, names, files):
        inner = next((name for name in names if name.lower().startswith("train")), names[0])
        raise UserError(
            f"the folders of {path} look like splits",
            found=", ".join(names),
            expected="a folder per class",
            fix=f"give {os.path.join(path, inner)}, and each other split by itself",
        )
    mapped = {name: (options.names or {}).get(nfc(name), name) for name in names}
    # Twins among the folders' own names are a mistake; a map may join classes on purpose.
    classes = numbered(set(mapped.values()) if options.names else names, options.order)
    numbers = {nfc(name): number for number, name in enumerate(classes.names or ())}
    labels = [numbers[nfc(mapped[file.name])] for file in files]
    return {"": Source(_samples(path, files, labels, options.seed), len(files), classes, files=1)}


class _File(NamedTuple):
    name: str
    """Of its class folder."""
    path: str


def _samples(root: str, files: list[_File], labels: list[int], seed: int) -> Iterator[Sample]:
    stems = Counter(os.path.splitext(file.path)[0] for file in files)
    for i in np.random.default_rng(seed).permutation(len(files)):
        path = files[i].path
        stem, extension = os.path.splitext(path)
        name = key_of(os.path.basename(stem if stems[stem] == 1 else path))
        key = os.path.normpath(os.path.join(os.path.relpath(os.path.dirname(path), root), name))
        # A line break would hide the member from WebDataset's rule for keys.
        yield Sample(key.replace("\n", "%0A"), extension[1:].lower(), read(path), labels[i])


def _sorted_out(root: str, ledger: Ledger, unlabelled: bool) -> tuple[list[str], list[_File]]:
    """The names of the class folders and their images, both sorted; all else is left out."""
    names, files = [], []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if _is_dir(entry) and not entry.name.startswith(".") and entry.name != _RESOURCE_FORKS:
            names.append(entry.name)
    for path, fate in _walk(root, ledger, unlabelled):
        if not fate:
            files.append(_File(os.path.relpath(path, root).split(os.sep)[0], path))
            ledger.use()
        else:
            ledger.leave(os.path.relpath(path, root), fate, kind=_kind(path))
    return names, sorted(files, key=lambda file: file.path)


def _walk(root: str, ledger: Ledger, unlabelled: bool) -> Iterator[tuple[str, str]]:
    """Every file under `root` with the reason for leaving it out, "" for an image. Met here and nowhere else."""
    absolute = os.path.realpath(root)
    above = {_identity(os.stat(folder)) for folder in (absolute, *map(str, Path(absolute).parents))}
    for top in sorted(os.scandir(root), key=lambda entry: entry.name):
        seen = set(above)  # no link leads out to a folder that holds all the classes
        todo, links = [(top, "")], []
        while todo or links:
            # Real folders first: a link to one that is read in its own place is the one left out.
            entry, reason = todo.pop() if todo else links.pop()
            if entry.name.startswith("."):
                reason = "hidden"
            elif entry.name == _RESOURCE_FORKS:
                reason = "of macOS, in __MACOSX"
            if _is_dir(entry):
                if (identity := _identity(entry.stat())) not in seen:
                    seen.add(identity)
                    for inner in os.scandir(entry.path):
                        (links if inner.is_symlink() else todo).append((inner, reason))
                    continue
                reason = reason or "a linked folder that is read already"
            ledger.meet()
            yield entry.path, reason or _fate(entry, outside=entry is top and not unlabelled)


def _fate(entry: os.DirEntry, outside: bool) -> str:
    """Why a file is left out, "" for an image of a class."""
    if not os.path.isfile(entry.path):  # which, unlike the entry's own, takes a link in a circle for none
        nowhere = entry.is_symlink() and not os.path.exists(entry.path)
        return "a link that leads nowhere" if nowhere else "not a regular file"
    if outside:
        return "outside class folders"
    return "" if kind_of(entry.name) in EXTENSIONS else "not an image by its extension"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _kind(path: str) -> str:
    """The extension of a regular file, and what else is there."""
    if os.path.isfile(path):
        return kind_of(path)
    mode = os.lstat(path).st_mode
    kinds = {stat.S_ISLNK: "link", stat.S_ISFIFO: "FIFO", stat.S_ISSOCK: "socket"}
    return next((kind for test, kind in kinds.items() if test(mode)), "device")


def _are_splits(root: str, names: list[str], files: list[_File]) -> bool:
    """Do all folders have names of splits, and folders of images inside?"""
    deep = all(os.path.dirname(file.path) != os.path.join(root, file.name) for file in files)
    return deep and all(name.lower() in _SPLITS for name in names)
