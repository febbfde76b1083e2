"""`pipeline bench kernels`: the loss with its gradient, against eager PyTorch, torch.compile and Liger's kernels.

With a GPU: for each size and arm (`bench.kernels.arms`) the time of forward and backward by CUDA events, called and as
a CUDA graph of twenty, with the L2 cache warm and flushed, interleaved round by round; beside it the time that a copy
of the bytes that must move takes on this GPU (the floor), and peak memory beyond the logits.

Without one nothing is timed. What can be known is counted: operators that eager PyTorch launches, bytes per pair, what
every kernel compiles to for sm_80, 90 and 100 (`bench.kernels.ahead`), its instructions and the time that they should
take (`bench.kernels.counts`), and how far the loss is from float64. With --logits only what float16 adds to the KL of a
subspace code of these logits is found (`bench.kernels.lean`).
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import harness
from bench.kernels import ahead, counts, lean
from bench.kernels.arms import DIRECTIONS, OPTIONS, Arm, Batch, Step, arms
from bench.kernels.counts import pair_bytes
from kernels import reference
from pipeline.config import Bench
from pipeline.system import machine as machines
from pipeline.system.terminal import progress

SIZES = ((1024, 100), (1024, 1000), (4096, 1000), (4096, 21841))
FORMATS = ("dense", "int8", "subspace")
_CALLS = 20  # per arm and round
_FLUSH_BYTES = 256 << 20  # more than any L2 cache
_COPY_BYTES = 1 << 30
_AHEAD = (10, 1000, 21841)


def run(config: Bench) -> dict:
    """Run the benchmark, print its tables and write `config.json`."""
    machine = machines.describe()
    if config.logits:
        tables = {"float16 labels": lean.rows(config.logits)}
    elif torch.cuda.is_available():
        tables = {"time": _times(config.rounds or harness.ROUNDS)}
    else:
        tables = {"operators": _operators(), "error": _errors(), "compiled": _compiled(), "model": counts.model()}
    if not config.logits:
        tables["bytes"] = [
            {"classes": classes, "student": dtype, "teacher": form, "bytes": pair_bytes(classes, dtype, form)}
            for classes in sorted({size[1] for size in SIZES})
            for dtype in ahead.DTYPES
            for form in ("fp32", "bf16", *FORMATS[1:])
            if form != "subspace" or classes > DIRECTIONS
        ]
    found = harness.document(
        "kernels", machine=machine, options=vars(config), unit="pairs", reference="eager", arms={}, tables=tables
    )
    for title, rows in tables.items():
        if title == "compiled":
            title, rows = "compiled, the worst of each class of C", _worst(rows)
        harness.show_table(f"kernels: {title}", rows)
    if not torch.cuda.is_available():
        harness.console_out.print("no GPU: nothing was timed")
    if config.json:
        harness.write(config.json, found)
    return found


# --- without a GPU


class _Count(TorchDispatchMode):
    """Operators that would each launch a kernel, views do not, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        if not (func.is_view or "detach" in func.name()):
            self.launches += 1
            tensors = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, torch.Tensor)]
            self.bytes += sum(each.nbytes for each in tensors)
        return found


def _operators() -> list[dict]:
    """Of losses of a pair of views, students in bf16: launches, bytes per pair of logits that are moved, and those that
    wait for backward beyond the logits."""
    batch, classes = 8, 1000

    def kept(loss: Callable[..., torch.Tensor], *teacher: torch.Tensor) -> dict:
        students = [torch.randn(batch, classes).bfloat16().requires_grad_() for _ in range(2)]
        known = {each.untyped_storage().data_ptr() for each in (*students, *teacher)}
        waiting: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                waiting[storage.data_ptr()] = storage
            return tensor

        with _Count() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(*students, *teacher)
        with _Count() as backward:
            value.backward()
        pairs = 2 * batch * classes
        return {
            "forward": forward.launches,
            "backward": backward.launches,
            "bytes / pair": round((forward.bytes + backward.bytes) / pairs, 1),
            "kept / pair": round(sum(storage.nbytes() for storage in waiting.values()) / pairs, 1),
        }

    def ccd(o, a, t_o, t_a):
        o, a, t_o, t_a = o.float(), a.float(), t_o.float(), t_a.float()
        return reference.ccd_loss(o, a, t_o, t_a, torch.arange(batch), **OPTIONS)

    def kd(o, a, t_o, t_a):
        loss = torch.nn.KLDivLoss(reduction="batchmean")
        student, teacher = torch.cat([o, a]).float() / 4, torch.cat([t_o, t_a]).float() / 4
        return 16 * loss(student.log_softmax(1), teacher.softmax(1))

    teacher = [torch.randn(batch, classes).half() for _ in range(2)]
    ours = {"forward": 1, "backward": 1, "bytes / pair": 6.0, "kept / pair": 2.0}
    return [
        {"path": "eager PyTorch, CCD", **kept(ccd, *teacher)},
        {"path": "eager PyTorch, KLDivLoss", **kept(kd, *teacher)},
        {"path": "these kernels", **ours},
    ]


