"""The loss kernels compiled ahead of time, which takes no GPU: registers, spills, widths of loads, machine code."""

import contextlib
import io
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.loss import autograd, long, row, unpack
from kernels.loss.terms import METHODS

ARCHITECTURES = (80, 90, 100)
CLASSES = (10, 100, 257, 1000, 1001, 4096, 8192, 21841)
DTYPES = ("fp32", "bf16", "fp16")
FORMATS = ("fp32", "bf16", "fp16", "int8")
"""Of the teacher: dense of a dtype (fp16 codes and decoded subspace codes are fp16), or int8 codes."""

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel."""

    arch: int
    classes: int
    student: str
    teacher: str
    report: str = "plain"
    cosine: bool = False
    """w from the teacher's rows; else stored."""
    gradient: bool = True
    counted: bool = False
    """With a validity mask whose pairs the kernel counts."""
    masked: bool = False
    """With a validity mask and a count on the device, label smoothing, parts and T = 3: all that can be switched on."""
    padded: bool = False
    """Rows of students, gradients and dense teachers lie a multiple of 8 logits apart."""
    method: str = "kd"
    """Of `kernels.loss.terms.METHODS`."""


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilled_bytes: int
    warps: int
    load_bits: dict[str, int]
    """Widest load of student and teacher rows, in bits."""
    ptx: str
    cubin: bytes


def cases(classes: tuple[int, ...] = CLASSES) -> Iterator[Case]:
    """Every class of C, dtype and format on every architecture."""
    for arch in ARCHITECTURES:
        for count in classes:
            for student in DTYPES:
                for teacher in FORMATS:
                    yield Case(arch, count, student, teacher)
            yield Case(arch, count, "bf16", "int8", cosine=True, masked=True)
            yield Case(arch, count, "fp32", "fp32", gradient=False)
            yield Case(arch, count, "bf16", "fp16", report="none")
            yield Case(arch, count, "bf16", "fp16", report="exact")
            if count % 8:
                yield Case(arch, count, "bf16", "bf16", padded=True)


