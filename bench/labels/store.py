"""`pipeline bench store`: what labels cost and lose in each format, and how fast a store of them is read.

Formats: bytes per vector against KL at T = 1, 2, 4, the slope of decoded on true logits (1: unbiased) and the rates of
coding, on teacher logits (`--logits FILE.npz`: arrays fit_original, fit_augmented, original, augmented f16 or f32
(n, C); by default the simulated teacher's). A format is fitted to the first two and measured on the others. w = 1 + cos
is a stored number here; the table says how far off it would be if it were computed from decoded labels.
"""

import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from bench import harness
from bench.labels import limits, sharing, simulated, storage
from bench.labels.arms import ARMS, REFERENCE, Make, beside_bytes, weights
from cache import UserError, philox
from cache.codec.fidelity import TEMPERATURES, measure
from cache.errors import did_you_mean
from pipeline import demo
from pipeline.config import Bench
from pipeline.data.index import Index
from pipeline.networks import models
from pipeline.networks.teacher import Teacher
from pipeline.system import machine as machines
from pipeline.views import plan
from pipeline.views import policy as policies
from pipeline.views.loader import Loader

_KL = tuple(f"KL T={temperature:g}" for temperature in TEMPERATURES)
BUDGETS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
_TABLES = {  # of what `compare` finds
    "formats on {}: bytes per vector, KL in nats": (
        "format",
        "on disk",
        "all told",
        "in memory",
        *_KL,
        "slope",
        "w off by",
    ),
    "formats on {}: vectors per second of one core": ("format", "encode/s", "decode/s", "pack/s"),
}
_FIT, _MEASURED = 2048, 512  # simulated pairs
_PAIRS = 1024  # at a time, when rates are taken
_SEED = 0


def run(config: Bench) -> dict:
    """Run the store benchmark, print its tables, write `config.json` and plots into `config.out`."""
    makes = _makes(config.arms)
    machine = machines.describe()
    sources = (
        {path.stem: _read(path) for path in config.logits}
        if config.logits
        else {
            "simulated": _simulated(),
            "digits": _digits(config),
        }
    )
    formats = [
        {"teacher": source} | row for source, (fit, held) in sources.items() for row in compare(makes, fit, held)
    ]
    storages = storage.compare(config.work, config.rounds or harness.ROUNDS, config.samples or storage.SAMPLES)
    found = harness.document(
        "store",
        machine=machine,
        options=vars(config),
        unit="bytes",
        reference=storage.REFERENCE,
        arms=storages["arms"],
        tables={
            "formats": formats,
            "storage": storages["table"],
            "access": storages["access"],
            "sharing": sharing.compare(config.work),
            "limits": _limits(sources, formats),
            "networks": _against_networks(sources),
        },
    )
    for source in sources:
        mine = [row for row in formats if row["teacher"] == source]
        for title, columns in _TABLES.items():
            harness.show_table(title.format(source), [_shown({key: row[key] for key in columns}) for row in mine])
    if found["tables"]["limits"]:
        harness.show_table("unbiased codes of directions: bytes per vector", found["tables"]["limits"])
    harness.show_table("coding against networks on this machine", found["tables"]["networks"])
    harness.show_table("reading a view's labels, cold", storages["table"])
    harness.show_table("other access", storages["access"])
    harness.show_table("a plane that processes share", found["tables"]["sharing"])
    if config.out:
        plot(formats, config.out)
    if config.json:
        harness.write(config.json, found)
    return found


def compare(makes: dict[str, Make], fit: np.ndarray, held: np.ndarray) -> list[dict]:
    """Rows of the formats, fitted to logits f32 (n, 2, C) and measured on `held` f32 (m, 2, C)."""
    dither_keys = philox.dither_keys(_SEED, np.arange(len(held), dtype=np.uint64), 0)
    true = weights(held)
    rows = []
    for name, make in makes.items():
        coder = make(fit)
        if coder is None or getattr(coder, "k", 0) > held.shape[2]:  # exact, or more top classes than there are
            continue
        codes = coder.encode(held, dither_keys)
        found = measure(coder, held, dither_keys, codes)  # pyright: ignore[reportArgumentType]
        off = np.abs(weights(coder.decode(codes, dither_keys)) - true)
        rows.append(
            {
                "format": name,
                "on disk": found.bytes_per_vector,
                "all told": found.bytes_per_vector + beside_bytes(name, held),
                "in memory": coder.row_bytes / 2,
                **dict(zip(_KL, found.kl.values(), strict=True)),
                "slope": found.slope,
                "w off by": float(off.max()),
                "encode/s": _rate(lambda coder=coder: coder.encode(held[:_PAIRS], dither_keys[:_PAIRS]), _pairs(held)),
                "decode/s": _rate(lambda c=coder, e=codes: c.decode(e[:_PAIRS], dither_keys[:_PAIRS]), _pairs(held)),
                "pack/s": _rate(lambda c=coder, e=codes: c.pack(e[:_PAIRS], dither_keys[:_PAIRS]), _pairs(held)),
            }
        )
    return rows


def _limits(sources: dict, formats: list[dict]) -> list[dict]:
    """What ours take, beside what they cannot do without (`bench.labels.limits`)."""
    rows = []
    for row in formats:
        name, _, budget = row["format"].partition("-")
        if name == "subspace" and budget in map(str, BUDGETS):
            least = limits.least_bytes(sources[row["teacher"]][0], float(budget))
            rows.append({key: row[key] for key in ("teacher", "format", "on disk")} | {"at least": least})
    return rows


