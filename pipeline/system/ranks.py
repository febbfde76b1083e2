"""The processes of a torchrun job: who this one is, and work handed out among them.

What they share is the key-value store that torchrun keeps for every job; a counter in it hands out work, so that a
fast process takes more than a slow one and no process waits for another's result.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

_PATIENCE = timedelta(days=7)  # rank 0 may be calibrating; torchrun ends the others if it fails


def rank() -> int:
    """Number of this process in the job; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def hand_out(name: str, count: int) -> Iterator[int]:
    """0 … count - 1 in order, each to one process of the job, when it asks."""
    if world() == 1:
        yield from range(count)
        return
    while (number := _store().add(name, 1) - 1) < count:
        yield number


def after_first(name: str) -> None:
    """Rank 0: let the others pass the point `name`. Others: wait until rank 0 is there."""
    if world() == 1:
        return
    if rank() == 0:
        _store().set(name, "")
    else:
        _store().wait([name], _PATIENCE)


def gather(name: str, value: str = "") -> list[str]:
    """Wait until every process of the job has come to the point `name`: what each of them brought, by rank."""
    if world() == 1:
        return [value]
    keys = [f"{name}.{number}" for number in range(world())]
    _store().set(keys[rank()], value)
    _store().wait(keys, _PATIENCE)
    found = [_store().get(key).decode() for key in keys]
    # Rank 0 may hold the store: it must not leave before the others have read.
    if _store().add(f"{name}.read", 1) == world():
        _store().set(f"{name}.done", "")
    _store().wait([f"{name}.done"], _PATIENCE)
    return found


@cache
def _store() -> Store:
    store, _, _ = next(iter(rendezvous("env://")))
    # What a job said before torchrun started it again is still there.
    return PrefixStore(f"jda-distill.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarted() -> bool:
    """Whether torchrun has started this job again after one of its processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Collectives among the job's processes: gloo for tensors on the CPU, NCCL for those on GPUs."""
    if world() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # A store by itself: in the one that torchrun keeps, a job that it started again would find its former addresses.
    store = PrefixStore("group", _store())
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world(), device_id=device_id)
    try:
        yield
    finally:
        dist.destroy_process_group()


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def everyone(value: str) -> list[str]:
    """What each process says, by rank; a collective call."""
    found: list = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


def local_world() -> int:
    """Number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def job() -> str:
    """A name of this start of the job, of letters, digits and underlines."""
    parts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    return re.sub(r"\W", "_", "_".join(parts), flags=re.ASCII)
