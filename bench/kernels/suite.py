"""`pipeline bench kernels`: the loss with its gradient, against eager PyTorch, torch.compile and Liger's kernels.

With a GPU: for each size, dtype and format the time of forward and backward by CUDA events, called and replayed as a
CUDA graph, with the L2 cache warm and flushed, interleaved round by round; beside it the bytes that must move, and the
time that a copy of so many bytes takes on this GPU (the floor); peak memory beyond the logits.

Without one nothing is timed. What can be known is counted: operators that eager PyTorch launches, bytes per pair, what
every kernel compiles to for sm_80, 90 and 100 (`bench.kernels.ahead`), its instructions and the time that they should
take (`bench.kernels.counts`), and how far the loss is from float64.
"""

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness
from bench.kernels import ahead, counts
from bench.kernels.counts import pair_bytes
from cache import codec as codecs
from kernels import EncodedPairs, ccd_loss, reference
from pipeline.config import Bench
from pipeline.labels.epochs import decoder_of
from pipeline.system import machine as machines
from pipeline.system.terminal import progress

SIZES = ((1024, 100), (1024, 1000), (4096, 1000), (4096, 21841))
FORMATS = ("dense", "int8", "subspace")
_OPTIONS: dict[str, Any] = {"temperature": 4.0, "alpha": 0.5, "kd_weight": 2.0}
_CALLS = 20  # per arm and round
_FLUSH_BYTES = 256 << 20  # more than any L2 cache
_COPY_BYTES = 1 << 30
_DIRECTIONS = 512
_AHEAD = (10, 1000, 21841)

Step = Callable[[], Any]


