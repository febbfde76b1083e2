"""The door for training loops: a prepared data set and a store of soft labels become batches.

    with Replay("data/train", "labels.zarr", batch_size=256, epochs=200, device="cuda") as replay:
        for batch in replay:
            logits = model(batch.images)
            loss = ccd_loss(*logits.chunk(2), batch.teacher, batch.target, valid=batch.valid)

`pipeline.training` trains through it as well.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import cache
from cache import Store, UserError
from kernels import EncodedPairs, Mixed
from pipeline.config import Machine
from pipeline.data import order
from pipeline.data.index import Index
from pipeline.labels import epochs as planes
from pipeline.labels.epochs import Labels, labels_of
from pipeline.labels.pixels import PixelCheck
from pipeline.networks.placed import Normalise
from pipeline.system import device as devices
from pipeline.system import ranks
from pipeline.views import plan
from pipeline.views import policy as policies
from pipeline.views.batch import Batch
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy


@dataclass(frozen=True, eq=False)
class ReplayBatch:
    """One step's pairs of views. Tensors are made when they are asked for, on the device of the `Replay`."""

    epoch: int
    step: int
    """Of its epoch, from 0."""
    made: Batch
    """Index rows, class labels and pixels u8 (2, B, S, S, 3), less the samples that could not be read."""
    stored: Labels | None
    """The epoch's labels, if there is a store."""
    normalise: Normalise

    def __len__(self) -> int:
        """B, the number of pairs."""
        return len(self.made.rows)

    @cached_property
    def images(self) -> torch.Tensor:
        """f32 (2B, 3, S, S), normalised, channels last: all original views, then all augmented ones."""
        return self.normalise(self.made.images.flatten(0, 1))

    @cached_property
    def target(self) -> torch.Tensor:
        """Class labels i64 (B,)."""
        return devices.put(self.made.labels, self.normalise.scale.device)

    @cached_property
    def mixed(self) -> Mixed | None:
        """Class labels i64 (B,) of those that the augmented views are mixed with, and the shares f32 (B,) of their own
        labels, for `kernels.ccd_loss`; None if the policy does not mix."""
        device = self.normalise.scale.device
        return self.made.mixed and Mixed(*(devices.put(each, device) for each in self.made.mixed))

    @cached_property
    def teacher(self) -> EncodedPairs:
        """What the teacher said, encoded, for `kernels.ccd_loss`; `.logits()` is f32 (B, 2, C) for any other loss."""
        assert self.stored, "without a store no teacher has spoken"
        return self.stored.pairs(self.made.rows)

    @cached_property
    def valid(self) -> torch.Tensor:
        """Bool (B,): False where the teacher pass skipped the sample, so that no label says anything."""
        known = self.stored.known(self.made.rows) if self.stored else np.ones(len(self), bool)
        return devices.put(known, self.normalise.scale.device)


