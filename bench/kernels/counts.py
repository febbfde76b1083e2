"""A static model of the loss kernels: machine code counted by loops, and the time that an H100 should take for it.

No GPU takes part. The code comes from ahead-of-time compilation and `nvdisasm`. It is split into basic blocks; a loop
is a back edge to a block that dominates its start (a backward jump alone is none: cold code stands behind the end and
jumps back), and weighs its blocks with its trips. Blocks that only the last program runs count for nothing. The
predicted time is that of the slowest unit where all overlap fully; clock and reachable bandwidth are an H100's, assumed
and not measured by this project. A pair is one student's logit and its teacher's.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from bench.kernels import ahead
from bench.kernels.ahead import Case, Compiled
from kernels.loss import autograd
from kernels.loss.terms import METHODS

SMS, CLOCK_HZ, BYTES_PER_S = 132, 1.755e9, 3.0e12
LANES = {"issue": 128, "fma": 128, "alu": 64, "mufu": 16, "memory": 32}
"""Lanes per SM and clock of each unit."""

_MUFU = re.compile(r"MUFU|I2F|F2I|F2F|I2I|POPC|FRND")
_MEMORY = re.compile(r"LD[GSL]?$|ST[GSL]?$|LD[GSL]?\.|ST[GSL]?\.|SHFL|ATOM|RED|LDSM|LDGSTS")
_FMA = re.compile(r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2|DFMA|DADD|DMUL")
_NONE = re.compile(r"BAR|BRA|EXIT|BSSY|BSYNC|NOP|WARPSYNC|MEMBAR|ERRBAR|CCTL|DEPBAR|LDC|U[A-Z]|S2|CS2R|R2UR|CALL|RET")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)\s*(.*?);")


@dataclass(frozen=True)
class Counts:
    """Of one program, by warp; `per_unit` are issued instructions of each unit of `LANES`."""

    per_unit: dict[str, float]
    barriers: float
    loads: dict[int, float]
    """Global loads by their width in bits."""
    stores: dict[int, float]
    loops: int


@dataclass
class _Block:
    lines: list[tuple[str, str]]
    after: list[int]


def disassemble(cubin: bytes) -> str:
    """The machine code of a compiled kernel, by the `nvdisasm` beside Triton's assembler."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, "-c", file.name], check=True, capture_output=True, text=True).stdout


def count(text: str, trips: Sequence[float] = ()) -> Counts:
    """Count a kernel's machine code, its loops, in the order of their heads, with `trips`; 1 where none are left."""
    blocks = _blocks(text)
    weights = _weights(blocks, trips)
    units: dict[str, float] = defaultdict(float)
    loads: dict[int, float] = defaultdict(float)
    stores: dict[int, float] = defaultdict(float)
    barriers = 0.0
    for block, weight in zip(blocks, weights[0], strict=True):
        for name, _ in block.lines:
            units["issue"] += weight
            if unit := _unit(name):
                units[unit] += weight
            barriers += weight * name.startswith("BAR")
            if re.match(r"(LDG|STG)\b", name):
                bits = re.search(r"\.(U8|S8|U16|S16|64|128)\b", name)
                width = int(bits[1].lstrip("US")) if bits else 32
                (loads if name.startswith("LDG") else stores)[width] += weight
    return Counts(dict(units), barriers, dict(loads), dict(stores), weights[1])


def predicted(counts: Counts, warps: int, programs: float, moved: float) -> dict[str, float]:
    """Microseconds of each unit for so many programs, and of memory for `moved` bytes."""
    found = {
        unit: 1e6 * counts.per_unit.get(unit, 0.0) * warps * 32 * programs / (lanes * SMS * CLOCK_HZ)
        for unit, lanes in LANES.items()
    }
    return found | {"bytes": 1e6 * moved / BYTES_PER_S}


