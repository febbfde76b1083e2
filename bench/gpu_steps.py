"""What the parts of `bench.gpu_acceptance` do in their processes; the JSON is written after each of their rows.

Without a GPU the kernels are interpreted (TRITON_INTERPRET=1) and everything is as small as it can be.
"""

import dataclasses
import io
import itertools
import json
import os
import statistics
import tarfile
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from bench import harness
from pipeline.views import drawing
from pipeline.views.policy import POLICIES

GPU = torch.cuda.is_available()
SIZES = "4096×1000", "4096×21841", "1024×1000"


def _large_tiles() -> None:
    """The interpreter takes its time by the program, however much that works on."""
    from kernels.jda.gpu import pairs

    pairs.STATISTICS["TILE"] = 1 << 18
    pairs.PIXELS.update(ROWS=512, COLUMNS=512)
    pairs.VIEW.update(ROWS=16, COLUMNS=16)
    pairs.COEFFICIENTS["BLOCK"] = 16


def _each(found: str, title: str, jobs: Mapping[str, Callable[[], list[dict]]]) -> None:
    """Fill a table job by job, written after each; one that fails is named at the end and stops none."""
    rows, failed = [], []
    for name, job in jobs.items():
        try:
            rows += job()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        Path(found).write_text(json.dumps({title: rows}))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


# --- call A: kernels


def once(found: str) -> None:
    """Every kernel once, on little: what does not compile or run at all says so first."""
    from kernels import ccd_loss

    device = "cuda" if GPU else "cpu"

    def loss() -> list[dict]:
        students = torch.randn(2, 8, 100, device=device, requires_grad=True)
        teachers, target = torch.randn(2, 8, 100, device=device), torch.arange(8, device=device)
        values = {}
        for impl in ("triton", "torch"):
            value = ccd_loss(students[0], students[1], teachers[0], teachers[1], target, impl=impl)
            values[impl] = value.item(), torch.autograd.grad(value, students)[0].abs().sum().item()
        (ours, slope), (theirs, steepness) = values["triton"], values["torch"]
        return [{"kernel": "loss", "relative error": abs(ours / theirs - 1), "of gradient": abs(slope / steepness - 1)}]

    sizes = (4, 40, 12) if GPU else (1, 24, 12)
    _each(found, "once", {"loss": loss, "pairs": lambda: [{"kernel": "pairs", **_pixels(*sizes)}]})


def pixels(found: str) -> None:
    """The pair kernel on a batch, each of its kernels by itself."""
    count, side, size = (256, 500, 224) if GPU else (1, 24, 12)
    parts: dict[str, list[float]] = {}

    def job() -> list[dict]:
        from kernels.jda.gpu import pairs as jda_gpu

        launch = jda_gpu._launch

        def timed(launches: list, device: torch.device) -> None:
            for one in launches:
                parts.setdefault(_name(one[0]), []).append(_ms(partial(launch, [one], device)))

        if GPU:
            _pixels(count, side, size)  # compiles
        whole = [_pixels(count, side, size)["ms"] for _ in range(5 if GPU else 1)]
        with mock.patch.object(jda_gpu, "_launch", timed):
            _pixels(count, side, size)
        rows = [{"part": name, "launches": len(mine), "ms": sum(mine)} for name, mine in parts.items()]
        return [*rows, {"part": f"whole batch of {count}", "launches": 1, "ms": statistics.median(whole)}]

    _each(found, "pixels", {"imagenet": job})


def _name(kernel: Any) -> str:
    return getattr(kernel, "__name__", None) or kernel.fn.__name__


