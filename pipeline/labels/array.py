"""Who computes which blocks: the processes of one job, or of jobs that know nothing of each other and fill one store.

Job I of N takes the blocks first whose number is I modulo N, then what the others have not committed, from a place of
its own on, until nothing is missing. A block that two jobs compute is written by the first one that is done. There are
no leases, so that a job may start and die at any time; its blocks are simply still missing.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cache import Store, UserError
from pipeline.system import ranks

Work = list[tuple[list[int], int]]
"""(views, block): views of a block for which its samples are decoded once."""


class Turn(NamedTuple):
    number: int
    of: int


def turn(text: str | None) -> Turn | None:
    """I/N; UserError for anything else."""
    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and len(of) < 7 and int(number) < int(of)):
        raise UserError("--array cannot be read", found=text, expected="I/N, I from 0 to N - 1", fix="correct it")
    return Turn(int(number), int(of))


def rounds(missing: Callable[[], Work], turn: Turn | None) -> Iterator[Work]:
    """What is missing; in an array of jobs again and again, until nothing is. All processes of a job see the same."""
    number = 0
    while True:
        said = json.dumps(ordered(missing(), turn))
        # Gathered before anyone commits a block; and the first process's word, as other jobs do so at any time.
        todo = [(views, block) for views, block in json.loads(ranks.gather(f"listed.{number}", said)[0])]
        if number and not todo:
            return
        yield todo
        if turn is None:
            return
        ranks.gather(f"done.{number}")
        number += 1


def ordered(todo: Work, turn: Turn | None) -> Work:
    """The work of a job: its own blocks, then those of the others from a place on that differs between jobs."""
    if turn is None:
        return todo
    own = [work for work in todo if (work[1] + work[0][0]) % turn.of == turn.number]
    others = [work for work in todo if (work[1] + work[0][0]) % turn.of != turn.number]
    start = len(others) * turn.number // turn.of
    return own + others[start:] + others[:start]


def committed(store: Store, view: int, block: int) -> bool:
    """Has anybody committed the block?"""
    return store.files.has(store.key("commit", view, block))