class Replay:
    """The views that the teacher saw, bit for bit, with its labels, in the order of (seed, epoch).

    Iterating gives the batches left of the whole run; `epoch()` those left of one epoch. `len` is how many are left.
    The order does not depend on rank or world, and the position (epoch, step) says all there is to resume from.
    """

    def __init__(
        self,
        data: str | Path | Index,
        store: str | Path | Store | None = None,
        *,
        batch_size: int,
        epochs: int,
        device: str | torch.device = "auto",
        start: tuple[int, int] = (0, 0),
        rank: int | None = None,
        world: int | None = None,
        seed: int = 0,
        few_shot: float = 1.0,
        shuffle_window: int = 0,
        repeat: int = 1,
        views: int | None = None,
        least: int = 1,
        policy: str | Policy | None = None,
        pairs: bool = True,
        labels: bool = True,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        threads: int = 0,
        max_bad: float = 0.001,
        plane: Literal["auto", "gpu", "pinned", "mmap"] = "auto",
        folder: Path | None = None,
        check_share: float = 0.001,
        others: Sequence[Store] = (),
        combined: Callable[[Sequence[Labels]], Labels] | None = None,
    ) -> None:
        """Opens and compares data set and store; reading begins with the first batch.

        `batch_size` pairs a step over all processes; rank and world are torchrun's unless given. `start`: (epoch,
        step). With `repeat` a sample is decoded once for as many views, which follow each other step by step: so many
        epochs share an order, and hold their labels at once. `views`: how many of the store's first ones are taken, by
        default all; only they have to be there. A last step of fewer than `least` samples joins the one before it, as
        BatchNorm may need two. Without a store views are drawn from `seed` under `policy`. `pairs=False`
        leaves the augmented views out, `labels=False` the stored labels. `mean` and `std` are the policy's unless
        given. `folder` takes what --plane mmap writes. Of each epoch's first batch and of a random `check_share` of its
        samples, pixels are compared with the digests of the teacher pass. `others`: stores of more teachers on the same
        views, whose labels `combined` makes one of with the first's. Raises UserError for whatever does not fit.
        """
        machine = Machine(threads=threads, max_bad=max_bad)
        self.device = _device(device)
        self.index = data if isinstance(data, Index) else Index.open(data, "train")
        self.store = store if isinstance(store, Store | None) else cache.open(str(store))
        self.rank = ranks.rank() if rank is None else rank
        self.world = ranks.world() if world is None else world
        self.batch_size, self.epochs, self.seed, self.pairs, self.repeat = batch_size, epochs, seed, pairs, repeat
        self._check(policy)
        if self.store:
            self.index = planes.numbered_alike(self.index, machine, self.store.manifest)
            self.policy, decoder = planes.replayed(self.store.manifest)
        else:
            self.policy = policy if isinstance(policy, Policy) else policies.load(policy or "imagenet")
            decoder = devices.decoder("auto", self.device)
        if self.policy.mix and few_shot != 1:
            what = "partners of mixed views come from all samples"
            fix = "prepare those samples as a data set of their own, or take a policy without mix"
            raise UserError(what, found=f"few_shot {few_shot:g}", expected=1, fix=fix)
        self._views = self._first_views(views)
        self._labelled = labels and self.store is not None
        if self._labelled and self.store:
            planes.require_whole(self.store, self._views or 0)
        self.others, self._combined = tuple(others), combined
        self._few_shot, self._window = few_shot, shuffle_window
        self._plane, self._folder, self._share = plane, folder, check_share
        self.rows: order.Rows = range(len(self.index))
        if self.index.quarantined or few_shot != 1:
            good = self.index.good
            self.rows = order.few_shot(good, self.index.records["label"][good], few_shot)
        self.least = least
        self.position = start
        self._normalise = Normalise(mean or self.policy.mean, std or self.policy.std, self.device)
        self.loader = Loader(
            self.index, self.policy, threads=devices.threads(machine), decoder=decoder, max_bad=max_bad
        )
        self._running: Generator[ReplayBatch, None, None] | None = None

    def _first_views(self, views: int | None) -> int | None:
        """Views that epochs take in turn; None: each epoch draws its own."""
        if not self.store:
            if views is not None:
                raise UserError("views of a store", found="no store", fix="give a store, or leave the number out")
            return None
        have = self.store.manifest.views
        if views is not None and not 1 <= views <= have:
            fix = "run precompute-teacher with more --views, or ask for fewer"
            raise UserError("views out of range", found=views, expected=f"1 to {have}, as the store has", fix=fix)
        return views or have

    def _check(self, policy: str | Policy | None) -> None:
        for name, value, low in (
            ("batch_size", self.batch_size, self.world),
            ("epochs", self.epochs, 1),
            ("repeat", self.repeat, 1),
        ):
            if value < low:
                why = f"at least {low}" + (", one for each process" if low > 1 else "")
                raise UserError(f"{name} out of range", found=value, expected=why)
        if not 0 <= self.rank < self.world:
            raise UserError("rank out of range", found=self.rank, expected=f"0 to {self.world - 1}")
        if self.store:
            if policy is not None:
                raise UserError("policy and store", found="both", expected="one", fix="leave out the policy")
            index = self.index
            cache.check(self.store.manifest, dataset=index.fingerprint, samples=len(index), classes=index.classes)

    @property
    def steps_per_epoch(self) -> int:
        return order.steps_per_epoch(len(self.rows), self.batch_size, self.least)

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, step) of the next batch."""
        return self._position

    @position.setter
    def position(self, at: tuple[int, int]) -> None:
        epoch, step = at
        if step == self.steps_per_epoch:
            epoch, step = epoch + 1, 0
        if not (0 <= epoch <= self.epochs and 0 <= step < self.steps_per_epoch):
            raise UserError(
                "no such place in the run",
                found=f"epoch {epoch}, step {step}",
                expected=f"up to {self.epochs} epochs of {self.steps_per_epoch} steps",
            )
        self._position = epoch, step

    def __len__(self) -> int:
        epoch, step = self.position
        return (self.epochs - epoch) * self.steps_per_epoch - step

    def __iter__(self) -> Iterator[ReplayBatch]:
        while len(self):
            batch = self.next()
            if len(batch) or self.world > 1:  # ranks must take as many steps, also where one of them read nothing
                yield batch

    def epoch(self) -> Iterator[ReplayBatch]:
        """The batches left of the epoch that the position is in: for loops that think in epochs."""
        now = self.position[0]
        while self.position[0] == now < self.epochs:
            batch = self.next()
            if len(batch) or self.world > 1:
                yield batch

    def next(self) -> ReplayBatch:
        """The batch at the position, which moves on; it may be empty, if none of its samples could be read."""
        self._running = self._running or self._run()
        batch = next(self._running)
        self.position = batch.epoch, batch.step + 1
        return batch

    def _run(self) -> Generator[ReplayBatch, None, None]:
        groups = list(self._groups())  # from the position of now: the loader asks for its plan a little later
        batches = self.loader.batches(self._plan(groups), pairs=self.pairs)
        with closing(batches), closing(self._stored(groups)) as taught:
            for first, count, done in groups:
                stored = [next(taught) for _ in range(count)]
                checks = [
                    PixelCheck(labels.plane, self.index, first + number, self._share) if labels else None
                    for number, labels in enumerate(stored)
                ]
                for at in range(done, count * self.steps_per_epoch):
                    made, turn = next(batches), at % count
                    if check := checks[turn]:
                        check(made)
                    epoch, step = divmod(at, self.steps_per_epoch)
                    yield ReplayBatch(first + epoch, step, made, stored[turn], self._normalise)

    def _groups(self) -> Iterator[tuple[int, int, int]]:
        """Epochs that share an order and their decoded images, from the position on: the first, how many, steps done.

        Of `count` epochs step `at` takes the view of epoch `at % count`, and of the order step `at // count`.
        """
        epoch, step = self.position
        for first in range(epoch // self.repeat * self.repeat, self.epochs, self.repeat):
            done = (epoch - first) * self.steps_per_epoch + step if first <= epoch else 0
            yield first, min(self.repeat, self.epochs - first), done

    def _plan(self, groups: list[tuple[int, int, int]]) -> Iterator[plan.Request]:
        seed = self.store.manifest.seed if self.store else self.seed
        return plan.requests(self.index, self.policy, seed, self._parts(groups))

    def _parts(self, groups: list[tuple[int, int, int]]) -> Iterator[plan.Part]:
        bounds = order.shard_bounds(self.index.records["shard"], self.rows) if self._window else None
        for first, count, done in groups:
            steps = order.steps(
                self.seed,
                self.rows,
                self.batch_size,
                first + 1,
                (first, done // count),
                bounds=bounds,
                window=self._window,
                rank=self.rank,
                world=self.world,
                least=self.least,
            )
            turn = done % count
            for _, rows in steps:
                yield [self._view(epoch) for epoch in range(first + turn, first + count)], rows
                turn = 0

    def _view(self, epoch: int) -> int:
        return epoch % self._views if self._views else epoch

    def _stored(self, groups: list[tuple[int, int, int]]) -> Generator[Labels | None, None, None]:
        numbers = [epoch for first, count, _ in groups for epoch in range(first, first + count)]
        if not self._labelled or not self.store:
            yield from (None for _ in numbers)
            return
        views = [self._view(epoch) for epoch in numbers]
        with ExitStack() as stack:
            each = [
                stack.enter_context(
                    closing(planes.epochs(store, iter(views), self.device, self._plane, self._folder, self.repeat))
                )
                for store in (self.store, *self.others)
            ]
            for labels in zip(*each, strict=True):
                yield self._combined(labels) if self._combined else labels[0]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the run is of, so that another run's is refused; JSON-safe."""
        return {"epoch": self.position[0], "step": self.position[1], "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another run's position. Raises UserError unless it saw the same samples in the same order."""
        if differing := cache.difference("", self._identity(), state["of"]):
            name, here, there = differing
            raise UserError(
                f"cannot resume: another {name[1:]}",
                found=f"{here!s:.80}",
                expected=f"{there!s:.80}",
                fix="give what the run was made of",
            )
        self.close()
        self.position = state["epoch"], state["step"]

    def _identity(self) -> dict[str, Any]:
        options = {"batch_size": self.batch_size, "seed": self.seed, "few_shot": self._few_shot, "window": self._window}
        options["repeat"] = self.repeat
        if self.store and self._views != self.store.manifest.views:
            options["views"] = self._views
        policy = hashlib.sha256(json.dumps(self.policy.to_config(), sort_keys=True).encode()).hexdigest()
        if self.others:
            options["others"] = [labels_of(store) for store in self.others]
        return options | {"dataset": self.index.fingerprint, "policy": policy, "labels": labels_of(self.store)}

    def close(self) -> None:
        """Stop reading. The next batch starts it again."""
        if self._running:
            self._running.close()
            self._running = None

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _device(wanted: str | torch.device) -> torch.device:
    if isinstance(wanted, torch.device) or ":" in wanted:
        return torch.device(wanted)
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError("unknown device", found=wanted, expected="auto, cpu, cuda or cuda:N")
    return devices.pick(Machine(device=wanted))  # pyright: ignore[reportArgumentType]
