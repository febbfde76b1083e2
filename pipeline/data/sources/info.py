"""`_info.json` beside tars, as timm writes it: the samples of each shard, and, where it says so, the classes."""

import os
from dataclasses import dataclass, field
from typing import Any

from cache.outside import parsed
from pipeline.data import hub
from pipeline.data.classes import Classes
from pipeline.data.remote import Unreadable, is_remote
from pipeline.data.shards import Reader

NAME = "_info.json"
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Info:
    classes: Classes | None = None
    """None where it does not say."""
    lengths: dict[str, int] = field(default_factory=dict)
    """File name -> samples."""

    def remarks(self, shards: list[str], samples: list[int]) -> list[str]:
        """A line if shards have other numbers of samples than it says."""
        pairs = ((os.path.basename(shard), count) for shard, count in zip(shards, samples, strict=True))
        wrong = [(name, count) for name, count in pairs if self.lengths.get(name, count) != count]
        if not wrong:
            return []
        name, count = wrong[0]
        more = f", and {len(wrong) - 1:,} more shards differ" if wrong[1:] else ""
        return [f"{NAME} says {self.lengths[name]:,} samples for {name}, which has {count:,}{more}"]


def beside(reader: Reader, shards: list[str]) -> Info:
    """What stands beside the first shard, in a folder or on the Hub; nothing where there is none, or none of timm's."""
    first = shards[0]
    if is_remote(first) and not first.startswith(hub.SCHEME):
        return Info()
    place = f"{os.path.dirname(first)}/{NAME}"
    if not is_remote(first) and not os.path.isfile(place):
        return Info()
    try:
        content = parsed(reader.read(place, 0, min(reader.length(place), _MAX_BYTES)))
    except Unreadable as error:
        if "404" not in error.cause:  # else classes would hang on the weather
            raise
        return Info()
    except ValueError:
        return Info()
    if not isinstance(content, dict):
        return Info()
    splits = content.get("splits")
    lengths = {}
    for split in splits.values() if isinstance(splits, dict) else (content,):
        if isinstance(split, dict):
            names, counts = split.get("filenames"), split.get("shard_lengths")
            if isinstance(names, list) and isinstance(counts, list):
                lengths |= {n: c for n, c in zip(names, counts, strict=False) if type(n) is str and type(c) is int}
    return Info(_classes(content), lengths)


def _classes(content: dict[str, Any]) -> Classes | None:
    names, count = content.get("class_names"), content.get("num_classes")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return Classes(len(names), tuple(names), "source")
    return Classes(count) if type(count) is int and 1 <= count < 2**31 else None
