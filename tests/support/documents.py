"""Blocks of code on a page in Markdown."""

import re
from textwrap import dedent
from typing import NamedTuple

FENCED = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    found = FENCED.finditer(text)
    return [Block(_language(match), dedent(match[2]), text[: match.start()].count("\n") + 2) for match in found]


def _language(match: re.Match) -> str:
    """A block of commands that says no language must not go unseen."""
    assert match[1] in ("sh", "console", "python", "yaml", "json", "text", ""), f"what is {match[1]}?"
    known = match[2].split()[0] in ("pipeline", "torchrun", "make", "pip", "sbatch", "python")
    return match[1] or ("sh" if known else "text")