def trips_of(classes: int, loops: int) -> tuple[float, ...]:
    """Of the loops of `long_loss`: tiles and halves of the first pass, then of the next.

    Where all rows have one half, or none, the compiler makes no loop of it; of 2, 3 or 5 passes so many loops are left.
    """
    tile, half = autograd.TILE, autograd.TILE // 2
    halves = -(-(classes % tile) // half)
    return (classes // tile, halves) * (loops // 2) if loops in (4, 6, 10) else (classes // tile,) * loops


def per_pair(case: Case, found: Compiled) -> tuple[Counts, float]:
    """What a kernel's program issues, and its instructions per pair of logits."""
    text = disassemble(found.cubin)
    counts = count(text)
    if case.classes > autograd.ROW:
        counts = count(text, trips_of(case.classes, counts.loops))
    elif case.counted:
        counts = count(text, (PAIRS / 4096,))
    return counts, counts.per_unit["issue"] * found.warps * 32 / case.classes


def pair_bytes(classes: int, student: str, teacher: str) -> int:
    """Bytes that a pair of views must move through device memory: both students read, both gradients written, the
    teacher read once. Subspace codes are those of 512 directions at a KL of 0.05."""
    size = {"fp32": 4, "bf16": 2, "fp16": 2}
    encoded = {"int8": 16 + 2 * classes, "subspace": 688}
    return 4 * classes * size[student] + (encoded[teacher] if teacher in encoded else 2 * classes * size[teacher])


MODEL = (
    (1024, Case(90, 100, "bf16", "fp16")),
    (1024, Case(90, 1000, "bf16", "fp16")),
    (4096, Case(90, 1000, "bf16", "fp16", report="none")),
    (4096, Case(90, 1000, "bf16", "fp16")),
    (4096, Case(90, 1000, "bf16", "fp16", report="exact")),
    (4096, Case(90, 1000, "bf16", "int8")),
    (4096, Case(90, 1000, "fp32", "fp32")),
    (4096, Case(90, 8192, "bf16", "fp16")),
    (4096, Case(90, 21841, "bf16", "fp16", report="none")),
    (4096, Case(90, 21841, "bf16", "fp16")),
    (4096, Case(90, 21841, "bf16", "fp16", report="exact")),
    (4096, Case(90, 1000, "bf16", "fp16", counted=True)),
    *((4096, Case(90, 1000, "bf16", "fp16", method=method)) for method in METHODS[1:]),
    *((4096, Case(90, 21841, "bf16", "fp16", method=method)) for method in METHODS[1:]),
)
"""Pairs of views, and what they are."""
PAIRS = 4096
"""That a kernel counts, a loop of 4,096 at a time."""
_PRODUCT = 650e12  # operations per second of a float16 product


def model() -> list[dict]:
    """A row per kernel and size: counts per pair, and microseconds of each unit and of memory."""
    rows = []
    for batch, case in MODEL:
        found = ahead.compile_loss(case)
        counts, instructions = per_pair(case, found)
        times = predicted(counts, found.warps, 2 * batch, batch * pair_bytes(case.classes, case.student, case.teacher))
        kernel = ", ".join((case.student, case.teacher, case.report, case.method, *["counted"] * case.counted))
        rows.append(_row(f"{batch}×{case.classes}", kernel, found, counts))
        rows[-1] |= {"instructions / pair": round(instructions, 1), **_times(times)}
    dims, wide, batch, classes = 512, 144, 4096, 1000
    found = ahead.compile_unpack(90, dims, wide)
    counts = count(disassemble(found.cubin))
    times = predicted(counts, found.warps, batch, batch * (688 + 4 * (dims + 16)))
    rows.append(_row(f"{batch}×{dims}", "subspace codes to coefficients", found, counts))
    each = counts.per_unit["issue"] * found.warps * 32 / (2 * dims)
    rows[-1] |= {"instructions / pair": round(each, 1), **_times(times)}
    product = 1e6 * 2 * 2 * batch * (dims + 16) * (classes + 8) / _PRODUCT
    rows.append({"size": f"{batch}×{classes}", "kernel": "product at 650 TFLOPS", "predicted µs": round(product, 1)})
    return rows


def _row(size: str, kernel: str, found: Compiled, counts: Counts) -> dict:
    wide = {f"{bits}": round(number, 1) for bits, number in sorted(counts.loads.items())}
    return {
        "size": size,
        "kernel": kernel,
        "registers": found.registers,
        "spilled": found.spilled_bytes,
        "barriers": counts.barriers,
        "loads by bits": wide,
    }


def _times(times: dict[str, float]) -> dict:
    slowest = max(times, key=times.__getitem__)
    return {
        **{f"{unit} µs": round(time, 1) for unit, time in times.items()},
        "predicted µs": round(times[slowest], 1),
        "limit": slowest,
        "/ floor": round(times[slowest] / times["bytes"], 2),
    }


def _unit(name: str) -> str | None:
    if _MUFU.match(name):
        return "mufu"
    if _NONE.match(name):
        return None
    if _MEMORY.match(name):
        return "memory"
    return "fma" if _FMA.match(name) else "alu"


def _blocks(text: str) -> list[_Block]:
    """Basic blocks in the order of the text: they end before labels, and after branches and exits."""
    labels: dict[str, int] = {}
    blocks = [_Block([], [])]
    ends: list[tuple[str | None, bool]] = []  # of each block a jump, and whether it may fall through

    def close(jump: str | None, falls: bool) -> None:
        ends.append((jump, falls))
        blocks.append(_Block([], []))

    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            if blocks[-1].lines:
                close(None, True)
            labels[label[1]] = len(blocks) - 1
        elif found := _LINE.search(line):
            name, rest = found[1], found[2]
            blocks[-1].lines.append((name, rest))
            conditional = bool(re.search(r"\*/\s+@", line)) or "UP" in rest.split(",")[0] or "DIV" in name
            if name.startswith("BRA"):
                to = re.search(r"\((\.L_x_\d+)\)", rest)
                close(to[1] if to else None, conditional)
            elif name.startswith("EXIT"):
                close(None, conditional)
    ends.append((None, False))
    for number, (jump, falls) in enumerate(ends):
        if jump in labels:
            blocks[number].after.append(labels[jump])
        if falls and number + 1 < len(blocks):
            blocks[number].after.append(number + 1)
    return blocks


def _weights(blocks: list[_Block], trips: Sequence[float]) -> tuple[list[float], int]:
    """How often an ordinary program runs each block, and the number of loops."""
    reached = _reached(blocks, 0)
    dominators = {0: {0}} | {number: set(reached) for number in reached if number}
    before: dict[int, list[int]] = {number: [] for number in reached}
    for number in reached:
        for after in blocks[number].after:
            before[after].append(number)
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            found = set.intersection(*(dominators[other] for other in before[number])) | {number}
            changed |= found != dominators[number]
            dominators[number] = found
    weights = [float(number in reached) for number in range(len(blocks))]
    heads: dict[int, set[int]] = {}
    for number in reached:
        for head in set(blocks[number].after) & dominators[number]:
            body, todo = {head}, [number]
            while todo:
                if (block := todo.pop()) not in body:
                    body.add(block)
                    todo += before[block]
            heads.setdefault(head, set()).update(body)
    for head, often in zip(sorted(heads), trips, strict=False):
        for number in heads[head]:
            weights[number] *= often
    for number in _cold(blocks, dominators):
        weights[number] = 0.0
    return weights, len(heads)


def _reached(blocks: list[_Block], start: int) -> set[int]:
    found, todo = set(), [start]
    while todo:
        if (number := todo.pop()) not in found:
            found.add(number)
            todo += blocks[number].after
    return found


def _cold(blocks: list[_Block], dominators: dict[int, set[int]]) -> set[int]:
    """Blocks that only the last program runs: who reads what other programs wrote, and all that only follows it."""
    readers = {
        number for number in dominators if any(re.match(r"LDG\S*STRONG", name) for name, _ in blocks[number].lines)
    }
    return {number for number, above in dominators.items() if above & readers}
