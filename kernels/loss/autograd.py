"""Launching the loss: which kernel for which size, under autograd and as an operator of torch.compile."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.loss import finish, long, row
from kernels.loss.terms import METHODS
from kernels.loss.unpack import Lean, bytes_of_pair, subspace_logits

INTERPRETED = knobs.runtime.interpret  # what the decorators of the kernels saw

REPORTS = ("none", "plain", "exact")
PARTS = 9
"""Rows of what the kernels note: share of the loss, CE, KL and agreement, of both views each, and w."""

ROW = 8192  # classes of a row that registers hold; beyond this two passes
TILE = 4096  # logits of a tile of the two passes
COUNTED = 8192  # pairs whose number every program finds by itself
_VECTOR = 8  # logits of an access


@dataclass(frozen=True, eq=False)
class Task:
    """A loss, but for the students."""

    teacher: list[Tensor]
    """(B, C) of each view; [codes u8 (N, row_bytes)]; or codes, dither keys i64 (B,), table and basis of a `Lean`."""
    kind: str
    """dense, or a `Decoder.kind`."""
    target: Tensor | None = None
    """Integer (B,); None: no hard term."""
    rows: Tensor | None = None
    """i64 (B,), the codes of the pairs; None: all in order."""
    weight: Tensor | None = None
    """(B,)."""
    valid: Tensor | None = None
    """Bool (B,)."""
    count: Tensor | None = None
    """Number of pairs as a device scalar; None: `hard` and `soft` know it."""
    loss_scale: Tensor | None = None
    """Device scalar that the gradient is multiplied with before it is stored."""
    same_weight: float = 1.0
    """w of every pair where `weight` is None and not `cosine`."""
    temperature: float = 1.0
    hard: float = 0.0
    """Factor of one row's CE."""
    soft: float = 0.0
    """Factor of one row's KL."""
    smoothing: float = 0.0
    unit: float = 1.0
    """As in `Lean`."""
    alpha: float = 1.0
    beta: float = 1.0
    """Of dkd."""
    wide: int = 0
    """As in `Decoder`."""
    cosine: bool = False
    report: int = 1
    """Index of `REPORTS`."""
    parts: bool = False
    method: int = 0
    """Index of `terms.METHODS`."""
    counted: bool = False
    """Whether the number of pairs is that of the valid ones, which nobody has counted."""
    temporaries: int = 64 << 20
    """Bytes that decoded labels may take at a time."""

    def of(self, span: slice) -> "Task":
        """That of some of the pairs; only subspace codes go by parts."""
        if self.kind != "subspace":
            return self
        codes, dither_keys, *code = self.teacher
        codes = codes if self.rows is not None else codes[span]
        given = {name: getattr(self, name) for name in ("target", "rows", "weight", "valid")}
        given = {name: value if value is None else value[span] for name, value in given.items()}
        return replace(self, teacher=[codes, dither_keys[span], *code], **given)

    def flat(self) -> tuple[list[Tensor], str, list[Tensor | None], list[float], list[int]]:
        """What an operator's schema can hold."""
        tensors = [self.target, self.rows, self.weight, self.valid, self.count, self.loss_scale]
        numbers = [self.same_weight, self.temperature, self.hard, self.soft, self.smoothing, self.unit]
        numbers += [self.alpha, self.beta]
        whole = [self.wide, self.cosine, self.report, self.parts, self.method, self.counted, self.temporaries]
        return self.teacher, self.kind, tensors, numbers, whole


