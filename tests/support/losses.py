"""Batches for the loss, and its value in float64."""

import torch

from kernels import reference

DEFAULTS = {"temperature": 4.0, "alpha": 0.5, "kd_weight": 2.0}


def random_case(classes: int, batch: int, *, scale: float = 3.0, offsets=(0, 0, 0, 0), **options) -> dict:
    """float32 logits [student_o, student_a, teacher_o, teacher_a] (B, C), target (B,), keyword arguments."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(4, batch, classes, generator=generator) * scale
    logits += torch.tensor(offsets)[:, None, None]
    target = torch.randint(classes, (batch,), generator=generator)
    return {"logits": list(logits), "target": target, "options": DEFAULTS | options}


def oracle(case: dict) -> dict[str, torch.Tensor]:
    """float64 autograd of the specification, on the very inputs the kernel gets."""
    logits = [row.to(torch.float64, copy=True) for row in case["logits"]]
    students = [row.requires_grad_() for row in logits[:2]]
    weight = case["options"].get("weight")
    options = case["options"] | {"weight": None if weight is None else weight.double()}
    options.pop("report", None)  # the specification has one form
    loss = reference.ccd_loss(*logits, case["target"], **options)
    grad_o, grad_a = torch.autograd.grad(loss, students)
    return {"loss": loss.detach(), "grad_o": grad_o, "grad_a": grad_a}
