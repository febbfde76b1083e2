"""YAML that people write: each key once, and whatever is wrong with it in one line."""

import os
from pathlib import Path

import yaml

from cache.errors import UserError
from cache.outside import content

_MOST_BYTES = 1 << 20
_MOST_NODES = 20_000  # an alias counts as what it stands for, so that nine lines cannot be a billion values


def read(path: Path, what: str) -> object:
    """The one document in a file. Raises UserError, calling the file `what`, for any other content."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot read {what} {path}", found="no regular file", fix="check the path")
    text = content(path, f"{what} {path}", "check the path", _MOST_BYTES)
    try:
        return yaml.load(text, _Loader)
    except _Twice as twice:
        raise UserError(
            f"{what} {path} has a key twice", found=f"{twice.key} in lines {twice.lines}", fix="keep one of them"
        ) from None
    except Exception as error:  # YAML's own, and whatever a value like !!int "" or 2026-99-99 ends in
        found = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot parse {what} {path}", found=f"{found:.300}", expected="YAML") from None


class _Twice(Exception):
    def __init__(self, key: str, first: int, second: int):
        super().__init__(key)
        self.key, self.lines = f"{key:.60}", f"{first + 1} and {second + 1}"


class _Loader(yaml.SafeLoader):
    def __init__(self, stream):
        super().__init__(stream)
        self._nodes, self._below = 0, {}

    def compose_node(self, parent, index):
        before, alias = self._nodes, self.check_event(yaml.events.AliasEvent)
        node = super().compose_node(parent, index)
        if not alias:
            self._nodes += 1
            self._below[id(node)] = self._nodes - before
        elif id(node) in self._below:
            self._nodes += self._below[id(node)]
        else:
            raise yaml.YAMLError("a value that holds itself")
        if self._nodes > _MOST_NODES:
            raise yaml.YAMLError(f"over {_MOST_NODES:,} values")
        return node

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in lines:
                    raise _Twice(key.value, lines[key.value], key.start_mark.line)
                lines[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)
