"""What a network minimises on a batch: cross-entropy, or distillation from stored labels or from a live teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cache import Plane, philox
from kernels import EncodedPairs, Mixed, ccd_loss, reference
from pipeline.config import TrainStudent
from pipeline.labels.epochs import Labels
from pipeline.networks.teacher import Teacher
from pipeline.system import device as devices
from pipeline.system import ranks
from pipeline.training import methods
from pipeline.views.batch import Batch

_FRACTION = 0x0DE7  # counter word that keeps these draws apart from orders and views


@dataclass(frozen=True)
class Seen:
    """What the network saw of a batch, and what its loss is for."""

    batch: Batch
    chosen: np.ndarray
    """Bool (V, B): the views that it saw."""
    count: Tensor | float
    """Number of views that means divide by; with several processes their mean number, as DDP averages gradients."""
    loss_scale: Tensor | None = None
    logged: bool = False
    """Whether the loss is asked for and what it is made of, and not its gradient alone."""
    features: Tensor | None = None
    """What `networks.features.Learner` answered of each view (n, ·), beside the logits."""


class Objective(Protocol):
    def wants(self, batch: Batch) -> np.ndarray:
        """The views to look at, bool (V, B)."""
        ...

    def begin(self, batch: Batch, chosen: np.ndarray) -> Tensor | None:
        """What can be done beside the network's pass over the views `chosen`, which comes next: also of more images, u8
        (M, S, S, 3), after them."""
        ...

    def __call__(self, logits: Tensor, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (n, C) of the views that `seen.chosen` names, view by view, and of what `begin` gave, -> loss, scalar,
        and means over pairs. A method that takes two gradients apart has two losses, (2,).

        In a step that is not logged the loss may have no value but NaN; its gradient is the same.
        """
        ...


class CrossEntropy:
    """Of the views that `choose` takes, by default every one."""

    def __init__(self, label_smoothing: float = 0.0, choose: Callable[[Batch], np.ndarray] | None = None):
        self._label_smoothing, self._choose = label_smoothing, choose

    def wants(self, batch: Batch) -> np.ndarray:
        return self._choose(batch) if self._choose else np.ones((len(batch.images), len(batch.rows)), bool)

    def begin(self, batch: Batch, chosen: np.ndarray) -> None:
        pass

    def __call__(self, logits: Tensor, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        target = devices.put(seen.batch.labels[torch.from_numpy(np.nonzero(seen.chosen)[1])], logits.device)
        logits = logits.float()
        each = torch.nn.functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=self._label_smoothing
        )
        each = with_partners(each, logits, target, seen, self._label_smoothing)
        return each.sum() / seen.count, {}


def with_partners(hard: Tensor, logits: Tensor, target: Tensor, seen: Seen, label_smoothing: float) -> Tensor:
    """Cross-entropies `hard` (n,) of logits f32 (n, C) with targets i64 (n,), of mixed views with both their labels."""
    if seen.batch.mixed is None:
        return hard
    view, at = np.nonzero(seen.chosen)
    mixed = mixed_of(seen.batch, at, logits.device)
    assert mixed is not None
    return hard + devices.put(view, logits.device) * reference.beyond_own(logits, target, mixed, label_smoothing)


def mixed_of(batch: Batch, at: np.ndarray, device: torch.device) -> Mixed | None:
    """The other labels of the samples at some places i64 (n,), on the device."""
    return batch.mixed and Mixed(*(devices.put(each[torch.from_numpy(at)], device) for each in batch.mixed))


def choice(fraction: float, seed: int, epoch: int) -> Callable[[Batch], np.ndarray]:
    """Which views to look at if a share `fraction` of them is to be augmented ones (claim c of the paper).

    Up to a half all originals and a random part of the augmented views, above all augmented ones and a part of the
    originals; a function of (seed, epoch, row).
    """

    def choose(batch: Batch) -> np.ndarray:
        chosen = np.ones((2, len(batch.rows)), bool)
        if fraction != 0.5:
            rare, share = (1, fraction / (1 - fraction)) if fraction < 0.5 else (0, (1 - fraction) / fraction)
            words = philox.philox((batch.rows.astype(np.uint64), 0, epoch, _FRACTION), seed)[:, 0]
            chosen[rare] = words < share * 2**32
        return chosen

    return choose