def launch_options(classes: int) -> dict[str, Any]:
    """Tile and warps by rule, not by tuning: 32 logits a lane of a whole row, 16 of a long one."""
    block = max(triton.next_power_of_2(classes), 16) if classes <= ROW else TILE
    warps = max(block // 1024, 1) if classes <= ROW else 8
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


_slots: dict[tuple, Tensor] = {}


def slots_of(device: torch.device) -> Tensor:
    """Ticket and sums of the stream in use, all zero between launches."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # a graph may run beside other work
        return torch.zeros(finish.SLOTS + 1, dtype=torch.int64, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if key not in _slots:
        _slots[key] = torch.zeros(finish.SLOTS + 1, dtype=torch.int64, device=device)
    return _slots[key]


def forward(students: list[Tensor], task: Task, grads: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Loss, scalar, and parts (PARTS, B) or empty; fills `grads`, like the students, unless None."""
    batch = len(students[0])
    compute = torch.float64 if students[0].dtype == torch.float64 else torch.float32
    exact, plain = (REPORTS[task.report] == name for name in ("exact", "plain"))
    parts = students[0].new_empty((PARTS, batch) if task.parts or exact else 0, dtype=compute)
    spans = _spans(task, batch)
    losses = students[0].new_empty((len(spans), 4), dtype=compute)[:, 0]  # each at a multiple of 16 bytes
    if task.counted and task.valid is not None and (len(spans) > 1 or batch > COUNTED or task.valid.data_ptr() % 16):
        task = replace(task, counted=False, count=task.valid.sum())
    with torch.cuda.device_of(students[0]):
        slots = slots_of(losses.device) if plain else None
        for span, loss in zip(spans, losses, strict=True):
            rows = [row[span] for row in students]
            mine = grads if grads is None else [grad[span] for grad in grads]
            _launch(rows, task.of(span), mine, parts[..., span], loss, batch, slots)
        if exact:
            total: Any = finish.total_of[(1,)]
            total(parts, losses, len(students) * batch, num_warps=4)
    return (losses[0] if exact or len(spans) == 1 else losses.sum()), parts


def _spans(task: Task, batch: int) -> list[slice]:
    """Of the batch: one, unless its decoded labels take too much. Starts keep rows at multiples of 16 bytes."""
    pairs = batch
    if task.kind == "subspace":
        pairs = max(task.temporaries // bytes_of_pair(Lean(task.teacher[2], task.teacher[3], task.unit)) // 16 * 16, 16)
    return [slice(start, min(start + pairs, batch)) for start in range(0, batch, pairs)]


def _teacher(task: Task, classes: int) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int], Tensor | None]:
    """Pointers of both views, aligned, the header of int8 codes, where the views' logits start, and the rows' index."""
    if task.kind == "dense":
        return task.teacher[0], task.teacher[-1], None, (0, 0), None
    codes = task.teacher[0]
    if task.kind == "fp16":
        logits = codes.view(torch.float16)
        return logits, logits, None, (0, classes), task.rows
    if task.kind == "int8":
        q = codes.view(torch.int8)
        return q, q, codes.view(torch.int16), (16, 16 + classes), task.rows
    _, dither_keys, table, basis = task.teacher
    logits = subspace_logits(codes, task.rows, dither_keys, Lean(table, basis, task.unit), task.wide)
    return logits[:, 0], logits[:, 1], None, (0, 0), None


