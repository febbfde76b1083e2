"""What a student minimises that learns by its teacher's features, as an epoch's labels keep them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from pipeline.config import TrainStudent
from pipeline.data.index import Index
from pipeline.labels.epochs import Labels, features_of
from pipeline.networks.features import Learner
from pipeline.system import device as devices
from pipeline.training import methods
from pipeline.training.methods.features import FeatureMethod, FeatureView
from pipeline.training.objectives import Seen, choice, factors, with_partners
from pipeline.views.batch import Batch


class Imitation:
    """An objective of `training.loop`; its network is a `networks.features.Learner`."""

    def __init__(
        self,
        config: TrainStudent,
        epoch: int,
        labels: Labels,
        learner: Learner,
        index: Index,
        checks: tuple[Callable[[Batch], None], ...] = (),
    ):
        """`learner` is what learns; `index` that of all samples, whose classes tell which of them are other ones."""
        method = methods.make(config.loss, config.loss_option)
        assert isinstance(method, FeatureMethod)
        self._method, self._config, self._labels, self._learner = method, config, labels, learner
        self._checks, self._choose = checks, choice(config.augmented_fraction, config.seed, epoch)
        self._factors = factors(config, epoch)
        code = features_of(labels.store, f"--loss {config.loss}")
        self._head = tuple(torch.from_numpy(array.copy()).to(labels.device) for array in code.head)
        plane = labels.plane
        self._known = np.flatnonzero(plane.good & ~np.isnan(plane.weight)) if method.drawn else None
        self._classes = None if index.class_list.unlabelled else index.records["label"]

    def wants(self, batch: Batch) -> np.ndarray:
        """Views without labels are left out."""
        return self._choose(batch) & self._labels.known(batch.rows)

    def begin(self, batch: Batch, chosen: np.ndarray) -> None:
        pass

    def __call__(self, logits: Tensor, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        for check in self._checks:
            check(seen.batch)
        assert seen.features is not None
        if not len(logits):  # every parameter has a gradient in all processes
            parts = [logits, seen.features, *self._learner.beside.parameters()]
            return torch.stack([part.sum() for part in parts]).sum() * 0.0, {}
        method, config, device = self._method, self._config, logits.device
        view, at = np.nonzero(seen.chosen)  # views one after the other, as the logits are
        rows, target = seen.batch.rows[at], devices.put(seen.batch.labels[torch.from_numpy(at)], device)
        there = seen.chosen.any(axis=0)
        taught = self._labels.features(seen.batch.rows[there])
        number = devices.put(2 * (np.cumsum(there) - 1)[at] + view, device)
        taught = taught.flatten(0, 1)[number]
        others = self._others(rows, device) if method.drawn else (None, None)
        found = FeatureView(student=seen.features.float(), teacher=taught, others=others[0], differ=others[1])
        term = method.imitate(self._learner, found)
        student, teacher = logits.float(), torch.nn.functional.linear(taught, *self._head)
        soft = method.beta * term
        if method.kd:
            kl = reference.kl_divergence(student, teacher, config.temperature)
            soft = soft + method.kd * config.temperature**2 * kl
        loss = soft.sum() / seen.count
        if method.hard:
            hard = self._hard(student, target, seen)
            alpha, whole = self._factors["alpha"], self._factors["kd_weight"]
            loss = whole * (alpha * hard.sum() / seen.count + (1 - alpha) * loss)
        if not seen.logged:
            return loss, {}
        with torch.no_grad():
            means = {"features": term.mean(), "agreement": (student.argmax(1) == teacher.argmax(1)).float().mean()}
            if self._classes is not None:
                means["ce"] = self._hard(student, target, seen).mean()
        return loss, means

    def _hard(self, student: Tensor, target: Tensor, seen: Seen) -> Tensor:
        """Cross-entropy of each view (n,)."""
        smoothing = self._config.label_smoothing
        return with_partners(reference.cross_entropy(student, target, smoothing), student, target, seen, smoothing)

    def _others(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features (K, F) of views drawn from the epoch's labels, and which are other than those of `rows`, (n, K).

        Drawn by the global generator, which is a function of the place in the run.
        """
        assert self._known is not None
        drawn = self._known[torch.randint(len(self._known), (-(-self._method.drawn // 2),)).numpy()]
        whose = self._classes if self._classes is not None else np.arange(len(self._labels.plane.good))
        mine, theirs = (devices.put(np.asarray(whose[some], np.int64), device) for some in (rows, drawn))
        return self._labels.features(drawn).flatten(0, 1), mine[:, None] != theirs.repeat_interleave(2)
