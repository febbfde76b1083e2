"""What of a sample's members is its label, and what its key is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from cache.errors import UserError
from cache.outside import parsed
from pipeline.data import classes as class_lists
from pipeline.data.classes import UNLABELLED, Classes, nfc
from pipeline.data.ledger import Flaw
from pipeline.data.shards import stem
from pipeline.data.sources.base import Options, whole

MAX_LABEL_BYTES = 1 << 20
_SHOWN = 40

Numbers = Callable[[str], int | None]
"""Class name -> its number."""


@dataclass(frozen=True)
class Rules:
    numbers: Numbers | None = None
    """Of class names in labels; None where there are none."""
    label_key: str | None = None
    """Where in a JSON the label is; dots lead into objects."""
    key: str = "name"
    """`name`, the sample's own, or `shard/name`."""
    labelled: bool = True
    """Else a sample is an image, of label 0, and what stands beside it is left out."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The extensions of members that may hold the label, the likeliest first."""
        if not self.labelled:
            return ()
        if self.label_key:
            return ("json",)
        # A text is a caption, unless it names a class.
        return ("cls", "json", "txt") if self.numbers else ("cls", "json")

    def keyed(self, key: str, shard: str) -> str:
        """The key of a sample whose own key is `key`."""
        return f"{stem(shard)}/{key}" if self.key == "shard/name" else key

    def label(self, extension: str, text: bytes) -> int | Flaw:
        """The label in a member, or why there is none."""
        value: object
        try:
            value = parsed(text) if extension == "json" else text.decode("utf-8-sig").strip()
        except ValueError:
            return Flaw("label is not a whole number", f"bytes that are no {'JSON' if extension == 'json' else 'text'}")
        if self.label_key:
            value = _at(value, self.label_key)
            if value is None:
                return Flaw(f"no {self.label_key} in the JSON", short(_keys(parsed(text))))
        elif isinstance(value, dict):
            names = [name for name in ("label", "cls") if name in value]
            if not names:
                return Flaw("no label in the JSON", short(_keys(value)))
            value = value[names[0]]
        number = whole(value)
        if number is None and self.numbers and isinstance(value, str):
            number = self.numbers(nfc(value))
        return Flaw("label is not a whole number", short(repr(value))) if number is None else number


def of(options: Options, listed: Classes | None) -> Rules:
    """The rules that the options ask for, of data whose classes are `listed`."""
    return Rules(numbering(listed, options.names), options.label_key, options.key, not options.unlabelled)


def listed(options: Options) -> Classes | None:
    """The classes of tars, where the user names or counts them."""
    if options.order == "natural":
        fix = "give a file that names them, or drop --class-order"
        raise UserError("the classes of tars are numbered already", found="--class-order natural", fix=fix)
    if options.unlabelled:
        return Classes(options.classes or 1, None, UNLABELLED)
    found = None if options.order == "lexical" else class_lists.read_list(options.order)
    if found and options.classes not in (None, found.count):
        raise UserError("--classes and --class-order disagree", found=options.classes, expected=found.count)
    return found or (Classes(options.classes) if options.classes else None)


def numbering(listed: Classes | None, names: dict[str, str] | None) -> Numbers | None:
    """Class name in a label -> number, by the user's map of names and list of classes; None if there is neither."""
    places = {nfc(name): number for number, name in enumerate((listed and listed.names) or ())}
    if not places and not names:
        return None

    def number(name: str) -> int | None:
        mapped = (names or {}).get(nfc(name), name)
        found = places.get(nfc(mapped))
        return whole(mapped) if found is None else found

    return number


def own_classes(source: str, classes: Classes, options: Options) -> None:
    """Raise UserError for options that ask for other classes than a source has."""
    if options.classes not in (None, classes.count):
        found, expected, flag = f"--classes {options.classes}", classes.count, "--classes"
    elif classes.rule in (None, "source") and options.order != "lexical":
        found, expected, flag = f"--class-order {options.order}", "its own", "--class-order"
    else:
        return
    raise UserError(f"{source} has classes of its own", found=found, expected=expected, fix=f"drop {flag}")


def unused(kind: str, options: Options) -> None:
    """Raise UserError for options that mean nothing to a kind of source."""
    keys = {"webdataset": ("name", "shard/name"), "parquet": ("name", "shard/name", "shard/row")}.get(kind, ("name",))
    if options.key not in keys:
        fix = "drop --key" if keys == ("name",) else "choose one of these"
        raise UserError(f"--key {options.key} means nothing to {kind}", expected=" or ".join(keys), fix=fix)
    for flag, value, kinds in (
        ("--label-key", options.label_key, ("webdataset", "parquet")),
        ("--labels", options.labels, ("imagefolder",)),
    ):
        if value and kind not in kinds:
            raise UserError(f"{flag} means nothing to {kind}", expected=" or ".join(kinds), fix=f"drop {flag}")
    if options.unlabelled:
        _unused_without_labels(kind, options)


def _unused_without_labels(kind: str, options: Options) -> None:
    if kind not in ("imagefolder", "webdataset"):
        raise UserError(f"--unlabelled means nothing to {kind}", expected="imagefolder or webdataset", fix="drop it")
    for flag, given in (
        ("--class-order", options.order != "lexical"),
        ("--class-map", options.names is not None),
        ("--label-key", options.label_key),
        ("--labels", options.labels),
    ):
        if given:
            raise UserError(f"--unlabelled and {flag}", found="both", expected="one", fix=f"drop {flag}")
    if options.classes is None:
        fix = "give the teacher's number of classes, 1000 of ImageNet-1k"
        raise UserError("--unlabelled without --classes", expected="--classes N", fix=fix)


def short(text: str) -> str:
    """The beginning of a text, printable."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}…"


def _at(value: Any, path: str) -> object:
    """What stands in an object under a key, or, where that is none, under a path of keys with dots; None: nothing."""

    def below(value: Any, keys: Iterable[str]) -> object:
        return reduce(lambda inner, key: inner.get(key) if isinstance(inner, dict) else None, keys, value)

    found = below(value, [path])
    return below(value, path.split(".")) if found is None else found


def _keys(value: object) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    return f"keys {', '.join(sorted(value))}" if value else "no keys"