def _pixels(count: int, side: int, size: int) -> dict:
    """Views of random images by the GPU's kernels: ms, and bytes of the first 16 that differ from the CPU's.

    The CPU's are known by their CRC-32. Its kernels, which numba compiles for half a minute, run only if it differs.
    """
    from kernels import jda
    from kernels.jda.gpu import pairs as jda_gpu

    if not GPU:
        _large_tiles()
    images, views, device = *_images(count, side, size), "cuda" if GPU else "cpu"
    placed = [torch.from_numpy(image).to(device) for image in images]
    sizes = np.array([image.shape[:2] for image in images])
    program, addresses = jda.program_of(POLICIES["imagenet"].table), np.array([image.data_ptr() for image in placed])
    kept: list[torch.Tensor] = []
    ms = _ms(lambda: kept.append(jda_gpu.pairs(addresses, sizes, program, views, -1, size, True, device)))
    made = np.ascontiguousarray(kept[0][:, :16].cpu().numpy())
    known = zlib.crc32(made.tobytes()) == _PIXELS.get((count, side, size))
    return {"differing bytes": 0 if known else int((on_cpu(count, side, size) != made).sum()), "ms": ms}


# Images, their longer side and that of the views -> CRC-32 of `on_cpu`.
_PIXELS = {(1, 24, 12): 0x6E445909, (4, 40, 12): 0xF2EDDD20, (256, 500, 224): 0x7BD55DB6}


def on_cpu(count: int, side: int, size: int) -> np.ndarray:
    """The views of the first 16 images by the CPU's kernels: u8 (2, ≤ 16, S, S, 3)."""
    from kernels import jda

    (images, views), program = _images(count, side, size), jda.program_of(POLICIES["imagenet"].table)
    out = np.empty((2, min(count, 16), size, size, 3), np.uint8)
    for i, image in enumerate(images[:16]):
        jda.pair(image, program, views[i], -1, out, i)
    return out