def expected_bits(case: Case) -> dict[str, int]:
    """The widest loads that the places of rows and the logits of a lane allow, 128 bits at most.

    One code reads either view, so that both views' rows have to lie well; int8 codes have the augmented view's logits
    right behind the original's. Two passes start at multiples of eight logits, wherever a row of another format does.
    """
    apart = -(-case.classes // 8) * 8 if case.padded else case.classes
    lane = max((1 << (case.classes - 1).bit_length()) // 32, 1)  # logits of a lane, of the one warp of a short row
    found = {}
    for name, dtype in (("student_o", case.student), ("teacher_o", case.teacher)):
        size = _BYTES[dtype]
        logits = math.gcd(16 + case.classes, 16 + 2 * case.classes) if dtype == "int8" else apart
        if case.classes > autograd.ROW and dtype != "int8":
            logits = apart = 8
        row = logits * size
        found[name] = 8 * min(row & -row, (apart & -apart) * size, lane * size, 16)
    return found


def compile_loss(case: Case) -> Compiled:
    """`row_loss` or `long_loss` as `kernels.loss.autograd` launches it, on rows that start at multiples of 16 bytes."""
    options = autograd.launch_options(case.classes)
    launch = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    kernel: Any = row.row_loss if case.classes <= autograd.ROW else long.long_loss
    int8 = case.teacher == "int8"
    apart = -(-case.classes // 8) * 8 if case.padded else case.classes
    stride = 16 + 2 * case.classes if int8 else apart
    constants: dict[str, Any] = {
        **dict.fromkeys(("STRIDE_STUDENT_O", "STRIDE_STUDENT_A", "STRIDE_GRAD_O", "STRIDE_GRAD_A"), apart),
        **dict.fromkeys(("READ_STUDENT", "WRITE"), apart),
        "STRIDE_TEACHER_O": stride,
        "STRIDE_TEACHER_A": stride,
        "STRIDE_HEADER": stride // 2,
        "OFFSET_O": 16 if int8 else 0,
        "OFFSET_A": 16 + case.classes if int8 else 0,
        "CLASSES": case.classes,
        "READ_TEACHER": case.classes if int8 else apart,
        "POWER": 0 if case.masked or case.method == "standardised" else 4,
        "METHOD": METHODS.index(case.method),
        "REPORT": autograd.REPORTS.index(case.report),
        "WEIGHTED": 1,
        "COSINE": case.cosine,
        "COUNTED": case.counted,
        "SMOOTH": case.masked,
        "COMPUTE": autograd.language(autograd.torch.float32),
        **options,
    }
    teacher = "*i8" if int8 else f"*{case.teacher}"
    types = {
        "student_o": f"*{case.student}",
        "student_a": f"*{case.student}",
        "teacher_o": teacher,
        "teacher_a": teacher,
        "header": "*i16" if int8 else None,
        "index": None,
        "target": "*i64",
        "weight": None if case.cosine else "*fp32",
        "valid": "*u8" if case.masked or case.counted else None,
        "count": "*i64" if case.masked else None,
        "loss_scale": "*fp32" if case.student == "fp16" else None,
        "grad_o": f"*{case.student}" if case.gradient else None,
        "grad_a": f"*{case.student}" if case.gradient else None,
        "parts": "*fp32" if case.masked or case.report == "exact" else None,
        "slots": "*i64" if case.report == "plain" else None,
        "loss": "*fp32",
        "batch": "i32",
        **dict.fromkeys(
            ("inverse_t", "hard", "soft", "same_weight", "smoothing", "unit", "alpha", "beta", "limit"), "fp32"
        ),
    }
    return compile_kernel(kernel, types, constants, case.arch, launch, ("student_o", "teacher_o"))


def compile_unpack(arch: int, dims: int, wide: int, tables: int = 2) -> Compiled:
    """Subspace codes to coefficients; of one table are those of version 1."""
    sizes = unpack.options(dims)
    options = {name: sizes.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    segment = -(-(wide + (dims - wide + 1) // 2) // 16) * 16
    constants = {"CODE_BYTES": 16 + 2 * segment, "WIDE": wide, "DIMS": dims, "TABLES": tables, **sizes}
    types = {"codes": "*u8", "rows": "*i64", "dither_keys": "*i64", "table": "*fp32", "out": "*fp16"}
    return compile_kernel(unpack.unpack, types, constants, arch, options, ("codes",))


def compile_kernel(
    kernel: Any, types: dict, constants: dict, arch: int, options: dict, watched: tuple[str, ...]
) -> Compiled:
    """A kernel of pointers aligned to 16 bytes; `types` of None are arguments that are not given."""
    names = kernel.arg_names
    constants = {**{name: None for name, kind in types.items() if kind is None}, **constants}
    signature = {name: types.get(name) or "constexpr" for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = cache, True
        with contextlib.redirect_stdout(log):
            compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled = (
        int(number)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
        for number in re.findall(pattern, log.getvalue())[:1]
    )
    pointers = [name for name in names if signature[name] != "constexpr"]
    return Compiled(
        registers=registers,
        spilled_bytes=spilled,
        warps=options["num_warps"],
        load_bits={name: _load_bits(ptx, pointers.index(name)) for name in watched},
        ptx=ptx,
        cubin=compiled.asm["cubin"],
    )


def _load_bits(ptx: str, argument: int) -> int:
    """Widest global load, in bits, from what an argument points to: its address followed through the registers.

    Of two views' arguments one is chosen by its place among the parameters, before it is loaded.
    """
    sums = re.findall(r"^\s*(?:@!?%\w+\s+)?(?:add|mad|mov|selp|shl)[.\w]*\s+(%r\w+), (.+);", ptx, re.MULTILINE)

    def reached(found: set[str]) -> set[str]:
        while more := {to for to, by in sums if to not in found and found & set(re.findall(r"%\w+", by))}:
            found = found | more
        return found

    places = reached(set(re.findall(rf"mov\.b\d+\s+(%\w+), \w+_param_{argument};", ptx)))
    loaded = re.findall(r"ld\.param\.b64\s+(%\w+), \[(%?\w+)\]", ptx)
    own = re.compile(rf"\w+_param_{argument}")
    addresses = reached({to for to, place in loaded if place in places or own.fullmatch(place)})
    loads = re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)\s[^\[]*\[\s*(%\w+)", ptx)
    return max((int(count or 1) * int(bits) for count, bits, address in loads if address in addresses), default=0)
