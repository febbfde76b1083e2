"""Cosine Confidence Distillation for users: the arguments are checked here, and who computes is chosen."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.loss import autograd
from kernels.loss.decode import EncodedPairs
from kernels.loss.terms import METHODS
from kernels.reference import Mixed, Parts


@dataclass(frozen=True, eq=False)
class Options:
    """What `ccd_loss` takes beside logits, labels and targets. Raises ValueError for numbers out of range."""

    temperature: float = 4.0
    alpha: float = 0.5
    kd_weight: float = 2.0
    weight: Tensor | float | None = None
    """w, float (B,) or one number for all pairs; 1.0 makes it plain distillation (KD). None takes the weight of
    encoded pairs, else 1 + cosine of the teacher's raw logits."""
    label_smoothing: float = 0.0
    method: str = "kd"
    """What is asked of a row beside its cross-entropy: "kd", KL(p ‖ q) of the teacher's p and the student's q;
    "reverse", KL(q ‖ p); "jsd", half of both to their mean; "dkd", KL of the target and of the others apart;
    "standardised", KL of z-scores. `reference.SOFT` has the formulas and their sources."""
    dkd: tuple[float, float] = (1.0, 8.0)
    """Factors of dkd's two terms, its paper's alpha and beta."""
    mixed: Mixed | None = None
    """Whose labels the augmented samples have as well, and how much of their own; None: they are not mixed."""
    valid: Tensor | None = None
    """Bool (B,); other pairs are not read, and have no loss and no gradient."""
    count: Tensor | float | None = None
    """The number of pairs that means divide by, also as a device scalar; None: those that are valid. Of many GPUs each
    gives its share of a global mean with count = global number / GPUs, as DDP averages."""
    loss_scale: Tensor | None = None
    """The scalar on the device that the loss will be multiplied with (`GradScaler._scale`): a float16 student's
    gradient is then stored in float16, scaled, instead of waiting in float32."""
    inplace: bool = False
    """The gradients take the place of the students' logits, which nobody may read any more: neither a leaf nor a
    float16 without `loss_scale`, contiguous, for one backward, not under torch.compile."""
    report: str = "plain"
    """What the loss is good to, beside 5e-7 of itself. "plain": 2e-6 in a row's CE and 5e-7 in its KL, which of a loss
    from 0.3 up is 1e-5 or less. "exact": none, for losses that are small (alpha = 0 and a KL below 0.05, or students
    that are sure of all rows), at twice the arithmetic and one more launch. "none": the loss is NaN where kernels
    compute, and the gradient as good as ever."""
    parts: bool = False
    """Whether to return what the loss is made of as well."""
    temporaries: int = 64 << 20
    """Bytes that decoded subspace labels may take at a time; a batch of more goes by parts, a launch each."""
    impl: str = "auto"
    """"triton" (CUDA), "torch" (anywhere, computed in float64), or "auto", which takes Triton where it can. "triton"
    takes CPU tensors if TRITON_INTERPRET=1 was set before this module was imported."""

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {self.temperature}")
        for name in ("alpha", "label_smoothing"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
        if self.count is not None and not isinstance(self.count, Tensor) and not self.count > 0:
            raise ValueError(f"count: expected a number > 0, got {self.count}")
        if self.report not in ("none", "plain", "exact"):
            raise ValueError(f"report: expected none, plain or exact, got {self.report!r}")
        if self.parts and self.report == "none":
            raise ValueError("parts: expected a report, got none")
        if self.method not in METHODS:
            raise ValueError(f"method: expected {', '.join(METHODS)}, got {self.method!r}")
        if self.impl not in ("auto", "triton", "torch"):
            raise ValueError(f"impl: expected auto, triton or torch, got {self.impl!r}")


def ccd_loss(
    student_o: Tensor,
    student_a: Tensor,
    teacher_o: Tensor | EncodedPairs,
    teacher_a: Tensor | None = None,
    target: Tensor | None = None,
    **options: Any,
) -> Any:
    """Cosine Confidence Distillation of a batch of pairs of views; the formula is `reference.ccd_loss`.

        ccd_loss(student_o, student_a, teacher_o, teacher_a, target, **options)
        ccd_loss(student_o, student_a, encoded_pairs, target, **options)

    `student_*`, `teacher_*`: logits (B, C) of the original and the augmented views, any floating dtypes. The teacher
    may be one `EncodedPairs`, stored labels of both views: the target then follows it. `target`: integer (B,); a label
    outside [0, C) makes the loss NaN on the GPU and raises elsewhere. `options`: the fields of `Options`. int8 and fp16
    labels are decoded in registers, subspace ones by a product right before the loss, whose 4·B·C bytes live until the
    loss has read them; their rows are taken from the plane on the way.

    Returns a scalar, float32 (float64 for a float64 student), differentiable once in `student_*`; the gradients have
    the students' dtypes. With `parts` a tuple of it and `reference.Parts`, not differentiable. Against float64: loss
    to 5e-7 relative and what `Options.report` says, gradient to 1e-7 + 1e-6 of its largest entry and 2^-22 of the
    probabilities that cancel in it (before the rounding of a 16-bit dtype). A loss beyond 4e6 of a plain report is
    NaN. Bitwise deterministic; never synchronises. Raises ValueError for arguments that do not fit together.
    """
    asked = Options(**options)
    encoded = teacher_o if isinstance(teacher_o, EncodedPairs) else None
    if encoded is not None and target is None:
        teacher_a, target = None, teacher_a
    if target is None or (encoded is None) != isinstance(teacher_a, Tensor):
        raise ValueError("ccd_loss: expected teacher_o, teacher_a and target, or EncodedPairs and target")
    _check(student_o, student_a, target, asked)
    if asked.mixed is not None:
        return _mixed(student_o, student_a, teacher_o, teacher_a, target, asked, asked.mixed)
    if encoded is None:
        assert isinstance(teacher_o, Tensor) and isinstance(teacher_a, Tensor)
        for name, tensor in (("teacher_o", teacher_o), ("teacher_a", teacher_a)):
            expect(name, tensor, student_o.shape, student_o.device, floating=True)
        if by_triton(asked, student_o, student_a, teacher_o, teacher_a):
            return _by_kernel(student_o, student_a, target, [rows_of(teacher_o), rows_of(teacher_a)], asked)
        return _by_torch(student_o, student_a, teacher_o, teacher_a, target, asked)
    _check_encoded(encoded, student_o)
    if asked.weight is None and encoded.weight is not None:
        expect("weight", encoded.weight, target.shape, student_o.device, floating=True)
        asked = replace(asked, weight=encoded.weight)
    decoder = encoded.decoder
    if asked.weight is None and decoder.kind in ("subspace", "features"):
        raise ValueError("weight: expected the stored w, got None: that of decoded logits is another")
    if decoder.kind == "features":  # no kernel knows their head
        teacher_o, teacher_a = encoded.logits().unbind(1)
        return ccd_loss(student_o, student_a, teacher_o, teacher_a, target, **{**options, "weight": asked.weight})
    if not by_triton(asked, student_o, student_a):
        teacher_o, teacher_a = encoded.logits().unbind(1)
        return _by_torch(student_o, student_a, teacher_o, teacher_a, target, asked)
    if encoded.made is not None:
        torch.cuda.current_stream(student_o.device).wait_event(encoded.ready)
        return _by_kernel(student_o, student_a, target, list(encoded.made.unbind(1)), asked, encoded)
    teacher = [encoded.codes.contiguous()]
    if decoder.kind == "subspace":
        teacher += [encoded.dither_keys.contiguous(), decoder.lean.table, decoder.lean.basis]
    return _by_kernel(student_o, student_a, target, teacher, asked, encoded)


def _mixed(student_o, student_a, teacher_o, teacher_a, target: Tensor, asked: Options, mixed: Mixed) -> Any:
    """The loss of samples that have two labels each: what it has beyond that of their own is in two logits."""
    wide = student_a.to(torch.promote_types(student_a.dtype, torch.float32))
    labels = target if asked.valid is None else target.where(asked.valid, 0)
    beyond = reference.beyond_own(wide, labels, mixed, asked.label_smoothing)  # before gradients take the logits' place
    count = asked.count
    if asked.valid is not None:
        beyond, count = beyond.where(asked.valid, 0), asked.valid.sum().clamp(min=1) if count is None else count
    hard, _ = reference.coefficients(asked.temperature, asked.alpha, asked.kd_weight)
    more = hard / 2 * beyond.sum() / (len(target) if count is None else count)
    options = {field.name: getattr(asked, field.name) for field in fields(asked)} | {"mixed": None}
    found = ccd_loss(student_o, student_a, teacher_o, teacher_a, target, **options)
    if not asked.parts:
        return found + more
    loss, parts = found
    return loss + more, parts._replace(ce_a=parts.ce_a + beyond.detach())


def _check_encoded(encoded: EncodedPairs, student: Tensor) -> None:
    batch, classes = student.shape
    if encoded.decoder.classes != classes:
        raise ValueError(f"decoder: expected {classes} classes, got {encoded.decoder.classes}")
    device = student.device
    if encoded.rows is None:
        expect("codes", encoded.codes, (batch, encoded.codes.shape[-1]), device, dtype=torch.uint8)
    else:
        expect("codes", encoded.codes, encoded.codes.shape, device, dtype=torch.uint8)
        expect("rows", encoded.rows, (batch,), device, dtype=torch.int64)
    expect("dither_keys", encoded.dither_keys, (batch,), device, dtype=torch.int64)


def _by_torch(student_o, student_a, teacher_o, teacher_a, target: Tensor, options: Options):
    logits = student_o.double(), student_a.double(), teacher_o.double(), teacher_a.double()
    weight = options.weight.double() if isinstance(options.weight, Tensor) else options.weight
    numbers = {
        "temperature": options.temperature,
        "weight": weight,
        "label_smoothing": options.label_smoothing,
        "valid": options.valid,
        "method": options.method,
        "dkd": options.dkd,
    }
    loss = reference.ccd_loss(
        *logits, target, alpha=options.alpha, kd_weight=options.kd_weight, count=options.count, **numbers
    )
    dtype = torch.promote_types(student_o.dtype, torch.float32)
    loss = loss.to(dtype)
    if not options.parts:
        return loss
    with torch.no_grad():
        return loss, Parts(*(part.to(dtype) for part in reference.ccd_parts(*logits, target, **numbers)))


def _by_kernel(student_o, student_a, target, teacher: list[Tensor], options: Options, encoded=None):
    hard, soft = (
        factor / 2 for factor in reference.coefficients(options.temperature, options.alpha, options.kd_weight)
    )
    count = options.count
    counted = count is None and options.valid is not None
    if count is None and not counted:
        count = len(target)
    if count is not None and not isinstance(count, Tensor):
        hard, soft = hard / count, soft / count
    weight, cosine = options.weight, options.weight is None
    if encoded is None:
        teacher = _alike(*teacher)
    stored = None if encoded is None or encoded.made is not None else encoded
    task = autograd.Task(
        teacher=teacher,
        kind="dense" if stored is None else stored.decoder.kind,
        target=target.contiguous(),
        rows=None if stored is None or stored.rows is None else stored.rows.contiguous(),
        weight=weight.contiguous() if isinstance(weight, Tensor) else None,
        valid=None if options.valid is None else options.valid.contiguous(),
        count=count if isinstance(count, Tensor) else None,
        loss_scale=options.loss_scale,
        same_weight=1.0 if weight is None or isinstance(weight, Tensor) else float(weight),
        temperature=float(options.temperature),
        hard=hard,
        soft=soft,
        smoothing=float(options.label_smoothing),
        unit=encoded.decoder.lean.unit if encoded is not None and encoded.decoder.kind == "subspace" else 1.0,
        wide=0 if encoded is None else encoded.decoder.wide,
        cosine=cosine,
        counted=counted,
        temporaries=options.temporaries,
        method=METHODS.index(options.method),
        alpha=float(options.dkd[0]),
        beta=float(options.dkd[1]),
        report=report_of(options, student_o),
        parts=options.parts,
    )
    students = _alike(student_o, student_a)
    loss, noted = autograd.apply([rows_of(student) for student in students], task, options.inplace)
    if not options.parts:
        return loss
    return loss, Parts(noted[2], noted[3], noted[4], noted[5], noted[8], noted[6], noted[7])


def report_of(options: Options, student: Tensor) -> int:
    """Index of `autograd.REPORTS`; float64 has no use for the plain forms."""
    wide = student.dtype == torch.float64 and options.report == "plain"
    return autograd.REPORTS.index("exact" if wide else options.report)


def _alike(one: Tensor, other: Tensor) -> list[Tensor]:
    """Both views in one dtype, as a kernel takes them."""
    if one.dtype == other.dtype:
        return [one, other]
    dtype = torch.promote_types(one.dtype, other.dtype)
    return [one.to(dtype), other.to(dtype)]


def rows_of(logits: Tensor) -> Tensor:
    """Logits whose classes lie side by side; rows may be any distance apart."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def by_triton(options: Options, *logits: Tensor) -> bool:
    """Whether the kernels compute. Raises ValueError if they are asked for and cannot."""
    obstacle = None
    if not (logits[0].is_cuda or autograd.INTERPRETED):
        obstacle = f"expected CUDA tensors (or TRITON_INTERPRET=1), got {logits[0].device}"
    elif options.impl == "auto" and (any(row.dtype == torch.float64 for row in logits) or not logits[0].is_cuda):
        obstacle = "auto computes in float64 here"
    if options.impl == "triton" and obstacle:
        raise ValueError(f'impl="triton": {obstacle}')
    if options.impl == "torch" or obstacle:
        if options.inplace:
            raise ValueError(f"inplace: expected the kernel, got {options.impl} on {logits[0].device}")
        return False
    return True


def _check(student_o: Tensor, student_a: Tensor, target: Tensor, options: Options) -> None:
    if student_o.ndim != 2 or student_o.numel() == 0:
        raise ValueError(f"student_o: expected logits (B, C), got shape {tuple(student_o.shape)}")
    device, batch = student_o.device, student_o.shape[:1]
    if options.method == "dkd" and student_o.shape[1] < 2:
        raise ValueError("dkd: expected two classes or more, got one")
    expect("student_o", student_o, student_o.shape, device, floating=True)
    expect("student_a", student_a, student_o.shape, device, floating=True)
    expect("target", target, batch, device)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target: expected an integer dtype, got {target.dtype}")
    if isinstance(options.weight, Tensor):
        expect("weight", options.weight, batch, device, floating=True)
    if options.mixed is not None:
        expect("mixed.partner_target", options.mixed.partner_target, batch, device)
        expect("mixed.ratio", options.mixed.ratio, batch, device, floating=True)
    if options.valid is not None:
        expect("valid", options.valid, batch, device, dtype=torch.bool)
    if isinstance(options.count, Tensor):
        expect("count", options.count, (), device)
    if options.loss_scale is not None:
        expect("loss_scale", options.loss_scale, options.loss_scale.shape, device, dtype=torch.float32)
        if options.loss_scale.numel() != 1:
            raise ValueError(f"loss_scale: expected one number, got shape {tuple(options.loss_scale.shape)}")
    if options.inplace:
        _check_inplace(student_o, student_a, options)


def _check_inplace(student_o: Tensor, student_a: Tensor, options: Options) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("inplace: expected eager mode, got torch.compile, which reuses memory by itself")
    spans = []
    for name, row in (("student_o", student_o), ("student_a", student_a)):
        if row.is_leaf and row.requires_grad:
            raise ValueError(f"inplace: expected {name} to be computed, got a leaf that requires grad")
        if not row.is_contiguous():
            raise ValueError(f"inplace: expected {name} contiguous, got strides {row.stride()}")
        if row.dtype == torch.half and options.loss_scale is None:
            raise ValueError(f"inplace: expected a loss_scale with the float16 {name}, got None")
        spans.append((row.data_ptr(), row.data_ptr() + row.numel() * row.element_size()))
    (start, end), (other, other_end) = spans
    if start < other_end and other < end:
        raise ValueError("inplace: expected students apart, got logits that overlap")


def expect(name: str, tensor: Tensor, shape, device, *, dtype=None, floating: bool = False) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    if floating and not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
