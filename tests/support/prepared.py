"""What a prepared folder says."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.images import jpeg

from cache.errors import UserError
from pipeline.data import prepare

RNG = np.random.default_rng(0)

SMALL = jpeg(RNG, 24, 17)


def samples(count: int, prefix: str = "k", image: bytes = SMALL) -> list[tuple[str, bytes]]:
    return [
        member for i in range(count) for member in ((f"{prefix}{i}.jpg", image), (f"{prefix}{i}.cls", b"%d" % (i % 3)))
    ]


def quarantine(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def refuse(source: str, out: Path, *words: str, **options) -> None:
    """The source ends in one line that holds all `words`, and nothing is left beside it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        prepare.build(source, out, **options)
    message = str(caught.value)
    assert "\n" not in message and "fix: " in message
    assert all(word in message for word in words), message
    assert sorted(out.parent.iterdir()) == before
