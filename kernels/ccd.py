"""Cosine Confidence Distillation as one fused Triton kernel: loss and gradient of a pair of rows in a single pass.

`kernels.reference` is the specification. The kernel computes in float32 and still meets float64 to 1e-6, because it
sums only terms that do not cancel:

- Logits lose their maximum before they are divided by T, which rounds nothing away where all are around ±1e4.
- KL = Σ p·(x + exp(−x) − 1) with x = log p − log q. Each term is ≥ 0, and an error in a log-sum-exp shifts every x
  alike and drops out, its derivative being Σ(p − q) = 0. In Σ p·x it stays: 2e-5 of the loss of a student near its
  teacher, measured.
- A cross-entropy near 0 is log(1 + rest), with the target's own exp(0) = 1 kept out of the rest.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels import reference

MAX_CLASSES = 4096  # a row lives in registers; beyond this it spills

_INTERPRETED = knobs.runtime.interpret  # what the decorators below see

# Stands for −inf in padding: exp gives 0, and the difference of two of them is 0 instead of NaN.
_ABSENT = tl.constexpr(-1e30)


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0: the rounding of 1 + x is undone (Goldberg 1991, theorem 4)."""
    one_plus = 1.0 + x
    lost = one_plus == 1.0
    return tl.where(lost, x, tl.log(one_plus) * (x / tl.where(lost, 1.0, one_plus - 1.0)))


@triton.jit
def _norm(row):
    return tl.sqrt(tl.sum(row * row, 0))


@triton.jit
def _cosine_weight(o, a):
    """As `reference.cosine_weight`, for one pair of rows padded with zeros."""
    norm_o = _norm(o)
    norm_a = _norm(a)
    undirected = (norm_o == 0.0) | (norm_a == 0.0)
    both = o / tl.where(undirected, 1.0, norm_o) + a / tl.where(undirected, 1.0, norm_a)
    return tl.where(undirected, 1.0, 0.5 * tl.sum(both * both, 0))


@triton.jit
def _cross_entropy(z, is_target):
    """CE of a row of shifted logits, and its derivative softmax(z) − e_target."""
    exps = tl.exp(z)
    rest = tl.sum(tl.where(is_target, 0.0, exps), 0)
    z_target = tl.sum(tl.where(is_target, z, 0.0), 0)
    total = tl.sum(exps, 0)
    # The largest logit is 0: if the target has it, its exp is the 1 of log1p.
    ce = tl.where(z_target == 0.0, _log1p(rest), tl.log(total) - z_target)
    return ce, exps / total - tl.where(is_target, 1.0, 0.0)


@triton.jit
def _kl_divergence(z, t, temperature):
    """KL(softmax(t/T) ‖ softmax(z/T)) of rows of shifted logits, and T times its derivative by z, q − p."""
    exp_q = tl.exp(z / temperature)
    exp_p = tl.exp(t / temperature)
    sum_q = tl.sum(exp_q, 0)
    sum_p = tl.sum(exp_p, 0)
    q = exp_q / sum_q
    p = exp_p / sum_p
    # Finite also where the teacher's logit is −inf, so that p = 0 gives 0 and not 0·−inf.
    x = tl.maximum((t - z) / temperature - tl.log(sum_p / sum_q), _ABSENT)
    small = tl.abs(x) < 1.0
    y = tl.where(small, x, 0.0)
    # y + exp(−y) − 1 = y²/2·(1 − y/3·(1 − y/4·(…))); what is cut off is below 2/12! of it.
    series = 1.0 - y / 11
    for k in tl.static_range(10, 2, -1):
        series = 1.0 - y / k * series
    kl = tl.sum(tl.where(small, p * (0.5 * y * y * series), p * (x - 1.0) + q), 0)
    return kl, q - p


