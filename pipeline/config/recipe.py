"""Recipes: options as YAML."""

import dataclasses
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import tyro

from cache.errors import UserError, did_you_mean
from pipeline.config import yaml_file


def recipe_flags(path: Path, command: str, schema: type, commands: tuple[str, ...]) -> list[str]:
    """A recipe's options for `command` as flags, to stand before the user's own.

    A recipe is a mapping of option to value, spelt with dashes or underscores; an empty one has none. A key that is a
    command's name holds that command's options, so that one recipe can describe a whole job. Raises UserError, which
    names the key, for one that is unknown or given twice, and for a value of the wrong kind.
    """
    recipe = _mapping(yaml_file.read(path, "recipe"), path)
    shared = {key: value for key, value in recipe.items() if key not in commands}
    options = _named(shared, path) | _named(_mapping(recipe.get(command), path), path)
    known = [field.name for field in dataclasses.fields(schema) if tyro.conf.Positional not in get_args(field.type)]
    hints = get_type_hints(schema)
    flags = []
    for name, (key, value) in options.items():
        if name not in known:
            raise UserError(f"unknown recipe key {key} in {path}", fix=did_you_mean(name, known))
        if key == "policy" and isinstance(value, str) and (path.parent / value).is_file():
            value = path.parent / value  # a file beside the recipe, wherever it is read from
        flags += _flags(f"recipe {path}: {key}", name.replace("_", "-"), value, hints[name])
    return flags


def _flags(where: str, flag: str, value: object, hint: Any) -> list[str]:
    if hint is bool:
        if not isinstance(value, bool):
            raise UserError(where, found=f"{value!r:.40}", expected="true or false")
        return [f"--{flag}" if value else f"--no-{flag}"]
    many = get_origin(hint) is tuple
    values = value if many and isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool):
            fix = "put it in quotes, as YAML takes yes, no, on and off for true and false"
            raise UserError(where, found=str(each).lower(), expected="a value", fix=fix)
        if isinstance(each, (dict, list, set)) or (each is None and NoneType not in get_args(hint)):
            found = "nothing" if each is None else f"a {type(each).__name__}"
            raise UserError(where, found=found, expected="a value or a list of values" if many else "a value")
    return [f"--{flag}", *map(str, values)]


def _named(options: dict, path: Path) -> dict[str, tuple[object, object]]:
    """Name with underscores -> key as written, and value."""
    found: dict[str, tuple[object, object]] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise UserError(
                f"recipe {path} has a key twice", found=f"{found[name][0]} and {key}", fix="keep one of them"
            )
        found[name] = key, value
    return found


def _mapping(value: object, path: Path) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"recipe {path}", found=type(value).__name__, expected="a mapping of option to value")
    return value
