"""Stored labels held against the teacher's answers, as a run goes."""

import torch

from cache import UserError
from kernels import reference
from pipeline.labels.epochs import Labels
from pipeline.networks.teacher import Teacher
from pipeline.views.batch import Batch


class TeacherCheck:
    """Are the stored labels still what the teacher says? Every so many batches it is asked once more."""

    def __init__(self, labels: Labels, teacher: Teacher, every: int, expected: float):
        self._labels, self._teacher, self._every, self._expected = labels, teacher, every, expected
        self._batches = 0

    def __call__(self, batch: Batch) -> None:
        """Raise UserError if the mean KL(T = 4) of the labels from the teacher is beyond what the code adds."""
        self._batches += 1
        there = self._labels.known(batch.rows)
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