@triton.jit
def _load_row(pointer, row, stride, columns, inside):
    return tl.load(pointer + row * stride + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _shift(logits, inside):
    """Logits less their maximum, −1e30 in the padding."""
    logits = tl.where(inside, logits, _ABSENT)
    return logits - tl.max(logits, 0)


@triton.jit
def _pair_kernel(
    student_o,
    student_a,
    teacher_o,
    teacher_a,
    target,
    weight,
    loss,
    grad_o,
    grad_a,
    temperature,
    hard,
    soft,
    STRIDE_STUDENT_O: tl.constexpr,
    STRIDE_STUDENT_A: tl.constexpr,
    STRIDE_TEACHER_O: tl.constexpr,
    STRIDE_TEACHER_A: tl.constexpr,
    CLASSES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program per pair: its share of the loss, and of the gradient unless `grad_o` and `grad_a` are None.

    `hard` and `soft` are the factors of one row's CE and KL. `weight` None: the cosine of the teacher's rows.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < CLASSES
    label = tl.load(target + row).to(tl.int64)
    is_target = columns == label

    t_o = _load_row(teacher_o, row, STRIDE_TEACHER_O, columns, inside)
    t_a = _load_row(teacher_a, row, STRIDE_TEACHER_A, columns, inside)
    z_o = _load_row(student_o, row, STRIDE_STUDENT_O, columns, inside)
    z_a = _load_row(student_a, row, STRIDE_STUDENT_A, columns, inside)
    w = _cosine_weight(t_o, t_a) if weight is None else tl.load(weight + row).to(tl.float32)

    z_o = _shift(z_o, inside)
    z_a = _shift(z_a, inside)
    ce_o, hard_grad_o = _cross_entropy(z_o, is_target)
    ce_a, hard_grad_a = _cross_entropy(z_a, is_target)
    kl_o, soft_grad_o = _kl_divergence(z_o, _shift(t_o, inside), temperature)
    kl_a, soft_grad_a = _kl_divergence(z_a, _shift(t_a, inside), temperature)
    total = hard * (ce_o + ce_a) + soft * (kl_o + w * kl_a)
    tl.store(loss + row, tl.where((label >= 0) & (label < CLASSES), total, float("nan")))
    if grad_o is not None:
        out = row * CLASSES + columns
        soft_by_t = soft / temperature
        tl.store(grad_o + out, hard * hard_grad_o + soft_by_t * soft_grad_o, mask=inside)
        tl.store(grad_a + out, hard * hard_grad_a + soft_by_t * w * soft_grad_a, mask=inside)


def compile_options(classes: int) -> dict[str, int | bool]:
    """Options of a launch: eight logits of a row per thread; the GPU rounds as the interpreter of the tests does."""
    return {
        "num_warps": min(max(triton.next_power_of_2(classes) // 256, 1), 16),
        "enable_fp_fusion": False,
    }


def _launch(
    logits: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    scale: tuple[float, float, float],
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss (float32 scalar) and the gradients by the two students, None unless `with_grad`."""
    temperature, alpha, kd_weight = scale
    batch, classes = logits[0].shape
    student_o, student_a, teacher_o, teacher_a = (row if row.stride(1) == 1 else row.contiguous() for row in logits)
    losses = student_o.new_empty(batch, dtype=torch.float32)
    # float16 would flush a gradient that has not met its loss scale yet; backward casts after scaling.
    grad_o, grad_a = (
        torch.empty_like(row, dtype=_grad_dtype(row.dtype), memory_format=torch.contiguous_format)
        if with_grad
        else None
        for row in (student_o, student_a)
    )
    hard, soft = reference.coefficients(temperature, alpha, kd_weight)
    with torch.cuda.device_of(student_o):
        launch: Any = _pair_kernel[(batch,)]
        launch(
            student_o=student_o,
            student_a=student_a,
            teacher_o=teacher_o,
            teacher_a=teacher_a,
            target=target.contiguous(),
            weight=None if weight is None else weight.contiguous(),
            loss=losses,
            grad_o=grad_o,
            grad_a=grad_a,
            temperature=float(temperature),
            hard=hard / (2 * batch),
            soft=soft / (2 * batch),
            STRIDE_STUDENT_O=student_o.stride(0),
            STRIDE_STUDENT_A=student_a.stride(0),
            STRIDE_TEACHER_O=teacher_o.stride(0),
            STRIDE_TEACHER_A=teacher_a.stride(0),
            CLASSES=classes,
            PADDED=triton.next_power_of_2(classes),
            **compile_options(classes),
        )
    return losses.sum(dtype=torch.float64).float(), grad_o, grad_a


def _grad_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


class _FusedLoss(torch.autograd.Function):
    """The gradient is computed with the loss; backward only scales it."""

    @staticmethod
    def forward(ctx, student_o, student_a, teacher_o, teacher_a, target, weight, scale):
        logits = [student_o, student_a, teacher_o, teacher_a]
        loss, grad_o, grad_a = _launch(logits, target, weight, scale, with_grad=True)
        ctx.save_for_backward(grad_o, grad_a)
        ctx.dtypes = student_o.dtype, student_a.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        students = [(grad * grad_loss).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *students, None, None, None, None, None


def ccd_loss(
    student_o: Tensor,
    student_a: Tensor,
    teacher_o: Tensor,
    teacher_a: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 0.5,
    kd_weight: float = 2.0,
    weight: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cosine Confidence Distillation of a batch of pairs of views; the formula is `reference.ccd_loss`.

    `student_*`, `teacher_*`: logits (B, C) of the original and the augmented views, any floating dtypes. `target`:
    integer (B,); a label outside [0, C) makes the loss NaN on the GPU and raises elsewhere. `weight`: float (B,),
    None takes 1 + cosine of the teacher's raw logits, ones make it plain distillation (KD).
    `impl`: "triton" (CUDA, C ≤ 4096, no float64), "torch" (anywhere, computed in float64), or "auto", which takes
    Triton where it can. "triton" takes CPU tensors if TRITON_INTERPRET=1 was set before this module was imported.

    Returns a scalar, float32 (float64 for a float64 student), differentiable once in `student_*`; the gradients have
    the students' dtypes. Against float64: loss to 1e-6 relative, gradient to 1e-7 + 1e-6 of its largest entry (before
    the rounding of a 16-bit dtype). Bitwise deterministic; never synchronises. Raises ValueError for arguments that
    do not fit together.
    """
    logits = {
        "student_o": student_o,
        "student_a": student_a,
        "teacher_o": teacher_o,
        "teacher_a": teacher_a,
    }
    _check(logits, target, weight, temperature, alpha)
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl: expected "auto", "triton" or "torch", got {impl!r}')
    obstacle = _triton_obstacle(list(logits.values()))
    if impl == "triton" and obstacle:
        raise ValueError(f'impl="triton": {obstacle}')
    if impl == "torch" or (impl == "auto" and (obstacle or not student_o.is_cuda)):
        loss = reference.ccd_loss(
            student_o.double(),
            student_a.double(),
            teacher_o.double(),
            teacher_a.double(),
            target,
            temperature=temperature,
            alpha=alpha,
            kd_weight=kd_weight,
            weight=None if weight is None else weight.double(),
        )
        return loss.to(torch.promote_types(student_o.dtype, torch.float32))
    scale = temperature, alpha, kd_weight
    if torch.is_grad_enabled() and (student_o.requires_grad or student_a.requires_grad):
        return _FusedLoss.apply(*logits.values(), target, weight, scale)
    return _launch(list(logits.values()), target, weight, scale, with_grad=False)[0]


def _check(logits: dict[str, Tensor], target: Tensor, weight: Tensor | None, temperature: float, alpha: float) -> None:
    student_o = logits["student_o"]
    if student_o.ndim != 2 or student_o.numel() == 0:
        raise ValueError(f"student_o: expected logits (B, C), got shape {tuple(student_o.shape)}")
    batch = student_o.shape[:1]
    expected = {**dict.fromkeys(logits, student_o.shape), "target": batch, "weight": batch}
    for name, tensor in {**logits, "target": target, "weight": weight}.items():
        if tensor is None:
            continue
        if tensor.shape != expected[name]:
            raise ValueError(f"{name}: expected shape {tuple(expected[name])}, got {tuple(tensor.shape)}")
        if tensor.device != student_o.device:
            raise ValueError(f"{name}: expected device {student_o.device}, got {tensor.device}")
        if name != "target" and not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target: expected an integer dtype, got {target.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")


def _triton_obstacle(logits: list[Tensor]) -> str | None:
    """Why the kernel cannot take these logits, or None."""
    if not (logits[0].is_cuda or _INTERPRETED):
        return f"expected CUDA tensors (or TRITON_INTERPRET=1), got {logits[0].device}"
    if logits[0].shape[1] > MAX_CLASSES:
        return f"expected at most {MAX_CLASSES} classes, got {logits[0].shape[1]}"
    if any(row.dtype == torch.float64 for row in logits):
        return "expected logits of at most float32, got float64"
    return None
