"""Knowledge distillation of logits at hand, one view or several: what stands in for torch.nn.KLDivLoss."""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.loss import autograd
from kernels.loss.ccd import Options, by_triton, expect, rows_of


def kd_loss(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, target: Tensor | None = None, **options: Any
) -> Tensor:
    """T² · KL(softmax(teacher/T) ‖ softmax(student/T)), mean over all rows -> scalar, differentiable in `student`.

    With `target` alpha · CE + (1 − alpha) · that (Hinton, Vinyals, Dean, 2015); the formula is `reference.kd_loss`.
    `student`, `teacher`: logits (..., C) of the same shape, any floating dtypes; any number of views side by side.
    `target`: integer, the shape without C. `options`: of `kernels.loss.ccd.Options` alpha, label_smoothing, report,
    loss_scale and impl. One launch reads both once and writes loss and gradient; nothing as large as the logits is
    kept but the gradient. As exact, and as deterministic, as `ccd_loss`. Raises ValueError for what does not fit.
    """
    unknown = set(options) - {"alpha", "label_smoothing", "report", "loss_scale", "impl"}
    if unknown:
        raise ValueError(f"kd_loss: expected alpha, label_smoothing, report, loss_scale or impl, got {unknown.pop()}")
    asked = Options(temperature=temperature, **options)
    if student.ndim < 2 or student.numel() == 0:
        raise ValueError(f"student: expected logits (..., C), got shape {tuple(student.shape)}")
    expect("student", student, student.shape, student.device, floating=True)
    expect("teacher", teacher, student.shape, student.device, floating=True)
    if target is not None:
        expect("target", target, student.shape[:-1], student.device)
        if target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(f"target: expected an integer dtype, got {target.dtype}")
    alpha = 0.0 if target is None else asked.alpha
    if not by_triton(asked, student, teacher):
        dtype = torch.promote_types(student.dtype, torch.float32)
        smoothing = asked.label_smoothing
        found = reference.kd_loss(student.double(), teacher.double(), temperature, target, alpha, smoothing)
        return found.to(dtype)
    student, teacher = rows_of(student.flatten(0, -2)), rows_of(teacher.detach().flatten(0, -2))
    exact = asked.report == "exact" or student.dtype == torch.float64
    task = autograd.Task(
        teacher=[teacher],
        kind="dense",
        target=None if target is None else target.flatten().contiguous(),
        loss_scale=asked.loss_scale,
        temperature=float(temperature),
        hard=alpha / len(student),
        soft=(1 - alpha) * temperature**2 / len(student),
        smoothing=float(asked.label_smoothing) if target is not None else 0.0,
        report=2 if exact and asked.report != "none" else autograd.REPORTS.index(asked.report),
    )
    return autograd.apply([student], task)[0]