def _launch(
    students: list[Tensor], task: Task, grads, parts: Tensor, loss: Tensor, batch: int, slots: Tensor | None
) -> None:
    """`batch`: of the whole loss, of which these may be a part."""
    teacher_o, teacher_a, header, offsets, index = _teacher(task, students[0].shape[1])
    student_o, student_a = students[0], students[-1]
    rows, classes = student_o.shape
    grad_o, grad_a = (None, None) if grads is None else (grads[0], grads[-1])
    kernel: Any = row.row_loss if classes <= ROW else long.long_loss
    kernel[(rows, len(students))](
        student_o=student_o,
        student_a=student_a,
        teacher_o=teacher_o,
        teacher_a=teacher_a,
        header=header,
        index=index,
        target=task.target,
        weight=task.weight,
        valid=None if task.valid is None else task.valid.view(torch.uint8),
        count=task.count,
        loss_scale=task.loss_scale,
        grad_o=grad_o,
        grad_a=grad_a,
        parts=parts if parts.numel() else None,
        slots=slots,
        loss=loss,
        batch=batch,
        inverse_t=1 / task.temperature,
        hard=task.hard,
        soft=task.soft,
        same_weight=task.same_weight,
        smoothing=task.smoothing,
        unit=task.unit,
        alpha=task.alpha,
        beta=task.beta,
        limit=finish.LARGEST / (rows * len(students)),
        STRIDE_STUDENT_O=student_o.stride(0),
        STRIDE_STUDENT_A=student_a.stride(0),
        STRIDE_TEACHER_O=teacher_o.stride(0),
        STRIDE_TEACHER_A=teacher_a.stride(0),
        OFFSET_O=offsets[0],
        OFFSET_A=offsets[1],
        STRIDE_HEADER=0 if header is None else header.stride(0),
        STRIDE_GRAD_O=0 if grad_o is None else grad_o.stride(0),
        STRIDE_GRAD_A=0 if grad_a is None else grad_a.stride(0),
        CLASSES=classes,
        READ_STUDENT=min(_room(student_o, classes), _room(student_a, classes)),
        READ_TEACHER=min(_room(teacher_o, classes), _room(teacher_a, classes)) if task.kind == "dense" else classes,
        WRITE=classes if grad_o is None else min(_room(grad_o, classes), _room(grad_a, classes)),
        POWER=int(task.temperature) if task.temperature in (1, 2, 4) and METHODS[task.method] != "standardised" else 0,
        METHOD=task.method,
        REPORT=task.report,
        WEIGHTED=len(students) - 1,
        COSINE=task.cosine,
        COUNTED=task.counted,
        SMOOTH=task.smoothing > 0,
        COMPUTE=language(loss.dtype),
        **launch_options(classes),
    )


