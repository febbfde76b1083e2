"""What a method of distillation is: one a file beside this one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from kernels.reference import Mixed
from pipeline.config import Options, TrainStudent

Need = Literal["logits", "agreement", "mean agreement", "energy", "features", "labels", "two classes", "attack"]


@dataclass(frozen=True, kw_only=True)
class View:
    """What a term compares: one view of each of B samples, C classes, in float32 or float64."""

    student: Tensor
    """Logits (B, C), differentiable."""
    teacher: Tensor
    """Logits (B, C), up to a shift of each row."""
    target: Tensor
    """Integer (B,)."""
    weight: Tensor
    """(B,), how much each sample counts. Rows of weight 0, whose content is any finite value, must leave no trace in
    those of other rows."""
    temperature: float
    mixed: Mixed | None = None
    """Whose labels the samples have as well, where views are mixed: of augmented ones."""
    energy: Tensor | None = None
    """(B,) in [0, 1]: the share of the epoch's labels whose teacher energy is lower."""
    kept: nn.Module | None = None
    """What `Method.keeps` gave at the beginning of the run."""


@dataclass(frozen=True, kw_only=True)
class Method(Options):
    """A method; its fields are what --loss-option sets, with the authors' defaults."""

    flag: ClassVar[str] = "--loss-option "
    name: ClassVar[str]
    """Of --loss."""
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})
    """logits: what a teacher says of each view; without them there is no teacher. agreement: w weighs the augmented
    views; mean agreement: its mean over an epoch's stored labels does. energy: −logsumexp of the teacher's raw logits.
    features: the teacher's, of a store that keeps them, see `methods.features`. labels: those of the data set. attack:
    a live teacher, whose gradient makes more images."""
    kernel: ClassVar[str | None] = None
    """Which `method` of `kernels.ccd_loss` is this term, for pairs."""

    @property
    def apart(self) -> float:
        """By how much the momentum of the soft gradient is above --momentum, and that of the hard one below; 0: one."""
        return 0.0

    @property
    def for_kernel(self) -> dict[str, Any]:
        """What else `kernels.ccd_loss` takes for it."""
        return {}

    def invent(self, images: Tensor, target: Tensor, answer: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
        """Of a method that needs an attack: images f32 (M, S, S, 3), which the student learns the teacher's answers for
        beside its views, by KL at T.

        `images`: the original views f32 (B, S, S, 3) in [0, 255]; `target` i64 (B,); `answer`: from such images to the
        teacher's logits (B, C), differentiable.
        """
        raise NotImplementedError

    def weight(self, progress: float) -> float:
        """How often the mean over those images counts, by the share of the run that is over."""
        raise NotImplementedError

    def keeps(self, config: TrainStudent) -> nn.Module | None:
        """What there is beside the student from the first step to the last: buffers, and parameters that learn with it.

        Checkpoints have it, so that a run that is resumed goes on with it.
        """
        return None

    def observe(self, kept: nn.Module, hard: Tensor) -> None:
        """Told before each batch's terms are asked for: the mean hard loss, a scalar, the same in all processes."""

    def term(self, view: View) -> Tensor:
        """The soft loss of each sample (B,), without T²; differentiable in `view.student`.

        It does not see a shift of a row of the teacher, which a store need not keep, nor of the student, so that each
        row of the gradient sums to 0. Of a method that compares the samples of a batch only the mean, by `view.weight`,
        means anything.
        """
        raise NotImplementedError
