"""What every source yields, and what it may be asked."""

import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cache.errors import UserError
from pipeline.data.classes import Classes
from pipeline.data.ledger import Ledger

EXTENSIONS = ("jpg", "jpeg", "png", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "avif")
"""Of images. The first one that a sample of a tar has is its image."""


class Sample(NamedTuple):
    key: str
    """WebDataset key: no dot after the last slash."""
    extension: str
    """One of EXTENSIONS."""
    image: bytes
    label: int | None
    """None where there is none, which the sample is then quarantined for."""


class Source(NamedTuple):
    samples: Iterator[Sample]
    count: int
    classes: Classes
    files: int
    """Files that each sample is: 1 in a folder of images, 0 where a sample is but a part of one."""


@dataclass(frozen=True)
class Options:
    """What a source may be asked, beside where it lies."""

    seed: int = 0
    threads: int = 1
    classes: int | None = None
    """Number of classes, where a source leaves it open."""
    order: str = "lexical"
    """What numbers class names: see `pipeline.data.classes.numbered`."""
    unlabelled: bool = False
    """Take no notice of labels: there are `classes`, and nobody knows of which a sample is."""
    names: dict[str, str] | None = None
    """Map of class names, as `pipeline.data.classes.read_map` gives it."""
    key: str = "name"
    """What a sample's key is: name, shard/name or shard/row."""
    label_key: str | None = None
    """Where a JSON, or which column, has the label."""
    labels: Path | None = None
    """List of the labels of a folder without class folders."""


def key_of(name: str) -> str:
    """A file's name as a key: dots, percent signs and line breaks are percent-escaped, for WebDataset cuts at them."""
    return name.replace("%", "%25").replace(".", "%2E").replace("\n", "%0A")


def whole(value: object) -> int | None:
    """The whole number of under ten digits that a value or its text is (3, 3.0, "+3"); None for any other."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,9}([.]0*)?", value.strip(), re.ASCII):
        return int(value.strip().partition(".")[0])
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31 and value == int(value):
        return int(value)
    return None


def read(path: str) -> bytes:
    """The content of a regular file; UserError for anything else, be it a FIFO that would never end."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"cannot read {path}", found="no regular file", fix="check the file")
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}", found=error.strerror, fix="check the file") from None


def encoded(image: Image.Image, format: str, **options) -> bytes:
    """An image as a file of Pillow's `format`."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def account(found: list[str], used: list[str], ledger: Ledger) -> None:
    """Tell the ledger of the files of a data set that comes in a few, and of what lies beside them."""
    for name in found:
        ledger.meet()
        if name in used:
            ledger.use()
        else:
            ledger.leave(name, "no part of the data set")
