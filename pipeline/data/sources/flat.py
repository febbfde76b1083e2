"""Folders of images without class folders, as ILSVRC2012_val has them, with a list of labels.

The list is of `FILENAME LABEL` lines, separated by blanks, a tab or a comma (what follows is left alone, as in Kaggle's
LOC_val_solution.csv), or of a label a line, for the files in the order of their names (as in the devkit's
ILSVRC2012_validation_ground_truth.txt). A label is a class name or a number. The devkit's numbers count from 1 in an
order of their own, which `--class-order FILE` names.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cache.errors import UserError
from pipeline.data import classes as class_lists
from pipeline.data.classes import Classes, nfc, numbered
from pipeline.data.ledger import Ledger, kind_of
from pipeline.data.sources.base import EXTENSIONS, Options, Sample, Source, key_of, read, whole

_OUTSIDE = "outside class folders"


def refuse(path: str, ledger: Ledger) -> None:
    """Raise UserError where a folder without class folders has images in it."""
    images = [name for name in os.listdir(path) if kind_of(name) in EXTENSIONS]
    if images and ledger.left_out[_OUTSIDE] >= len(images):
        raise UserError(
            f"no images in class folders of {path}",
            found=f"{len(images):,} images in it, such as {min(images)}; a flat folder, as ILSVRC2012_val is",
            expected="ROOT/class/name, or a list of labels",
            fix="give the list by --labels FILE",
        )


def flat(path: str, labels: Path, options: Options, ledger: Ledger) -> dict[str, Source]:
    """The images of one folder, in an order shuffled by `options.seed`; keys are their names without extension.

    UserError for a list that does not name each image once, in either form.
    """
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {path}", found=error.strerror, fix="give the folder of the images") from None
    files = []
    for entry in entries:
        if entry.is_dir():
            continue
        ledger.meet()
        if kind_of(entry.name) in EXTENSIONS and not entry.name.startswith("."):
            ledger.use()
            files.append(entry.name)
        else:
            ledger.leave(entry.name, "not an image by its extension")
    if not files:
        raise UserError(f"no images in {path}", expected="images beside each other", fix="check the path")
    said = _said(labels, files)
    classes, numbers = _numbered(labels, [said[name] for name in files], options)
    return {"": Source(_samples(path, files, numbers, options.seed), len(files), classes, files=1)}


def _samples(path: str, files: list[str], numbers: list[int], seed: int) -> Iterator[Sample]:
    for i in np.random.default_rng(seed).permutation(len(files)):
        name, extension = os.path.splitext(files[i])
        yield Sample(key_of(name), extension[1:].lower(), read(os.path.join(path, files[i])), numbers[i])


def _said(labels: Path, files: list[str]) -> dict[str, str]:
    """File name -> what the list says."""
    try:
        lines = [line for line in labels.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --labels {labels}", found=error, fix="check it") from None
    pairs = [re.split(r"[,\s]+", line.strip()) for line in lines]
    known = {os.path.splitext(file)[0]: file for file in files} | {file: file for file in files}
    named = [pair for pair in pairs if os.path.basename(pair[0]) in known and len(pair) > 1]
    if not named:
        if len(lines) != len(files):
            found = f"{len(lines):,} lines, the first {lines[0].strip()!r:.60}" if lines else "nothing"
            expected = f"{len(files):,} labels, one for each image, or lines of FILENAME LABEL"
            raise UserError(f"--labels {labels} does not fit", found=found, expected=expected, fix="check both")
        return dict(zip(files, map(str.strip, lines), strict=True))
    said: dict[str, str] = {}
    for pair in named:
        file = known[os.path.basename(pair[0])]
        if said.setdefault(file, pair[1]) != pair[1]:
            raise UserError(
                f"--labels {labels} gives {file} two labels", found=f"{said[file]} and {pair[1]}", fix="keep one"
            )
    if missing := [file for file in files if file not in said]:
        more = f" and {len(missing) - 1:,} more" if missing[1:] else ""
        raise UserError(f"--labels {labels} lacks an image", found=missing[0] + more, fix="add them, or move them away")
    return said


def _numbered(labels: Path, said: list[str], options: Options) -> tuple[Classes, list[int]]:
    mapped = [(options.names or {}).get(nfc(label), label) for label in said]
    numbers = [whole(label) for label in mapped]
    given = None if options.order in class_lists.RULES else class_lists.read_list(options.order)
    if any(number is None for number in numbers):
        classes = numbered(set(mapped), options.order)
        places = {nfc(name): number for number, name in enumerate(classes.names or ())}
        return classes, [places[nfc(label)] for label in mapped]
    found = [number for number in numbers if number is not None]
    count = options.classes or (given.count if given else max(found) + 1)
    if min(found) == 1 and max(found) == (count if given or options.classes else len(set(found))):
        if given is None:
            raise UserError(
                f"the labels of {labels} count from 1",
                found=f"{min(found)} to {max(found)}, as the devkit of ILSVRC has them in an order of its own",
                expected="numbers from 0, or names",
                fix="name the classes in that order by --class-order FILE, here and for the training images",
            )
        found = [number - 1 for number in found]
    if min(found) < 0 or max(found) >= count:
        found_range = f"{min(found)} to {max(found)}"
        raise UserError(
            f"labels of {labels} out of range", found=found_range, expected=f"0 to {count - 1}", fix="check it"
        )
    return given or Classes(count), found
