"""Data from outside: files of any content, and checks of what is in them.

A check is called with a value, where it stands, what would mend it, and its own bounds. It returns the value, or raises
UserError of one line, which shows the beginning of what was found. Booleans are no numbers; NaN and infinities neither.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from cache.errors import UserError, did_you_mean

Fields = Mapping[str, tuple]
"""The check of each key of a mapping, followed by its bounds."""
_SHOWN = 80
_WORDS = re.compile("[a-z_][a-z_ ]{3,}")  # which neither nan nor inf is


def content(path: Path, what: str, fix: str, most: int) -> bytes:
    """A file's bytes. Raises UserError, calling the file `what`, if there are more than `most` or it cannot be read."""
    data = bytearray()
    try:
        with path.open("rb") as file:
            while len(data) <= most and (part := file.read(1 << 20)):  # at once would take memory for `most`
                data += part
    except (OSError, ValueError) as error:  # a name with a null byte
        raise UserError(f"cannot read {what}", found=getattr(error, "strerror", error), fix=fix) from None
    if len(data) > most:
        raise UserError(f"{what} is too large", found=f"more than {most:,} bytes", fix=fix)
    return bytes(data)


def document(path: Path, what: str, fix: str, most: int) -> Any:
    """What a JSON file says; errors as those of `content`."""
    data = content(path, what, fix, most)
    try:
        return parsed(data)
    except ValueError as error:
        raise UserError(f"cannot parse {what}", found=error, expected="JSON", fix=fix) from None


def parsed(data: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError, also for what is nested too deeply and for numbers of many digits."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def shown(value: object) -> str:
    """The beginning of a value of any content: words as they are, all other texts in quotes."""
    if isinstance(value, int) and (bits := value.bit_length()) > 32:
        return f"a number of {bits:,} bits" + (f" ({value})" if bits <= 64 else "")
    try:
        return cut(value if isinstance(value, str) and _WORDS.fullmatch(value) else repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits somewhere in it
        return f"a {type(value).__name__}"


def cut(text: str) -> str:
    """A text that may be millions of characters long, or its beginning."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}… ({len(text)} characters)"


def require(good: bool, value: Any, where: str, fix: str | None, expected: str) -> Any:
    """The value, if it is good; what all other checks end in."""
    if not good:
        raise UserError(where, found=shown(value), expected=expected, fix=fix)
    return value


def anything(value: object, where: str, fix: str | None) -> object:
    return value


def nullable(value: object, where: str, fix: str | None, check: Callable[..., Any], *bounds: Any) -> Any:
    return None if value is None else check(value, where, fix, *bounds)


def kind(value: Any, where: str, fix: str | None, of: type) -> Any:
    """A value of this very type, which bool is not int."""
    if type(value) is not of:
        raise UserError(f"{where} of type {type(value).__name__}", expected=of.__name__, fix=fix)
    return value


def whole(value: object, where: str, fix: str | None, low: int, high: int) -> int:
    good = type(value) is int and low <= value <= high
    return require(good, value, where, fix, f"a whole number in [{low}, {high}]")


def number(value: object, where: str, fix: str | None, low: float, high: float) -> float:
    return require(_within(value, low, high), value, where, fix, f"a number in [{low}, {high}]")


def numbers(value: object, where: str, fix: str | None, count: int, low: float, high: float) -> tuple[float, ...]:
    """A list of so many numbers, as floats."""
    good = isinstance(value, list) and len(value) == count and all(_within(each, low, high) for each in value)
    return tuple(map(float, require(good, value, where, fix, f"{count} number(s) in [{low}, {high}]")))


def text(value: object, where: str, fix: str | None, low: int, high: int, printable: bool = False) -> str:
    """A text of `low` to `high` characters."""
    good = isinstance(value, str) and low <= len(value) <= high and (value.isprintable() or not printable)
    return require(good, value, where, fix, f"a text of {low} to {high}{' printable' * printable} characters")


def strings(value: object, where: str, fix: str | None) -> list[str]:
    """A list of any texts."""
    good = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return require(good, value, f"{where}{'' if good else ' are not all strings'}", fix, "a list of strings")


def listed(value: object, where: str, fix: str | None) -> list:
    if not isinstance(value, list):
        raise UserError(where, found=type(value).__name__, expected="a list", fix=fix)
    return value


def mapping(value: object, where: str, fix: str | None, fields: Fields, needed: Collection[str] = ()) -> dict[str, Any]:
    """What people write: some of the fields, all that are needed, and no other key, in whose place one is suggested."""
    if not isinstance(value, dict):
        raise UserError(where, found=type(value).__name__, expected=f"a mapping with {', '.join(fields)}", fix=fix)
    for key in (name for name in map(_name, value) if name not in fields):
        raise UserError(f"{where}: unknown key {key}", expected=", ".join(fields), fix=did_you_mean(key, fields))
    for key in (name for name in needed if name not in value):
        raise UserError(f"{where}: missing key {key}", fix=f"add {key}")
    return _values(value, where, fix, fields)


def record(
    value: object, where: str, fix: str | None, fields: Fields, optional: Collection[str] = ()
) -> dict[str, Any]:
    """What programs write: all of the fields but those that are optional, and no other key."""
    names = set(map(_name, value)) if isinstance(value, dict) else set()
    unknown, missing = names - fields.keys(), fields.keys() - names - set(optional)
    if isinstance(value, dict) and not unknown | missing:
        return _values(value, where, fix, fields)
    told = {"keys": names, "unknown": unknown, "missing": missing}
    found = ", ".join(f"{what} {shown(sorted(those))}" for what, those in told.items() if those)
    found = found if isinstance(value, dict) else shown(value)
    raise UserError(where, found=found, expected=f"a mapping of {', '.join(fields)}", fix=fix)


def _values(value: dict, where: str, fix: str | None, fields: Fields) -> dict[str, Any]:
    checks = [(key, *fields[key]) for key in fields if key in value]
    return {key: check(value[key], f"{where}: {key}", fix, *bounds) for key, check, *bounds in checks}


def _name(key: object) -> str:
    return cut(key) if isinstance(key, str) else shown(key)


def _within(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN compares false