def _images(count: int, side: int, size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Images u8 (3/4 side, side, 3), and their views."""
    rng, height = np.random.default_rng(0), side * 3 // 4
    images = [rng.integers(0, 256, (height, side, 3), dtype=np.uint8) for _ in range(count)]
    sides = np.full(count, height), np.full(count, side)
    return images, drawing.draw(0, np.arange(count, dtype=np.uint64), 0, *sides, POLICIES["imagenet"], size)


def _ms(call: Callable[[], object]) -> float:
    """Of a call, by CUDA events; on the CPU by the clock."""
    if not GPU:
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def losses(found: str) -> None:
    """The loss of dense, int8 and subspace labels against its floor, a size at a time; else what is counted quickly."""
    _losses(found, lambda name: name.startswith("ours"), SIZES)


def compiled(found: str) -> None:
    """The same beside eager PyTorch and torch.compile, which takes minutes to compile."""
    _losses(found, lambda name: True, ("4096×1000", "1024×1000"))


def _losses(found: str, wanted: Callable[[str], bool], sizes: tuple[str, ...]) -> None:
    from bench.kernels import suite

    arms = suite._arms

    def chosen(batch: int, classes: int) -> dict:
        return {name: arm for name, arm in arms(batch, classes).items() if wanted(name)}

    def of(size: str) -> list[dict]:
        pair = (tuple(map(int, size.split("×"))),)
        with mock.patch.object(suite, "SIZES", pair), mock.patch.object(suite, "_arms", chosen):
            return suite._times(5)

    if GPU:
        _each(found, "kernels", {size: partial(of, size) for size in sizes})
    else:
        _each(found, "kernels", {"operators": suite._operators, "errors": suite._errors})


# --- call B: decoders


def data(folder: str) -> None:
    """A prepared set of JPEGs of ImageNet's usual size and weight, 500 × 375 and 104 KB, beside its shard FOLDER.tar.

    They are noise with a photograph's spectrum: `prepare synthetic` wants scikit-learn's photographs.
    """
    from pipeline.data import prepare

    count, width = (1024, 500) if GPU else (32, 32)
    rng, height = np.random.default_rng(0), width * 3 // 4
    patterns = [_pattern(rng, height, width) for _ in range(16)]

    def encoded(number: int) -> bytes:
        file = io.BytesIO()
        pixels = np.roll(patterns[number % 16], (7 * number, 13 * number), (0, 1))
        Image.fromarray(pixels).save(file, "JPEG", quality=87)
        return file.getvalue()

    shard = Path(folder).with_suffix(".tar")
    with ThreadPoolExecutor() as workers, tarfile.open(shard, "w") as tar:
        for number, jpeg in enumerate(workers.map(encoded, range(count))):
            for name, content in ((f"{number:05d}.jpg", jpeg), (f"{number:05d}.cls", b"%d" % (number % 1000))):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    prepare.build(f"webdataset:{shard}", Path(folder), classes=1000)


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """u8 (H, W, 3) whose amplitudes fall with the frequency, as a photograph's do."""
    fall = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width).clip(1)
    waves = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, height, width))) / fall, (height, width))
    return (127 + 48 * waves / waves.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def decoders(found: str, data: str) -> None:
    """The loader by each decoder: its bytes against the CPU's pixel kernel on what DALI decoded, and a bad image."""
    from pipeline.data import dali

    _each(found, "decoders", {name: partial(_decoder, name, data) for name in dali.ENGINES})


def _decoder(decoder: str, data: str) -> list[dict]:
    from kernels import jda
    from pipeline.data import dali, probes
    from pipeline.data.decode import as_rgb
    from pipeline.data.index import Index
    from pipeline.views import plan
    from pipeline.views.loader import Loader

    if not GPU:
        _large_tiles()
    index, policy = Index.open(Path(data), "train"), POLICIES["imagenet"]
    count, size, threads = (64, 224, len(os.sched_getaffinity(0))) if GPU else (2, 12, 2)
    policy = dataclasses.replace(policy, base=policy.base.resized(size))
    rows, device = index.good[:count], torch.cuda.current_device() if GPU else None
    encoded = [as_rgb(index.read(row)) if index.records["cmyk"][row] else index.read(row) for row in rows.tolist()]

    def requests(batches: int = 1) -> Iterator[plan.Request]:
        return plan.requests(index, policy, 0, [(0, rows)] * batches)

    loader = Loader(index, policy, threads=threads, decoder=decoder, max_bad=1.0)
    (batch,) = loader.batches(requests(), digests=True)
    made = batch.images.cpu().numpy()
    expected = np.empty_like(made)
    (request,) = requests()
    route = dali.route(decoder, index.records["key_hash"][rows])
    for number, engine in enumerate(dali.ENGINES[decoder]):
        if len(at := np.flatnonzero(route == number)):
            pipeline = dali.Batches(len(at), threads, device, engine)
            pipeline.schedule([encoded[i] for i in at])
            images = pipeline.take(None)
            for i, image in zip(at.tolist(), images.as_cpu() if GPU else images, strict=True):
                jda.pair(
                    np.ascontiguousarray(image), jda.program_of(policy.table), request.views[i, 0], -1, expected, i
                )
    crcs = [[zlib.crc32(made[view, i]) for view in range(2)] for i in range(count)]
    here, host = probes.pixels(decoder), probes.pixels("cpu")
    if len(dali.ENGINES[decoder]) > 1:  # its digests are of both engines' pixels
        here = {}
    row = {
        "decoder": decoder,
        "differing bytes": int((made != expected).sum()),
        "wrong digests": int((np.array(crcs) != batch.digests).sum()),
        "probes unlike the CPU's": ", ".join(name for name in here if here[name] != host[name]),
    }
    batches = 50 if GPU else 2
    for digests in (False, True):
        seconds = 1e-3 * _ms(lambda digests=digests: list(loader.batches(requests(batches), digests=digests)))
        row["pairs/s" + ", digests" * digests] = count * batches / seconds
    bad, read = int(rows[1]), Index.read
    with mock.patch.object(Index, "read", lambda self, at: b"\xff\xd8\xff\xdb\0\x43" if at == bad else read(self, at)):
        (batch,) = loader.batches(requests())
    kept = [i for i in range(count) if i != 1]
    whole = batch.rows.tolist() == rows[kept].tolist() and (batch.images.cpu().numpy() == made[:, kept]).all()
    return [row | {"one bad image": "skipped" if whole and bad in loader.skipped.causes else "harmed others"}]


def rates(found: str, data: str) -> None:
    """Pairs per second of this loader by each decoder, and images per second of DALI alone, fed from memory."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    from bench.loader import arms
    from pipeline.views.loader import Loader

    threads = len(os.sched_getaffinity(0))
    job = arms.Job(Path(data), 256 if GPU else 16, threads)
    index = arms.opened(job.data)
    encoded = [[np.frombuffer(index.read(row), np.uint8) for row in arms.part_of(job, step)[1]] for step in range(4)]

    def pairs(decoder: str) -> Iterator[int]:
        plan = map(partial(arms.request, job), itertools.count())
        batches = Loader(index, arms.POLICY, threads=threads, decoder=decoder).batches(plan)
        return (len(batch.rows) for batch in batches)

    def images(load: float | None) -> Iterator[int]:
        source, device = itertools.cycle(encoded), None if load is None else 0
        how = {} if load is None else {"device": "mixed", "hw_decoder_load": load}
        how |= {"output_type": types.DALIImageType.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
        graph = Pipeline(job.batch_size, threads, device_id=device, exec_dynamic=True, prefetch_queue_depth=2)
        with graph:
            given = fn.external_source(source=lambda: next(source), batch=True, dtype=types.DALIDataType.UINT8)
            graph.set_outputs(fn.decoders.image(given, **how))
        graph.build()
        return (len(decoded) for (decoded,) in arms._runs(graph))

    ours = ("gpu-hw", "gpu", "gpu-both", "cpu") if GPU else ("cpu",)
    loads = {"gpu-hw": 1.0, "gpu": 0.0, "stock": 0.65} if GPU else {"cpu": None}
    jobs = {f"loader, {name}": partial(pairs, name) for name in ours}
    jobs |= {f"DALI alone, {name}": partial(images, load) for name, load in loads.items()}
    _each(found, "decoding", {name: partial(_rate, name, steps) for name, steps in jobs.items()})


def _rate(name: str, steps: Callable[[], Iterator[int]]) -> list[dict]:
    done = steps()
    slots = [harness.measure(done, warm=8, timed=8) for _ in range(3)]  # up to 6 batches lie ready at a slot's start
    rate = harness.spread(slot.rate for slot in slots)
    cpu_ms = statistics.median(1e3 * slot.cpu_seconds / slot.items for slot in slots)
    return [{"arm": name, "per second": rate["median"], "min": rate["min"], "max": rate["max"], "CPU ms": cpu_ms}]


def whole(found: str, data: str) -> None:
    """Two blocks of a teacher pass, and a student on them: the commands that users give."""
    from pipeline.config import PrecomputeTeacher, TrainStudent
    from pipeline.data.index import Index
    from pipeline.labels import precompute
    from pipeline.networks import models, weights
    from pipeline.training import train_student

    index = Index.open(Path(data), "train")
    teacher, student = ("timm/resnet34", "timm/resnet18") if GPU else ("cifar/resnet8", "cifar/resnet8")
    size = 128 if GPU else 16
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)

        def teach() -> list[dict]:
            weights.save(models.create(teacher, index.class_list, seed=0).module, here / "t.safetensors", {})
            config = PrecomputeTeacher(
                data=Path(data), teacher=f"{teacher}@{here / 't.safetensors'}", store=str(here / "s.zarr"), views=1,
                codec="int8", block_rows=-(-len(index) // 2), batch_size=size,
            )  # fmt: skip
            seconds = 1e-3 * _ms(lambda: precompute.run(config))
            return [{"step": "teacher pass, two blocks, with its start", "seconds": seconds}]

        def learn() -> list[dict]:
            epochs = -(-20 // -(-len(index) // size)) if GPU else 1
            config = TrainStudent(
                data=Path(data), store=str(here / "s.zarr"), student=student, out=here / "run", epochs=epochs,
                batch_size=size, lr=1e-3, check_share=1.0,
            )  # fmt: skip
            last: dict = {}
            seconds = 1e-3 * _ms(lambda: last.update(train_student.run(config)))
            return [{"step": f"student, {epochs} epochs, with its start", "seconds": seconds, "loss": last["loss"]}]

        _each(found, "whole", {"teacher": teach, "student": learn})
