"""Launching the fused loss: which kernel for which size, under autograd and as an operator of torch.compile."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.loss import passes_gpu
from kernels.loss.decode_gpu import decode_subspace

INTERPRETED = knobs.runtime.interpret  # what the decorators of the kernels saw

PARTS = ("total", "ce_o", "ce_a", "kl_o", "kl_a", "w", "agree_o", "agree_a")
"""What the kernels note of each pair: its share of the loss, the terms, and whether student and teacher agree."""

_WHOLE = 4096  # classes of a row that registers hold; beyond this two passes
_TILE = 1024  # logits of a program where rows are shorter
_VECTOR = 8  # logits per thread and access


@dataclass(frozen=True, eq=False)
class Task:
    """A loss, but for the students."""

    target: Tensor
    """Integer (B,)."""
    teacher: list[Tensor]
    """[original, augmented] (B, C), [rows u8 (B, row_bytes)], or rows, stream i64 (B,), basis, scale, beta, mean."""
    kind: str
    """dense, or a `Decoder.kind`."""
    weight: Tensor | None
    """(B,)."""
    valid: Tensor | None
    """Bool (B,)."""
    count: Tensor | None
    """Number of pairs as a device scalar; None: `hard` and `soft` know it, but for `counted`."""
    loss_scale: Tensor | None
    """Device scalar that the gradient is multiplied with before it is stored."""
    same_weight: float
    """w of every pair where `weight` is None and not `cosine`."""
    cosine: bool
    temperature: float
    hard: float
    """Factor of one row's CE."""
    soft: float
    """Factor of one row's KL."""
    smoothing: float
    wide: int = 0
    """As in `Decoder`."""
    unit: float = 1.0
    """As in `Decoder`."""
    counted: bool = False
    """Whether `hard` and `soft` are still to be divided by the number of valid pairs."""


