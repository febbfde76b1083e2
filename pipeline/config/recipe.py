"""Recipes: options as YAML."""

import dataclasses
from pathlib import Path
from typing import get_args

import tyro
import yaml

from cache.errors import UserError, did_you_mean


def recipe_flags(path: Path, command: str, schema: type, commands: tuple[str, ...]) -> list[str]:
    """A recipe's options for `command` as flags, to stand before the user's own.

    A recipe is a mapping of option to value. A key that is a command's name holds that command's options, so that one
    recipe can describe a whole job. Raises UserError for an unknown key.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read recipe {path}", found=error.strerror, fix="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot parse recipe {path}", found=" ".join(str(error).split()), expected="YAML") from None
    options = {key: value for key, value in _mapping(recipe, path).items() if key not in commands}
    options |= _mapping(recipe.get(command, {}), path)
    known = [field.name for field in dataclasses.fields(schema) if tyro.conf.Positional not in get_args(field.type)]
    flags = []
    for key, value in options.items():
        if key == "policy" and isinstance(value, str) and (path.parent / value).is_file():
            value = path.parent / value  # a file beside the recipe, wherever it is read from
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"unknown recipe key {key} in {path}", fix=did_you_mean(name, known))
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _mapping(value: object, path: Path) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"recipe {path}", found=type(value).__name__, expected="a mapping of option to value")
    return value
