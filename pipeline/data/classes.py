"""Class lists: names, the rule that numbered them, their comparison, and maps from one set of names to another.

A data set, weights that training writes and a store of labels each carry the record of one `Classes`. Whoever meets
two of them calls `require_same`; nothing else compares class lists. Names are compared in Unicode's NFC, since one
file system spells é as one code point and another as two.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from cache import outside
from cache.errors import UserError, did_you_mean

RULES = ("lexical", "natural")
UNLABELLED = "none"
_RECORD = {
    "count": (outside.whole, 1, 2**31 - 1),
    "names": (outside.nullable, outside.strings),
    "rule": (outside.nullable, outside.kind, str),
}
_SHOWN = 6
_MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Classes:
    count: int
    """C."""
    names: tuple[str, ...] | None = None
    """By number; None where classes are mere numbers."""
    rule: str | None = None
    """What numbered the names: lexical, by code points, as torchvision does; natural, 2 before 10, as timm does; file,
    a list that the user gave; source, what the data set itself says; none, samples have no labels, and are entered
    under 0. None: unknown."""

    def __post_init__(self):
        assert self.names is None or len(self.names) == self.count, (self.names, self.count)

    @property
    def unlabelled(self) -> bool:
        """Does nobody know of which class a sample is?"""
        return self.rule == UNLABELLED

    def name(self, label: int) -> str:
        """For people: the name of a class, or its number."""
        return self.names[label] if self.names else f"class {label}"

    def to_json(self) -> dict:
        """The record, JSON-safe; `from_json` gives an equal object."""
        return {"count": self.count, "names": None if self.names is None else list(self.names), "rule": self.rule}

    @classmethod
    def from_json(cls, record: object, where: str = "class record") -> "Classes":
        """The classes of a record, or of its JSON text, of any origin. Raises UserError naming `where` it stood."""
        what, fix = f"unusable classes in {where}", "make the file again"
        if isinstance(record, str | bytes):
            try:
                record = outside.parsed(record)
            except ValueError as error:
                raise UserError(what, found=error, expected="JSON", fix=fix) from None
        found = outside.record(record, what, fix, _RECORD)
        count, names = found["count"], None if found["names"] is None else tuple(found["names"])
        if names is not None and len(names) != count:
            raise UserError(f"{what}: names", found=len(names), expected=count, fix=fix)
        return cls(count, names, found["rule"])

    def require_same(self, other: "Classes", here: str, there: str) -> None:
        """Raise UserError with the first difference, unless both list the same classes in the same order.

        `here` names the place of this list, `there` that of `other`, as in "--data" and "--val". Lists without names
        are compared by their counts.
        """
        if self.names is None or other.names is None:
            if self.count != other.count:
                found = f"{other.count} classes"
                fix = f"give {there} for the same classes"
                raise UserError(f"{there} has other classes than {here}", found=found, expected=self.count, fix=fix)
            return
        ours, theirs = list(map(nfc, self.names)), list(map(nfc, other.names))
        if ours == theirs:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(self.count, other.count)
        )
        counts = "" if self.count == other.count else f" of {other.count} classes"
        raise UserError(
            f"{there} has other classes than {here}",
            found=f"{_shown(other.names, at)} as class {at}{counts}",
            expected=_shown(self.names, at),
            fix=_way_round(ours, theirs),
        )

    def renamed(self, names: dict[str, str]) -> "Classes":
        """With the names that a map (see `read_map`) gives; the numbers stay. Raises UserError for two equal names."""
        if self.names is None:
            return self
        mapped = tuple(names.get(nfc(name), name) for name in self.names)
        if twin := _twin(mapped):
            raise UserError(
                "--class-map gives two classes one name", found=repr(twin), fix="prepare the data set with it"
            )
        return Classes(self.count, mapped, self.rule)

    def numbers_in(self, other: "Classes", here: str, there: str) -> np.ndarray:
        """i32 (C,): the number that each of these classes has in `other`, by name; UserError where one is missing."""
        if self.names is None or other.names is None or sorted(map(nfc, self.names)) != sorted(map(nfc, other.names)):
            other.require_same(self, there, here)
            return np.arange(self.count, dtype=np.int32)
        places = {nfc(name): number for number, name in enumerate(other.names)}
        return np.array([places[nfc(name)] for name in self.names], np.int32)


def outputs(classes: Classes, teacher: Classes, names: dict[str, str]) -> np.ndarray:
    """i64 (C,): the output of a teacher of other classes that stands for each of `classes`.

    A class goes by its name, else its number, read through the map `names`, to a name of the teacher's, else to the
    number of an output. Raises UserError for a class that leads nowhere, and for two that lead to one output.
    """
    places = {nfc(name): number for number, name in enumerate(teacher.names or ())}
    found: dict[int, str] = {}
    for name in classes.names or map(str, range(classes.count)):
        wanted = names.get(nfc(name), name)
        number = places.get(nfc(wanted), int(wanted) if re.fullmatch("[0-9]{1,9}", wanted) else -1)
        if not 0 <= number < teacher.count:
            what = "a name of the teacher's" if places else f"the number of one of its {teacher.count} outputs"
            raise UserError(
                f"class {name!r} leads to no output of the teacher",
                found=repr(wanted),
                expected=what,
                fix=f"write {name}: OUTPUT into the file of --class-map",
            )
        if number in found:
            fix = "prepare the data set with a --class-map that joins them"
            raise UserError("two classes lead to one output", found=f"{found[number]!r} and {name!r}", fix=fix)
        found[number] = name
    return np.array(list(found), np.int64)


def nfc(name: str) -> str:
    """The form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def natural(name: str) -> tuple:
    """A key that sorts 2 before 10, whatever the case, as timm's `natural_key` does; the name itself decides ties."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)], name


def numbered(names: Iterable[str], order: str = "lexical") -> Classes:
    """Number the names by `order`: lexical, natural, or a file with a name a line, which may list more than `names`.

    Raises UserError for names that differ only in their Unicode form, and for one that the file lacks.
    """
    names = sorted(names)
    if twin := _twin(names):
        raise UserError("two classes have one name", found=repr(twin), fix="rename one, or join them by --class-map")
    if order == "lexical":
        return Classes(len(names), tuple(names), order)
    if order == "natural":
        return Classes(len(names), tuple(sorted(names, key=natural)), order)
    listed = read_list(order)
    known = {nfc(name) for name in listed.names or ()}
    if missing := [name for name in names if nfc(name) not in known]:
        raise UserError(
            f"--class-order {order} lacks a class",
            found=f"{missing[0]!r} in the source" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            expected="every class of the source",
            fix=did_you_mean(missing[0], known) if len(known) < 1000 else "add it",
        )
    return listed


def differ(names: Sequence[str]) -> bool:
    """Would lexical and natural order number these names differently?"""
    return sorted(names) != sorted(names, key=natural)


def remarks(classes: Classes, labels: np.ndarray) -> list[str]:
    """What a user should know of classes whose good samples have these labels."""
    if classes.unlabelled:
        return ["samples have no labels: students learn from the teacher alone, with --alpha 0"]
    found = []
    present = np.unique(labels)
    if missing := classes.count - len(present):
        absent = [label for label in range(min(classes.count, len(present) + _SHOWN)) if label not in set(present)]
        absent = [classes.name(label) if classes.names else str(label) for label in absent[:_SHOWN]]
        more = ", …" if missing > len(absent) else ""
        found.append(f"{missing:,} of {classes.count:,} classes have no sample: {', '.join(absent)}{more}")
        if classes.names is None and present[0] > 0 and classes.count - 1 == present[-1]:
            found[-1] += "; no sample has label 0, as in lists that count from 1: then shift the labels"
    if len(present) == 1:
        found.append("all samples are of one class, so every answer is right and nothing is learned")
    if classes.names and classes.rule in RULES and differ(classes.names):
        orders = {"lexical": sorted(classes.names), "natural": sorted(classes.names, key=natural)}
        shown = {rule: ", ".join(names[:_SHOWN]) for rule, names in orders.items()}
        found.append(
            f"classes are numbered in {classes.rule} order; lexical, as torchvision has it: {shown['lexical']}; "
            f"natural, as timm has it: {shown['natural']} (--class-order)"
        )
    return [printable(text) for text in found]


def printable(text: str) -> str:
    """A text that any terminal takes: file names may hold bytes that are no characters."""
    return text if text.isprintable() else repr(text)[1:-1]


def read_list(path: str | Path) -> Classes:
    """The classes that a text file (UTF-8) names, one a line. Raises UserError for none, an empty one, or a twin."""
    names = _read(path, "--class-order", " or ".join(RULES)).rstrip("\n").split("\n")
    if not all(names):
        raise UserError(f"--class-order {path} has an empty line", found=f"line {names.index('') + 1}", fix="remove it")
    if twin := _twin(names):
        raise UserError(f"--class-order {path} names a class twice", found=repr(twin), fix="remove one")
    return Classes(len(names), tuple(names), "file")


def read_map(path: str | Path) -> dict[str, str]:
    """Name in NFC -> other name, of a YAML or JSON mapping (`ant: red`). Every name is a text, 1 and no as well."""
    try:
        node = yaml.compose(_read(path, "--class-map"), yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _bad_map(path, " ".join(str(error).split())) from None
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(node, node)]
    names: dict[str, str] = {}
    for key, value in pairs:
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode) or node is key:
            raise _bad_map(path, "something else")
        if nfc(key.value) in names:
            raise _bad_map(path, f"{key.value!r} twice")
        names[nfc(key.value)] = value.value
    return names


def _read(path: str | Path, option: str, otherwise: str = "") -> str:
    fix = f"give {otherwise}, or check the path" if otherwise else "check the path"
    data = outside.content(Path(path), f"{option} {path}", fix, _MAX_FILE_BYTES)
    try:
        return re.sub("\r\n?", "\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"cannot read {option} {path}", expected="text in UTF-8", fix="save it so") from None


def _bad_map(path: str | Path, found: str) -> UserError:
    fix = "write `name: name` a line, each name once"
    return UserError(
        f"unusable --class-map {path}", found=f"{found:.200}", expected="a mapping of name to name", fix=fix
    )


def _twin(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if nfc(name) in seen:
            return name
        seen.add(nfc(name))
    return None


def _shown(names: Sequence[str], at: int) -> str:
    return repr(names[at]) if at < len(names) else "none"


def _way_round(ours: list[str], theirs: list[str]) -> str:
    if sorted(ours) == sorted(theirs):
        return "prepare both with one --class-order, or pass --class-map FILE to go by names"
    return "check the paths; if other names mean the same classes, pass --class-map FILE"
