"""Knowledge distillation of logits at hand, one view or several: what stands in for torch.nn.KLDivLoss."""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.loss import autograd
from kernels.loss.ccd import Options, by_triton, expect, report_of, rows_of
from kernels.loss.terms import METHODS

_TAKEN = ("alpha", "dkd", "impl", "label_smoothing", "loss_scale", "method", "report")


def kd_loss(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, target: Tensor | None = None, **options: Any
) -> Tensor:
    """T² · KL(softmax(teacher/T) ‖ softmax(student/T)), mean over all rows -> scalar, differentiable in `student`.

    With `target` alpha · CE + (1 − alpha) · that (Hinton, Vinyals, Dean, 2015); the formula is `reference.kd_loss`.
    `student`, `teacher`: logits (..., C) of the same shape, any floating dtypes; any number of views side by side.
    `target`: integer, the shape without C. `options`: of `kernels.loss.ccd.Options` alpha, dkd, impl,
    label_smoothing, loss_scale, method and report; "reverse", "jsd", "dkd" or "standardised" take the place of KL,
    and dkd needs a target. One launch reads both once and writes loss and gradient; nothing as large as the logits is
    kept but the gradient. Beyond 8,192 classes "kd" and "dkd" read both twice, "reverse" and "jsd" three times and
    "standardised" four times. As exact, and as deterministic, as `ccd_loss`. Raises ValueError for what does not fit.
    """
    if unknown := set(options) - set(_TAKEN):
        raise ValueError(f"kd_loss: expected {', '.join(_TAKEN[:-1])} or {_TAKEN[-1]}, got {unknown.pop()}")
    asked = Options(temperature=temperature, **options)
    if student.ndim < 2 or student.numel() == 0:
        raise ValueError(f"student: expected logits (..., C), got shape {tuple(student.shape)}")
    expect("student", student, student.shape, student.device, floating=True)
    expect("teacher", teacher, student.shape, student.device, floating=True)
    if target is not None:
        expect("target", target, student.shape[:-1], student.device)
        if target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(f"target: expected an integer dtype, got {target.dtype}")
    if asked.method == "dkd" and (target is None or student.shape[-1] < 2):
        raise ValueError("dkd: expected a target and two classes or more")
    alpha = 0.0 if target is None else asked.alpha
    numbers = temperature, target, alpha, asked.label_smoothing, asked.method, asked.dkd
    if not by_triton(asked, student, teacher):
        dtype = torch.promote_types(student.dtype, torch.float32)
        return reference.kd_loss(student.double(), teacher.double(), *numbers).to(dtype)
    student, teacher = rows_of(student.flatten(0, -2)), rows_of(teacher.detach().flatten(0, -2))
    task = autograd.Task(
        teacher=[teacher],
        kind="dense",
        target=None if target is None else target.flatten().contiguous(),
        loss_scale=asked.loss_scale,
        temperature=float(temperature),
        hard=alpha / len(student),
        soft=(1 - alpha) * temperature**2 / len(student),
        smoothing=float(asked.label_smoothing) if target is not None else 0.0,
        alpha=float(asked.dkd[0]),
        beta=float(asked.dkd[1]),
        report=report_of(asked, student),
        method=METHODS.index(asked.method),
    )
    return autograd.apply([student], task)[0]