def launch_options(classes: int) -> dict[str, Any]:
    """Block shape and warps by rule, not by tuning: eight logits of each tensor per thread."""
    block, rows = 1024, 1
    if classes <= _WHOLE:
        block = max(triton.next_power_of_2(classes), 16)
        rows = max(_TILE // block, 1)
    warps = block * rows // 256
    # Told nothing, the assembler spills some bytes rather than take registers that it has.
    return {
        "BLOCK": block,
        "ROWS": rows,
        "num_warps": warps,
        "maxnreg": min(2048 // warps, 255),
        "enable_fp_fusion": True,
    }


def forward(student_o: Tensor, student_a: Tensor, task: Task, grads: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Loss, scalar, and parts (8, B); fills `grads`, two tensors like the students, unless None."""
    batch, classes = student_o.shape
    compute = torch.float64 if student_o.dtype == torch.float64 else torch.float32
    parts = student_o.new_empty((len(PARTS), batch), dtype=compute)
    loss = student_o.new_empty((), dtype=compute)
    ticket = None
    if task.kind == "subspace":  # the product before the loss prepares a ticket, which spares `total_of`'s launch
        ticket = torch.empty((), dtype=torch.int32, device=student_o.device)
    with torch.cuda.device_of(student_o):
        _launch(student_o, student_a, task, _teacher(task, classes, ticket), grads, parts, loss, ticket)
        if ticket is None:
            total: Any = passes_gpu.total_of[(1,)]
            total(parts, loss, batch, num_warps=4)
    return loss, parts


def _teacher(task: Task, classes: int, ticket: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
    """Pointers of both views, aligned, the header of int8 rows, and where the views' logits start."""
    if task.kind == "dense":
        return task.teacher[0], task.teacher[1], None, (0, 0)
    rows = task.teacher[0]
    if task.kind == "fp16":
        rows = rows.view(torch.float16)
        return rows, rows, None, (0, classes)
    if task.kind == "int8":
        q = rows.view(torch.int8)
        return q, q, rows.view(torch.int16), (16, 16 + classes)
    stream, basis, scale, beta, mean = task.teacher[1:]
    logits = decode_subspace(rows, stream, basis, scale, beta, mean, task.wide, task.unit, ticket)
    return logits[:, 0], logits[:, 1], None, (0, 0)


def _launch(student_o, student_a, task: Task, teacher, grads, parts: Tensor, loss, ticket) -> None:
    """Fill `parts` and `grads`; with a ticket the last program adds up `loss`."""
    teacher_o, teacher_a, header, offsets = teacher
    batch, classes = student_o.shape
    grad_o, grad_a = (None, None) if grads is None else grads
    options = launch_options(classes)
    write = classes if grads is None else min(_room(grad_o, classes), _room(grad_a, classes))
    kernel: Any = passes_gpu.one_pass if classes <= _WHOLE else passes_gpu.two_pass
    kernel[(triton.cdiv(batch, options["ROWS"]),)](
        student_o=student_o,
        student_a=student_a,
        teacher_o=teacher_o,
        teacher_a=teacher_a,
        header=header,
        target=task.target,
        weight=task.weight,
        valid=None if task.valid is None else task.valid.view(torch.uint8),
        count=task.count,
        loss_scale=task.loss_scale,
        parts=parts,
        grad_o=grad_o,
        grad_a=grad_a,
        ticket=ticket,
        loss=loss,
        batch=batch,
        inverse_t=1 / task.temperature,
        hard=task.hard,
        soft=task.soft,
        same_weight=task.same_weight,
        smoothing=task.smoothing,
        STRIDE_STUDENT_O=student_o.stride(0),
        STRIDE_STUDENT_A=student_a.stride(0),
        STRIDE_TEACHER_O=teacher_o.stride(0),
        STRIDE_TEACHER_A=teacher_a.stride(0),
        STRIDE_HEADER=0 if header is None else header.stride(0),
        OFFSET_O=offsets[0],
        OFFSET_A=offsets[1],
        STRIDE_GRAD_O=0 if grad_o is None else grad_o.stride(0),
        STRIDE_GRAD_A=0 if grad_a is None else grad_a.stride(0),
        CLASSES=classes,
        READ_STUDENT=min(_room(student_o, classes), _room(student_a, classes)),
        READ_TEACHER=min(_room(teacher_o, classes), _room(teacher_a, classes)) if task.kind == "dense" else classes,
        WRITE=write,
        POWER=int(task.temperature) if task.temperature in (1, 2, 4) else 0,
        COSINE=task.cosine,
        SMOOTH=task.smoothing > 0,
        COUNTED=task.counted,
        COMPUTE=_language(parts.dtype),
        **options,
    )


def _room(rows: Tensor | None, classes: int) -> int:
    """Columns that may be touched: C, or the next multiple of 8 where every row has that much room of its own."""
    padded = -(-classes // _VECTOR) * _VECTOR
    if rows is None or rows.stride(0) < padded:
        return classes
    end = rows.storage_offset() + (len(rows) - 1) * rows.stride(0) + padded
    return padded if end * rows.element_size() <= rows.untyped_storage().nbytes() else classes


def _language(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def gradients(student_o: Tensor, student_a: Tensor, scaled: bool, wanted: bool = True) -> list[Tensor]:
    """Where gradients go, rows with as much room as the students'.

    float16 would flush those that have not met a loss scale yet, so they wait in float32.
    """
    made = []
    for row in (student_o, student_a):
        dtype = torch.float32 if row.dtype == torch.half and not scaled else row.dtype
        batch, classes = row.shape
        made.append(row.new_empty((batch, _room(row, classes)) if wanted else 0, dtype=dtype)[..., :classes])
    return made


class Loss(torch.autograd.Function):
    """The gradient is computed with the loss; backward only scales it, in place, and is empty for a factor of 1."""

    @staticmethod
    def forward(ctx, student_o: Tensor, student_a: Tensor, task: Task, inplace: bool):
        grads = [student_o, student_a] if inplace else gradients(student_o, student_a, task.loss_scale is not None)
        loss, parts = forward(student_o, student_a, task, grads)
        if inplace:  # whoever kept these logits for a backward of their own is told so
            torch.autograd.graph.increment_version([student_o, student_a])
        else:
            ctx.save_for_backward(student_o, student_a)
        ctx.grads, ctx.task, ctx.dtypes = grads, task, (student_o.dtype, student_a.dtype)
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Tensor, _):
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second time through a retained graph: the first gradient is no longer ours
            if not ctx.saved_tensors:
                raise RuntimeError("ccd_loss(inplace=True): expected one backward, got a second; its logits are gone")
            student_o, student_a = ctx.saved_tensors
            grads = gradients(student_o, student_a, ctx.task.loss_scale is not None)
            forward(student_o, student_a, ctx.task, grads)
        outs = [
            grad
            if grad.dtype == dtype
            else grad.new_empty((len(grad), grad.stride(0)), dtype=dtype)[:, : grad.shape[1]]
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        scale_gradients(grads, outs, d_loss, ctx.task.loss_scale)
        return *outs, None, None


def scale_gradients(grads: list[Tensor], outs: list[Tensor], incoming: Tensor, stored: Tensor | None) -> None:
    """outs = grads · incoming / stored."""
    size = len(grads[0]) * grads[0].stride(0)  # padding too
    compute = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    with torch.cuda.device_of(incoming):
        kernel: Any = passes_gpu.rescale[(min(triton.cdiv(size, 2048), 1024),)]
        kernel(
            grads[0],
            grads[1],
            outs[0],
            outs[1],
            incoming,
            stored,
            size,
            IN_PLACE=all(grad is out for grad, out in zip(grads, outs, strict=True)),
            COMPUTE=_language(compute),
            BLOCK=2048,
            num_warps=8,
        )


# The same for torch.compile, which sees through neither kernels nor what backward remembers. In eager mode an operator
# costs some 60 µs more per call than the function above.


@torch.library.custom_op("jda_distill::pair_loss", mutates_args=())
def pair_loss(
    student_o: Tensor,
    student_a: Tensor,
    target: Tensor,
    teacher: list[Tensor],
    kind: str,
    weight: Tensor | None,
    valid: Tensor | None,
    count: Tensor | None,
    loss_scale: Tensor | None,
    same_weight: float,
    cosine: bool,
    temperature: float,
    hard: float,
    soft: float,
    smoothing: float,
    wide: int,
    unit: float,
    counted: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, parts (8, B), and both gradients, empty unless `with_grad`; the rest are `Task`'s fields."""
    numbers = same_weight, cosine, temperature, hard, soft, smoothing, wide, unit, counted
    task = Task(target, teacher, kind, weight, valid, count, loss_scale, *numbers)
    grads = gradients(student_o, student_a, loss_scale is not None, with_grad)
    loss, parts = forward(student_o, student_a, task, grads if with_grad else None)
    return loss, parts, grads[0], grads[1]


@pair_loss.register_fake
def _(student_o, student_a, target, teacher, kind, weight, valid, count, loss_scale, *rest):
    compute = torch.float64 if student_o.dtype == torch.float64 else torch.float32
    loss = student_o.new_empty((), dtype=compute)
    parts = student_o.new_empty((len(PARTS), student_o.shape[0]), dtype=compute)
    return loss, parts, *gradients(student_o, student_a, loss_scale is not None, rest[-1])


def _remember(ctx, inputs, output):
    student_o, student_a, *_ = inputs
    ctx.with_grad, ctx.teachers = inputs[-1], len(inputs[3])
    ctx.dtypes = student_o.dtype, student_a.dtype
    ctx.save_for_backward(*output[2:], *(tensor for tensor in inputs[8:9] if tensor is not None))
    ctx.mark_non_differentiable(*output[1:])


def _scale(ctx, d_loss, *_):
    if not ctx.with_grad:
        raise RuntimeError("pair_loss: expected with_grad=True for a backward")
    grad_o, grad_a, *stored = ctx.saved_tensors
    factor = d_loss / stored[0] if stored else d_loss
    grads = [(grad * factor).to(dtype) for grad, dtype in zip((grad_o, grad_a), ctx.dtypes, strict=True)]
    return *grads, None, [None] * ctx.teachers, *[None] * 15


pair_loss.register_autograd(_scale, setup_context=_remember)


def apply(student_o: Tensor, student_a: Tensor, task: Task, inplace: bool) -> tuple[Tensor, Tensor]:
    """Loss and parts, differentiable in the students."""
    with_grad = torch.is_grad_enabled() and (student_o.requires_grad or student_a.requires_grad)
    if torch.compiler.is_compiling():
        return pair_loss(student_o, student_a, *(getattr(task, field.name) for field in fields(task)), with_grad)[:2]
    if with_grad:
        return Loss.apply(student_o, student_a, task, inplace)
    return forward(student_o, student_a, task, None)