def _errors() -> list[dict]:
    """PyTorch's own float32 and bfloat16 paths against float64, which the kernels' tests are held against."""
    rows = []
    for classes in (100, 1000, 21841):
        logits = [row * 3 for row in torch.randn(4, 8, classes, generator=torch.Generator().manual_seed(0))]
        losses = {}
        for name in ("float64", "float32", "bfloat16"):
            z_o, z_a, t_o, t_a = (row.to(getattr(torch, name)) for row in logits)
            losses[name] = reference.ccd_loss(z_o, z_a, t_o, t_a, torch.arange(8), **OPTIONS).double()
        exact = losses.pop("float64")
        errors = {f"eager {name}": f"{abs(loss / exact - 1).item():.1e}" for name, loss in losses.items()}
        rows.append({"classes": classes, **errors})
    return rows


def _compiled() -> list[dict]:
    cases = [case for case in ahead.cases(_AHEAD) if case.student != "fp16" and case.teacher != "fp16"]
    rows = []
    with progress("compiling", len(cases), "kernels") as advance:
        for case in cases:
            found = ahead.compile_loss(case)
            bits = {f"{name} bits": bits for name, bits in found.load_bits.items()}
            rows.append(asdict(case) | {"registers": found.registers, "spilled": found.spilled_bytes, **bits})
            advance(1)
    return rows


def _worst(rows: list[dict]) -> list[dict]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((f"sm_{row['arch']}", row["classes"]), []).append(row)
    return [
        {
            "for": arch,
            "classes": classes,
            "kernels": len(mine),
            "registers": max(row["registers"] for row in mine),
            "spilled bytes": max(row["spilled"] for row in mine),
        }
        for (arch, classes), mine in groups.items()
    ]


# --- with a GPU


def _times(rounds: int) -> list[dict]:
    bandwidth = _copy_bandwidth()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    rows = []
    for batch, classes in SIZES:
        found = _arms(batch, classes)
        graphs = {name: _captured(arm.step) for name, arm in found.items()}
        cold = {name: _captured(arm.step, flush) for name, arm in found.items()}
        flushing = _captured(lambda: None, flush)
        times: dict[str, dict[str, list[float]]] = {name: {} for name in found}
        for _ in range(rounds):
            between = _timed(flushing)
            for name, arm in found.items():
                kinds = {"called": _timed(arm.step, _CALLS), "replayed": _timed(graphs[name])}
                kinds["replayed cold"] = _timed(cold[name]) - between
                for kind, milliseconds in kinds.items():
                    times[name].setdefault(kind, []).append(milliseconds / _CALLS)
        for name, kinds in times.items():
            known = {kind: mine for kind, mine in kinds.items() if not math.isnan(mine[0])}
            rows.append(
                {
                    "size": f"{batch}×{classes}",
                    "arm": name,
                    **{f"{kind} µs": 1e3 * statistics.median(mine) for kind, mine in known.items()},
                    "spread": max(max(mine) / min(mine) for mine in known.values()),
                    "floor µs": 1e6 * found[name].moved / bandwidth,
                    "peak / gradient": _peak(found[name].step) / (2 * batch * classes * 2),
                }
            )
    return rows


def _arms(batch: int, classes: int) -> dict[str, Arm]:
    return arms(Batch(batch, classes, "cuda"))


def _captured(step: Step, flush: torch.Tensor | None = None) -> Step | None:
    """Twenty steps as one replayed CUDA graph, each after a `flush` of the L2 cache; None where it cannot be captured.

    It is flushed by reading: dirty lines would be written back during the step.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(_CALLS):
                if flush is not None:
                    flush.max()
                step()
    except RuntimeError:  # a synchronisation inside, or graphs of its own
        torch.cuda.synchronize()
        return None
    return graph.replay


def _timed(step: Step | None, calls: int = 1) -> float:
    """Time of so many calls in ms; NaN without a step."""
    if step is None:
        return math.nan
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _copy_bandwidth() -> float:
    """Bytes per second, read and written, of PyTorch's copy."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (1e-3 * min(_timed(lambda: target.copy_(source)) for _ in range(5)))


def _peak(step: Step) -> int:
    """Bytes that a step allocates at most, beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