class Distillation:
    """A method of distillation on the pairs of an epoch."""

    def __init__(
        self,
        config: TrainStudent,
        epoch: int,
        labels: Labels | None = None,
        teacher: Teacher | None = None,
        checks: tuple[Callable[[Batch], None], ...] = (),
        kept: torch.nn.Module | None = None,
    ):
        """Learns from `labels`, or from the `teacher` as it answers now; `kept` is what the method keeps."""
        assert labels or teacher
        self._config, self._labels, self._teacher, self._checks = config, labels, teacher, checks
        self._method = methods.make(config.loss, config.loss_option)
        self._choose = choice(config.augmented_fraction, config.seed, epoch)
        mean = labels and "mean agreement" in self._method.needs
        self._same_weight = float(np.nanmean(labels.plane.weight)) if labels and mean else 1.0
        self._kept = kept
        self._energies = (
            _shares_below(labels.plane) if labels and not teacher and "energy" in self._method.needs else None
        )
        self._each_weight = "agreement" in self._method.needs
        self._factors = factors(config, epoch)
        self._encoded: EncodedPairs | None = None
        self._progress = epoch / config.epochs
        self._more: Tensor | None = None

    def wants(self, batch: Batch) -> np.ndarray:
        """Views without labels are left out: a quarantined sample costs nothing."""
        chosen = self._choose(batch)
        if self._labels and not self._teacher:
            chosen &= self._labels.known(batch.rows)
        return chosen

    def begin(self, batch: Batch, chosen: np.ndarray) -> Tensor | None:
        """Labels that kernels decode do not wait for the network. What a method makes of images comes before it."""
        labels, self._encoded = self._labels, None
        on_gpu = bool(labels and not self._teacher and labels.device.type == "cuda" and chosen.any())
        if labels and labels.in_codes and on_gpu and self._by_pairs(chosen, on_gpu):
            self._encoded = labels.pairs(batch.rows[chosen[0]]).beside()
        self._more = self._invented(batch) if "attack" in self._method.needs and chosen.any() else None
        return self._more

    def _invented(self, batch: Batch) -> Tensor | None:
        assert self._teacher
        images = devices.put(batch.original, self._teacher.device).float()
        target = devices.put(batch.labels, images.device)
        made = self._method.invent(images, target, self._teacher.of_pixels, self._config.temperature)
        return made.round().clamp(0, 255).to(torch.uint8) if len(made) else None

    def _by_pairs(self, chosen: np.ndarray, on_gpu: bool) -> bool:
        """Whether `ccd_loss` takes these views. On a CPU other methods than KL are faster without it, in float32."""
        kernel = self._method.kernel
        return bool(kernel and (kernel == "kd" or on_gpu) and (chosen[0] == chosen[1]).all())

    def __call__(self, logits: Tensor, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        if self._more is None or not self._teacher:
            return self._of_views(logits, seen)
        views = int(seen.chosen.sum())
        with torch.no_grad():
            said = self._teacher.of_pixels(self._more)
        loss, terms = self._of_views(logits[:views], seen)
        temperature = self._config.temperature
        _, factor = reference.coefficients(temperature, self._factors["alpha"], self._factors["kd_weight"])
        beyond = reference.kl_divergence(logits[views:].float(), said, temperature).mean()
        loss = loss + self._method.weight(self._progress) * factor * beyond
        return loss, terms | {"kl_attack": beyond.detach()} if seen.logged else terms

    def _of_views(self, logits: Tensor, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        for check in self._checks:
            check(seen.batch)
        config, chosen = self._config, seen.chosen
        if not len(logits):
            if self._kept is not None:  # what others of the job are told
                self._method.observe(self._kept, ranks.total(logits.new_zeros(())))
            return logits.sum() * 0.0, {}
        if self._by_pairs(chosen, logits.is_cuda):
            return self._by_kernel(logits.unflatten(0, (2, -1)), seen)
        some = chosen[0] | chosen[1]
        teacher, weight = self._answers(seen.batch, some, logits.device)
        student = logits.new_zeros((2, int(some.sum()), logits.shape[1]), dtype=torch.float32)
        valid = devices.put(chosen[:, some], logits.device)
        student = student.masked_scatter(valid[..., None], logits.float())
        energy = self._energy(seen.batch.rows[some], teacher) if "energy" in self._method.needs else None
        loss = methods.loss(
            self._method,
            student,
            teacher,
            devices.put(seen.batch.labels[torch.from_numpy(np.flatnonzero(some))], logits.device),
            weight,
            temperature=config.temperature,
            label_smoothing=config.label_smoothing,
            valid=valid,
            count=seen.count / 2,
            energy=energy,
            kept=self._kept,
            mixed=mixed_of(seen.batch, np.flatnonzero(some), logits.device),
            **self._factors,
        )
        return loss, _agreement(student, teacher, valid) if seen.logged else {}

    def _by_kernel(self, students: Tensor, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        config, some = self._config, seen.chosen[0]
        student_o, student_a = students.unbind(0)
        device = students.device
        target = seen.batch.labels
        target = devices.put(target if some.all() else target[torch.from_numpy(np.flatnonzero(some))], device)
        options = {
            "temperature": config.temperature,
            "label_smoothing": config.label_smoothing,
            "count": seen.count / 2,
            **self._factors,
            "mixed": mixed_of(seen.batch, np.flatnonzero(some), device),
            "loss_scale": seen.loss_scale if device.type == "cuda" else None,
            "method": self._method.kernel,
            **self._method.for_kernel,
            "parts": seen.logged,
            "report": "plain" if seen.logged else "none",
        }
        if encoded := self._encoded:
            weight = encoded.weight if self._each_weight else self._same_weight
            found = ccd_loss(student_o, student_a, encoded, target, weight=weight, **options)
        else:
            teacher, weight = self._answers(seen.batch, some, device)
            found = ccd_loss(student_o, student_a, teacher[:, 0], teacher[:, 1], target, weight=weight, **options)
        if not seen.logged:
            return found, {}
        loss, parts = found
        names = ("kl_o", "kl_a", "w") if options["method"] == "kd" else ()
        means = {name: getattr(parts, name).mean() for name in names}
        means["ce"] = (parts.ce_o + parts.ce_a).mean() / 2
        means["agreement"] = (parts.agree_o + parts.agree_a).mean() / 2
        return loss, means

    def _answers(self, batch: Batch, some: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor | float]:
        """Teacher logits f32 (B', 2, C) of some of the batch's pairs, and w."""
        if self._teacher:
            logits = self._teacher(batch)
            logits = logits if some.all() else logits[devices.put(np.flatnonzero(some), device)]
            w = reference.cosine_weight(logits[:, 0].double(), logits[:, 1].double()).float()
            return logits, w if self._each_weight else 1.0
        assert self._labels
        rows = batch.rows[some]
        weight = devices.put(self._labels.plane.weight[rows], device) if self._each_weight else self._same_weight
        return self._labels.logits(rows), weight

    def _energy(self, rows: np.ndarray, logits: Tensor) -> Tensor:
        """The share (B, 2) of the epoch's labels of lower energy, or of the batch's if a teacher answers live."""
        if self._energies is not None:
            return devices.put(self._energies[rows], logits.device)
        order = logits.logsumexp(2).flatten().argsort(descending=True)
        places = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        return (places / len(order)).unflatten(0, (-1, 2))


def _shares_below(plane: Plane) -> np.ndarray:
    """f32 (N, 2): the share of a plane's labels whose energy is lower."""
    assert plane.energy is not None
    known = np.sort(plane.energy[plane.good & ~np.isnan(plane.weight)], axis=None)
    return (np.searchsorted(known, plane.energy) / max(len(known), 1)).astype(np.float32)


def factors(config: TrainStudent, epoch: int) -> dict[str, float]:
    """alpha and kd_weight that leave the hard term as it is and fade the soft one in."""
    part = (epoch + 1) / config.kd_warmup_epochs if epoch + 1 < config.kd_warmup_epochs else 1.0
    shares = config.alpha + (1 - config.alpha) * part
    return {"alpha": config.alpha / shares, "kd_weight": config.kd_weight * shares}


def _agreement(student: Tensor, teacher: Tensor, valid: Tensor) -> dict[str, Tensor]:
    same = student.argmax(2) == teacher.swapaxes(0, 1).argmax(2)
    return {"agreement": same[valid].float().mean()}


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of softmax(logits) in nats, (n, C) -> scalar."""
    log_p = logits.detach().float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()