def _room(rows: Tensor | None, classes: int) -> int:
    """Columns that may be touched: C, or the next multiple of 8 where every row has that much room of its own."""
    padded = -(-classes // _VECTOR) * _VECTOR
    if rows is None or rows.stride(0) < padded:
        return classes
    end = rows.storage_offset() + (len(rows) - 1) * rows.stride(0) + padded
    return padded if end * rows.element_size() <= rows.untyped_storage().nbytes() else classes


def language(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def gradients(students: list[Tensor], scaled: bool, wanted: bool = True) -> list[Tensor]:
    """Where gradients go, rows with as much room as the students'.

    float16 would flush those that have not met a loss scale yet, so they wait in float32.
    """
    made = []
    for student in students:
        dtype = torch.float32 if student.dtype == torch.half and not scaled else student.dtype
        batch, classes = student.shape
        made.append(student.new_empty((batch, _room(student, classes)) if wanted else 0, dtype=dtype)[..., :classes])
    return made


class Loss(torch.autograd.Function):
    """The gradient is computed with the loss; backward only scales it, in place, and is empty for a factor of 1."""

    @staticmethod
    def forward(ctx, task: Task, inplace: bool, *students: Tensor):
        mine = list(students)
        grads = mine if inplace else gradients(mine, task.loss_scale is not None)
        loss, parts = forward(mine, task, grads)
        if inplace:  # whoever kept these logits for a backward of their own is told so
            torch.autograd.graph.increment_version(mine)
        else:
            ctx.save_for_backward(*students)
        ctx.grads, ctx.task, ctx.dtypes = grads, task, [student.dtype for student in students]
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Tensor, _):
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second time through a retained graph: the first gradient is no longer ours
            if not ctx.saved_tensors:
                raise RuntimeError("ccd_loss(inplace=True): expected one backward, got a second; its logits are gone")
            students = list(ctx.saved_tensors)
            grads = gradients(students, ctx.task.loss_scale is not None)
            forward(students, ctx.task, grads)
        outs = [
            grad
            if grad.dtype == dtype
            else grad.new_empty((len(grad), grad.stride(0)), dtype=dtype)[:, : grad.shape[1]]
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        scale_gradients(grads, outs, d_loss, ctx.task.loss_scale)
        return None, None, *outs


def scale_gradients(grads: list[Tensor], outs: list[Tensor], incoming: Tensor, stored: Tensor | None) -> None:
    """outs = grads · incoming / stored."""
    strides = [rows.stride(0) for rows in (grads[0], grads[-1], outs[0], outs[-1])]
    rows, width = grads[0].shape
    if len(set(strides)) == 1 and all(_room(tensor, width) == strides[0] for tensor in (*grads, *outs)):
        rows, width, strides = 1, rows * strides[0], [0] * 4  # side by side, padding too
    block = min(triton.next_power_of_2(width), 2048)
    programs = min(rows * triton.cdiv(width, block), 1024)
    compute = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    with torch.cuda.device_of(incoming):
        kernel: Any = finish.rescale[(programs, len(grads))]
        kernel(
            grads[0],
            grads[-1],
            outs[0],
            outs[-1],
            incoming,
            stored,
            rows,
            width,
            *strides,
            IN_PLACE=all(grad is out for grad, out in zip(grads, outs, strict=True)),
            COMPUTE=language(compute),
            BLOCK=block,
            num_warps=8,
        )


# The same for torch.compile, which sees through neither kernels nor what backward remembers. In eager mode an operator
# costs some 60 µs more per call than the function above.


@torch.library.custom_op("jda_distill::distillation_loss", mutates_args=())
def distillation_loss(
    students: list[Tensor],
    teacher: list[Tensor],
    kind: str,
    tensors: list[Tensor | None],
    numbers: list[float],
    whole: list[int],
    with_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, parts, and the gradients, empty unless `with_grad`; the rest is `Task.flat`."""
    target, rows, weight, valid, count, loss_scale = tensors
    same_weight, temperature, hard, soft, smoothing, unit, alpha, beta = numbers
    wide, cosine, report, noted, method, counted, temporaries = whole
    optional = target, rows, weight, valid, count, loss_scale
    factors = same_weight, temperature, hard, soft, smoothing, unit, alpha, beta
    switches = wide, bool(cosine), report, bool(noted), method, bool(counted), temporaries
    task = Task(teacher, kind, *optional, *factors, *switches)
    grads = gradients(students, task.loss_scale is not None, with_grad)
    loss, parts = forward(students, task, grads if with_grad else None)
    return loss, parts, grads


@distillation_loss.register_fake
def _(students, teacher, kind, tensors, numbers, whole, with_grad):
    compute = torch.float64 if students[0].dtype == torch.float64 else torch.float32
    loss = students[0].new_empty((), dtype=compute)
    noted = whole[3] or REPORTS[whole[2]] == "exact"
    parts = students[0].new_empty((PARTS, students[0].shape[0]) if noted else 0, dtype=compute)
    return loss, parts, gradients(students, tensors[-1] is not None, with_grad)


def _remember(ctx, inputs, output):
    students, ctx.with_grad = inputs[0], inputs[-1]
    ctx.dtypes, ctx.teachers, ctx.scaled = [student.dtype for student in students], len(inputs[1]), inputs[3][-1]
    # A list with a None in it is nothing that autograd looks into.
    ctx.optional = [None] * len(inputs[3]) if all(tensor is not None for tensor in inputs[3]) else None
    ctx.save_for_backward(*output[2], *([inputs[3][-1]] if ctx.scaled is not None else []))
    ctx.scaled = ctx.scaled is not None
    ctx.mark_non_differentiable(output[1], *output[2])


def _scale(ctx, d_loss, *_):
    if not ctx.with_grad:
        raise RuntimeError("distillation_loss: expected with_grad=True for a backward")
    grads = ctx.saved_tensors[: len(ctx.dtypes)]
    factor = d_loss / ctx.saved_tensors[-1] if ctx.scaled else d_loss
    outs = [(grad * factor).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
    return outs, [None] * ctx.teachers, None, ctx.optional, None, None, None


distillation_loss.register_autograd(_scale, setup_context=_remember)


def apply(students: list[Tensor], task: Task, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """Loss and parts, differentiable in the students."""
    with_grad = torch.is_grad_enabled() and any(student.requires_grad for student in students)
    if torch.compiler.is_compiling():
        return distillation_loss(students, *task.flat(), with_grad)[:2]
    if with_grad:
        return Loss.apply(task, inplace, *students)  # pyright: ignore[reportReturnType]
    return forward(students, task, None)