def _against_networks(sources: dict) -> list[dict]:
    """What coding costs beside the networks that it serves: ResNet-34 forward, ResNet-18 forward and backward."""
    import timm

    fit, held = next(iter(sources.values()))
    coder = ARMS["subspace-0.05"](fit)
    assert coder is not None
    dither_keys = philox.dither_keys(_SEED, np.arange(len(held), dtype=np.uint64), 0)
    codes = coder.encode(held, dither_keys)
    images = torch.randn(16, 3, 224, 224)
    teacher, student = timm.create_model("resnet34").eval(), timm.create_model("resnet18")

    def forward() -> None:
        with torch.inference_mode():
            teacher(images)

    def step() -> None:
        student(images).sum().backward()

    encode = 1 / _rate(lambda: coder.encode(held, dither_keys), 2 * len(held))
    pack = 1 / _rate(lambda: coder.pack(codes, dither_keys), 2 * len(held))
    decode = 1 / _rate(lambda: coder.decode(codes, dither_keys), 2 * len(held))
    shown, learnt = 1 / _rate(forward, len(images)), 1 / _rate(step, len(images))
    return [
        {
            "cost": "encode and pack a vector, against ResNet-34's forward of an image",
            "CPU us": 1e6 * (encode + pack),
            "network CPU us": 1e6 * shown,
            "share %": 100 * (encode + pack) / shown,
        },
        {
            "cost": "decode 1,024 rows, against a ResNet-18 step of 2,048 images (16 timed)",
            "CPU us": 1e6 * decode * 2048,
            "network CPU us": 1e6 * learnt * 2048,
            "share %": 100 * decode / learnt,
        },
    ]


def _pairs(held: np.ndarray) -> int:
    return 2 * min(len(held), _PAIRS)


def _rate(call, vectors: int) -> float:
    """Vectors per second of CPU time, all threads together: median of five calls."""
    call()
    times = []
    for _ in range(5):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return vectors / max(statistics.median(times), 1e-9)


def _makes(chosen: str | None) -> dict[str, Make]:
    from cache import codec

    budgets = {f"subspace-{kl}": (lambda logits, kl=kl: codec.fit("subspace", logits, kl=kl)) for kl in BUDGETS}
    every = {name: make for name, make in ARMS.items() if name != REFERENCE and name not in budgets} | budgets
    if chosen is None:
        return every
    for name in chosen.split(","):
        if name not in every:
            raise UserError(f"unknown format {name}", fix=did_you_mean(name, every))
    return {name: every[name] for name in chosen.split(",")}


def _simulated() -> tuple[np.ndarray, np.ndarray]:
    _, logits, _ = simulated.draw(simulated.teacher(), _FIT + _MEASURED)
    found = logits[0].numpy()
    return found[:_FIT], found[_FIT:]


def _digits(config: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Of the demo's teacher, trained once and kept in WORK."""
    data, spec = demo.prepared(harness.work(config.work) / "digits", threads=config.threads, device="cpu")
    index, policy = Index.open(data, split="train"), policies.load(demo.POLICY)
    teacher = Teacher(models.create(spec, index.classes), policy, torch.device("cpu"), "fp32")
    rows = np.random.default_rng(_SEED).permutation(index.good)
    requests = plan.requests(index, policy, _SEED, plan.cut(0, rows, -(-len(rows) // 12)))
    batches = Loader(index, policy, threads=len(os.sched_getaffinity(0))).batches(requests)
    logits = np.concatenate([said.logits.numpy() for _, said in teacher.answers(batches)])
    cut = len(logits) * 3 // 4
    return logits[:cut], logits[cut:]


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            parts = [
                np.stack([arrays[f"{part}original"], arrays[f"{part}augmented"]], axis=1).astype(np.float32)
                for part in ("fit_", "")
            ]
    except (OSError, ValueError, KeyError) as error:
        expected = "an .npz of fit_original, fit_augmented, original, augmented (n, C)"
        raise UserError(f"cannot read logits {path}", found=error, expected=expected, fix="check --logits") from None
    return parts[0], parts[1]


def _shown(row: dict) -> dict:
    digits = {"slope": ".4f", "w off by": ".1e", "on disk": ".1f", "all told": ".1f", "in memory": ".0f"}
    return {
        key: value if isinstance(value, str) else f"{value:{digits.get(key, ',.0f' if key.endswith('/s') else '.2g')}}"
        for key, value in row.items()
    }


def plot(formats: list[dict], out: Path) -> None:
    """KL(T = 4) against bytes on disk, one picture per teacher: OUT/formats-TEACHER.png and .svg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    for teacher in dict.fromkeys(row["teacher"] for row in formats):
        rows = [row for row in formats if row["teacher"] == teacher]
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        ours = sorted((row["on disk"], row["KL T=4"]) for row in rows if row["format"].startswith("subspace"))
        if ours:
            axes.plot(*zip(*ours, strict=True), color="tab:blue", linewidth=1)
        for row in rows:
            unbiased = abs(row["slope"] - 1) <= 0.02
            point = row["on disk"], max(row["KL T=4"], 1e-7)
            color = "tab:blue" if row["format"].startswith("subspace") else "tab:gray"
            axes.plot(*point, "o", color=color, fillstyle="full" if unbiased else "none", markersize=5)
            axes.annotate(row["format"], point, textcoords="offset points", xytext=(4, 3), fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="bytes per vector on disk", ylabel="KL(T = 4), nats")
        axes.set_title(f"{teacher}; filled: unbiased (slope 1 ± 0.02)", fontsize=10)
        axes.grid(alpha=0.3)
        for kind in ("png", "svg"):
            figure.savefig(out / f"formats-{teacher}.{kind}", dpi=150)
