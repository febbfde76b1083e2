"""What `prepare` takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.config.ranges import Count, Options, Range, Seed


@dataclass(frozen=True, kw_only=True)
class Prepare(Options):
    """Turn a source of images into WebDataset shards and an index; every image is decoded once."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """imagefolder:PATH, cifar10:PATH, cifar100:PATH, idx:PATH, webdataset:PATTERN, parquet:PATTERN, digits or
    synthetic:N. A pattern is a path, an s3://, https:// or hf://datasets/OWNER/NAME/PATH URL with {braces} and, but for
    https, wildcards; a folder means its *.tar or *.parquet, and @FILE a file with a pattern a line."""
    out: Path
    """Folder to create. digits, cifar and idx fill OUT/train and OUT/val."""
    classes: Annotated[int | None, Range(1, 2**31 - 1)] = None
    """Number of classes of a webdataset source, by default the largest label + 1; with --unlabelled the teacher's."""
    shard_size: Count = 4096
    """Samples per shard."""
    seed: Seed = 0
    """Seed of synthetic images and of the digits split."""
    class_order: str = "lexical"
    """What numbers class names: lexical, by code points, as torchvision does; natural, 2 before 10, as timm does; or a
    file with a name a line. For a webdataset source the file names the classes, and labels may be names."""
    unlabelled: bool = False
    """Take images alone, of an imagefolder: or webdataset: source that need not name classes: for students that learn
    from a teacher of CLASSES classes alone, with --alpha 0."""
    class_map: Path | None = None
    """File of `name: name` lines that class names are read through before they are numbered; it may join classes."""
    key: Literal["name", "shard/name", "shard/row"] = "name"
    """What a sample's key is: name, its own; shard/name, for tars or Parquet files that repeat names; shard/row, of a
    Parquet file, which is taken where it has no names."""
    label_key: str | None = None
    """Where a webdataset source's JSON has the label, with dots into objects, or which column of a Parquet file."""
    labels: Path | None = None
    """Labels of an imagefolder source without class folders, as ILSVRC2012_val has them: a file of `FILENAME LABEL`
    lines, or of a label a line in the order of the names."""
    max_pixels_per_byte: Annotated[float, Range(0, above=True)] = 1000.0
    """Largest number of pixels that an image of over 4 megapixels may claim for each of its bytes; the others, which
    take memory out of nothing, are quarantined."""