def run(config: Bench) -> dict:
    """Run the benchmark, print its tables and write `config.json`."""
    machine = machines.describe()
    if torch.cuda.is_available():
        tables = {"time": _times(config.rounds or harness.ROUNDS)}
    else:
        tables = {"operators": _operators(), "error": _errors(), "compiled": _compiled(), "model": counts.model()}
    tables["bytes"] = [
        {"classes": classes, "student": dtype, "teacher": form, "bytes": pair_bytes(classes, dtype, form)}
        for classes in sorted({size[1] for size in SIZES})
        for dtype in ahead.DTYPES
        for form in ("fp32", "bf16", *FORMATS[1:])
        if form != "subspace" or classes > _DIRECTIONS
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
    """Operators that would each launch a kernel; views do not."""

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launches += not (func.is_view or "detach" in func.name())
        return func(*args, **kwargs or {})


def _operators() -> list[dict]:
    z_o, z_a = (torch.randn(8, 100, requires_grad=True) for _ in range(2))
    t_o, t_a = torch.randn(2, 8, 100)
    with _Count() as forward:
        loss = reference.ccd_loss(z_o, z_a, t_o, t_a, torch.arange(8), **_OPTIONS)
    with _Count() as backward:
        loss.backward()
    return [
        {"path": "eager PyTorch", "forward": forward.launches, "backward": backward.launches},
        {"path": "these kernels", "forward": 1, "backward": 1},
    ]


def _errors() -> list[dict]:
    """PyTorch's own float32 and bfloat16 paths against float64, which the kernels' tests are held against."""
    rows = []
    for classes in (100, 1000, 21841):
        logits = [row * 3 for row in torch.randn(4, 8, classes, generator=torch.Generator().manual_seed(0))]
        losses = {}
        for name in ("float64", "float32", "bfloat16"):
            z_o, z_a, t_o, t_a = (row.to(getattr(torch, name)) for row in logits)
            losses[name] = reference.ccd_loss(z_o, z_a, t_o, t_a, torch.arange(8), **_OPTIONS).double()
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
    rows = []
    for batch, classes in SIZES:
        arms, logits_bytes = _arms(batch, classes)
        graphs = {name: _captured(step) for name, step in arms.items()}
        found: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        for _ in range(rounds):
            for name, step in arms.items():
                for kind, function, cold in (
                    ("called", step, False),
                    ("replayed", graphs[name], False),
                    ("replayed cold", graphs[name], True),
                ):
                    if function is not None:
                        found[name].setdefault(kind, []).append(_timed(function, flush if cold else None))
        for name, times in found.items():
            form = name.removeprefix("ours ") if name.startswith("ours") else "bf16"
            moved = batch * pair_bytes(classes, "bf16", "bf16" if form == "dense" else form)
            rows.append(
                {
                    "size": f"{batch}×{classes}",
                    "arm": name,
                    **{f"{kind} µs": 1e3 * statistics.median(mine) for kind, mine in times.items()},
                    "spread": max(max(mine) / min(mine) for mine in times.values()),
                    "floor µs": 1e6 * moved / bandwidth,
                    "peak / gradient": _peak(arms[name]) / logits_bytes,
                }
            )
    return rows


def _arms(batch: int, classes: int) -> tuple[dict[str, Step], int]:
    """Loss and gradient by bf16 students, per arm; bytes of the gradient."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(2, batch, classes, generator=generator, device="cuda") * scale

    z_o, z_a = (row.bfloat16().requires_grad_() for row in draw(2.0))
    logits = draw(3.0)
    t_o, t_a = (row.bfloat16() for row in logits)
    target = torch.randint(classes, (batch,), generator=generator, device="cuda")
    weight = torch.rand(batch, generator=generator, device="cuda") * 2
    stream = torch.arange(batch, device="cuda")

    def gradients(loss: torch.Tensor):
        return torch.autograd.grad(loss, (z_o, z_a))

    def plain(o, a, t_o, t_a):
        o, a, t_o, t_a = o.float(), a.float(), t_o.float(), t_a.float()
        return reference.ccd_loss(o, a, t_o, t_a, target, weight=weight, **_OPTIONS)

    def decoded(o, a, encoded):
        scale, offset = encoded[:, :16].flatten().view(torch.float32).view(batch, 2, 2, 1).unbind(1)
        rows = encoded[:, 16:].contiguous().view(torch.int8).view(batch, 2, classes) * scale + offset
        return plain(o, a, rows[:, 0], rows[:, 1])

    pairs = logits.cpu().numpy().swapaxes(0, 1).copy()
    keys = np.arange(batch, dtype=np.uint64)
    int8 = codecs.make("int8", classes=classes)
    encoded = {"int8": (int8, torch.from_numpy(int8.encode(pairs, keys)).cuda())}
    if _DIRECTIONS < classes <= 4096:  # a code for more classes takes minutes to fit
        rng = np.random.default_rng(0)
        basis = np.linalg.qr(rng.normal(size=(classes, _DIRECTIONS)))[0].T
        fitted = (rng.normal(size=(1024, 2, _DIRECTIONS)) @ basis * 3).astype(np.float32)
        subspace = codecs.fit("subspace", fitted, kl=0.05)
        few = np.resize(fitted, (batch, 2, classes))
        encoded["subspace"] = subspace, torch.from_numpy(subspace.encode(few, keys)).cuda()
    compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False)
    compiled_int8 = torch.compile(decoded, mode="max-autotune-no-cudagraphs", dynamic=False)
    arms: dict[str, Step] = {
        "ours dense": lambda: gradients(ccd_loss(z_o, z_a, t_o, t_a, target, weight=weight, **_OPTIONS)),
        "eager": lambda: gradients(plain(z_o, z_a, t_o, t_a)),
        "compile": lambda: gradients(compiled(z_o, z_a, t_o, t_a)),
        "compile int8": lambda: gradients(compiled_int8(z_o, z_a, encoded["int8"][1])),
    }
    for name, (codec, rows) in encoded.items():
        labels = EncodedPairs(rows, stream, decoder_of(codec, torch.device("cuda")), weight)
        arms[f"ours {name}"] = lambda labels=labels: gradients(ccd_loss(z_o, z_a, labels, target, **_OPTIONS))
    if importlib.util.find_spec("liger_kernel"):
        arms["liger"] = _liger((z_o, z_a), (t_o, t_a), target, weight, gradients)
    return arms, 2 * batch * classes * 2


def _liger(students, teacher, target, weight, gradients) -> Step:
    """log_softmax, then Liger's KL and cross-entropy: the parts that it has."""
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div  # pyright: ignore

    def step():
        loss = 0
        for z, t, w in ((students[0], teacher[0], None), (students[1], teacher[1], weight)):
            p, log_q = (t.float() / 4).softmax(1), (z.float() / 4).log_softmax(1)
            kl = liger_kl_div(log_q, p, reduction="none").sum(1)
            loss = loss + 16 * (kl if w is None else w * kl).mean() / 2 + liger_cross_entropy(z, target) / 2
        return gradients(loss)

    return step


def _captured(step: Step) -> Step | None:
    """The step as a replayed CUDA graph; None where it cannot be captured (a synchronisation inside)."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _timed(step: Step, flush: torch.Tensor | None) -> float:
    """Median time of a step in ms."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_CALLS)]
    for start, end in events:
        if flush is not None:
            flush.max()  # read, not written: dirty lines would be written back during the timed step
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _copy_bandwidth() -> float:
    """Bytes per second, read and written, of PyTorch's copy."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (1e-3 * min(_timed(lambda: target.copy_(source), None) for _ in range(5)))


def _peak(step: Step) -> int:
    """Bytes that a step allocates at most, beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
