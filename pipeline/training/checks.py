"""What a run checks as it goes: pixels against the teacher's, stored labels against the teacher's answers."""

import zlib

import numpy as np
import torch

from cache import Plane, UserError
from kernels import reference
from pipeline.data.index import Index
from pipeline.labels.epochs import Labels
from pipeline.networks.teacher import Teacher
from pipeline.views.batch import Batch


class PixelCheck:
    """Does the student see what the teacher saw? Called with each batch of an epoch, it compares pixel digests.

    All of the first batch's (what changes every picture, such as another decoder, stops the run at once) and then
    those of a random `share` of the rows, drawn anew for each `seed`.
    """

    def __init__(self, plane: Plane, index: Index, seed: int, share: float):
        self.plane, self.index = plane, index
        self._chosen = np.random.default_rng(seed).random(len(plane.weight), np.float32) < share
        self._first = True

    def __call__(self, batch: Batch) -> None:
        """Raise UserError unless the chosen pixels have the digests that the teacher pass stored."""
        chosen = (self._chosen[batch.rows] | self._first) & ~np.isnan(self.plane.weight[batch.rows])
        self._first = False
        if not chosen.any():
            return
        rows, at = batch.rows[chosen], np.flatnonzero(chosen)
        pairs = batch.images[:, at].cpu().numpy().swapaxes(0, 1)
        found = np.array([[zlib.crc32(view) for view in pair] for pair in pairs], np.uint32).reshape(-1, 2)
        if len(differ := np.flatnonzero((found != self.plane.digest[rows]).any(axis=-1))):
            key = self.index.key(int(rows[differ[0]]))
            raise UserError(
                "the student would not see the pixels that the teacher saw",
                found=f"{len(differ)} of {len(found)} pairs of view {self.plane.view} differ, the first of key {key}",
                expected="the digests in the store",
                fix="decode with the DALI version and on the kind of device of the teacher pass, or run it again",
            )


class TeacherCheck:
    """Are the stored labels still what the teacher says? Every so many batches it is asked once more."""

    def __init__(self, labels: Labels, teacher: Teacher, every: int, expected: float):
        self._labels, self._teacher, self._every, self._expected = labels, teacher, every, expected
        self._batches = 0

    def __call__(self, batch: Batch) -> None:
        """Raise UserError if the mean KL(T = 4) of the labels from the teacher is beyond what the code adds."""
        self._batches += 1
        there = ~np.isnan(self._labels.plane.weight[batch.rows])
        if (self._batches - 1) % self._every or not there.any():
            return
        live = self._teacher(batch)[torch.from_numpy(there).to(self._teacher.device)].double()
        stored = self._labels.logits(batch.rows[there]).double()
        kl = reference.kl_divergence(stored.flatten(0, 1), live.flatten(0, 1), 4.0)
        spread = kl.std().item() / len(kl) ** 0.5 if len(kl) > 1 else 0.0
        if not kl.mean().item() - 4 * spread <= 1.5 * self._expected + 1e-3:
            raise UserError(
                "stored labels are not this teacher's",
                found=f"a KL(T = 4) of {kl.mean().item():.3g} nats on {len(kl)} views",
                expected=f"{self._expected:.3g}, what the code adds",
                fix="see which rows differ with pipeline verify",
            )
