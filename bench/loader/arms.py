"""The arms of the loader benchmark: this loader and what one would write without it, over one data set.

An arm is a generator over a `Job`: endless batches, the first member of which holds the first views. All shuffle whole
epochs (but DALI's reader, which cannot) and leave uint8 pixels in host memory.
"""

import gc
import math
import os
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench import harness
from bench.loader import pillow
from cache import UserError
from kernels.jda.ops import Op
from pipeline.data import order
from pipeline.data.index import Index
from pipeline.views.policy import POLICIES

if TYPE_CHECKING:
    from pipeline.views.plan import Request

POLICY = POLICIES["imagenet"]
SEED = 0
_IDENTITY = Op("color", 0.0)  # factor 1: whoever writes an arm by hand leaves it out
_GRAY = list(map(float, pillow.GRAY))
_EXTENSIONS = "jpg;jpeg;png;JPG;JPEG;PNG"


@dataclass(frozen=True)
class Job:
    """What an arm works on; crosses process boundaries."""

    data: Path
    batch_size: int
    threads: int
    """DALI threads, and threads of the pair kernel; or DataLoader workers."""


@cache
def opened(data: Path) -> Index:
    return Index.open(data)


@lru_cache(2)
def _shuffled(data: Path, epoch: int) -> np.ndarray:
    return order.permutation(SEED, epoch, opened(data).good)


def part_of(job: Job, step: int) -> tuple[int, np.ndarray]:
    """The view, which is the epoch, and the index rows of a step counted from the first epoch on."""
    epoch, step = divmod(step, order.steps_per_epoch(len(opened(job.data).good), job.batch_size))
    return epoch, _shuffled(job.data, epoch)[step * job.batch_size : (step + 1) * job.batch_size]


def request(job: Job, step: int) -> "Request":
    """Rows of a step and their views."""
    from pipeline.views import plan

    (found,) = plan.requests(opened(job.data), POLICY, SEED, [part_of(job, step)])
    return found


# --- this loader


def jda_distill(job: Job) -> Generator[torch.Tensor]:
    """u8 (2, B, S, S, 3)."""
    from kernels import jda
    from pipeline.views import on_cpu, plan
    from pipeline.views.loader import Loader

    harness.time_calls(on_cpu, "decode")
    harness.time_calls(jda, "pair")
    index = opened(job.data)
    requests = plan.requests(index, POLICY, SEED, map(partial(part_of, job), count()))
    for batch in Loader(index, POLICY, threads=job.threads).batches(requests):
        yield batch.images


# --- DataLoader; workers are forked, so that they inherit the open index


class PillowPairs(Dataset):
    """Item i is the batch of step i: u8 (2, B, S, S, 3), labels i64 (B,). A batch is made where it is sent from, so
    that no collating copies it once more."""

    def __init__(self, job: Job):
        self.job = job

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, drawn, _ = request(self.job, step)
        index = opened(self.job.data)
        images = torch.empty((2, len(rows), POLICY.base.size, POLICY.base.size, 3), dtype=torch.uint8)
        pixels = images.numpy()
        for i, row in enumerate(rows):
            pillow.pair(index.read(row), drawn[i, 0], POLICY, pixels[:, i])
        return images, torch.from_numpy(index.records["label"][rows].astype(np.int64))


def pillow_pairs(job: Job) -> Generator[torch.Tensor]:
    """u8 (2, B, S, S, 3), the same bytes as `jda_distill`."""
    for images, _ in _workers(PillowPairs(job), job, sampler=count(), batch_size=None):
        yield images


class TorchvisionPairs(Dataset):
    """Item i is a pair of u8 (3, S, S) of index row i and its label, as the v2 transforms make them."""

    def __init__(self, job: Job):
        from torchvision.transforms import v2

        self.index = opened(job.data)
        self.jda = v2.Compose([v2.RandomApply([v2.Lambda(_torchvision_op(op))], POLICY.probability) for op in _table()])
        self.base = v2.Compose([v2.RandomResizedCrop(POLICY.base.size), v2.RandomHorizontalFlip()])

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        from torchvision.io import ImageReadMode, decode_image  # calls decode_jpeg for a JPEG

        data = np.frombuffer(bytearray(self.index.read(row)), np.uint8)  # torch wants a writable buffer
        image = decode_image(torch.from_numpy(data), ImageReadMode.RGB)
        return self.base(image), self.base(self.jda(image)), int(self.index.records["label"][row])


def torchvision_v2(job: Job) -> Generator[list[torch.Tensor]]:
    """[u8 (B, 3, S, S), u8 (B, 3, S, S), labels]."""
    rows = chain.from_iterable(_shuffled(job.data, epoch) for epoch in count())
    yield from _workers(TorchvisionPairs(job), job, sampler=rows, batch_size=job.batch_size)


def _workers(dataset: Dataset, job: Job, **how: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=job.threads,
        persistent_workers=True,
        multiprocessing_context="fork",
        worker_init_fn=_pin,
        **how,
    )


def _pin(worker: int) -> None:
    """A core of its own for each worker, as all arms have: a scheduler may leave two of them on one for seconds."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[worker % len(allowed)]})


def _torchvision_op(op: Op) -> Callable[[torch.Tensor], torch.Tensor]:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    m = op.magnitude
    return {
        "posterize": lambda image: F.posterize(image, int(m)),
        "solarize": lambda image: F.solarize(image, m),
        "equalize": F.equalize,
        "invert": F.invert,
        "rotate": lambda image: F.rotate(image, m, fill=_GRAY),
        "color": lambda image: F.adjust_saturation(image, 1 + random.choice((-m, m))),
        "sharpness": lambda image: F.adjust_sharpness(image, 1 + random.choice((-m, m))),
        "shear_x": lambda image: F.affine(
            image, 0, [0, 0], 1, [random.choice((-1, 1)) * math.degrees(math.atan(m)), 0],
            InterpolationMode.BILINEAR, _GRAY, [0, 0],  # bicubic is only there for Pillow images
        ),
    }[op.name]  # fmt: skip


def _table() -> list[Op]:
    return [op for op in POLICY.table if op != _IDENTITY]


# --- stock DALI


def dali_conditionals(job: Job) -> Generator[tuple]:
    """(u8 (B, S, S, 3), u8 (B, S, S, 3), labels as text), DALI's own."""
    from nvidia.dali import fn, types
    from nvidia.dali.auto_aug.core import signed_bin
    from nvidia.dali.pipeline import pipeline_def

    reader: Any = fn.readers.webdataset  # its stub knows no outputs

    @pipeline_def(batch_size=job.batch_size, num_threads=job.threads, enable_conditionals=True)
    def graph():
        encoded, label = reader(
            paths=[str(shard) for shard in opened(job.data).shards], ext=[_EXTENSIONS, "cls"], random_shuffle=True
        )
        image = fn.decoders.image(encoded, output_type=types.DALIImageType.RGB, adjust_orientation=False)
        augmented = image
        for operation in map(_dali_op, _table()):
            fires: Any = fn.random.coin_flip(probability=POLICY.probability, dtype=types.DALIDataType.BOOL)
            sign = signed_bin(0)  # outside of the branch, as DALI advises
            if fires:
                augmented = operation(augmented, magnitude_bin=sign)
        return _crop(image), _crop(augmented), label

    with _silence():  # on names that its own auto_aug should not use, and on the missing index of a tar
        built = graph()
        built.build()
    yield from _runs(built)


def _dali_op(op: Op) -> Callable:
    """DALI's own augmentation at one magnitude, negated where JDA draws a sign: (image, magnitude_bin) -> image."""
    from nvidia.dali import types
    from nvidia.dali.auto_aug import augmentations

    augmentation = getattr(augmentations, op.name)
    if op.name not in ("equalize", "invert"):
        signed = op.name in ("color", "sharpness", "shear_x")
        augmentation = augmentation.augmentation(mag_range=np.array([op.magnitude]), randomly_negate=signed)
    kinds = types.DALIInterpType
    kind = kinds.INTERP_NN if op.name == "rotate" else kinds.INTERP_LINEAR  # there is no bicubic shear
    return partial(augmentation, fill_value=_GRAY[0], interp_type=kind)


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text()
    except OSError:  # it has ended since it was listed
        return ""


def _pin_dali() -> None:
    """The same for DALI's pool; its own `set_affinity` wants NVML's advice, and a GPU for it."""
    pool = [task for task in Path("/proc/self/task").iterdir() if "[DALI][TP" in _name(task)]
    for number, task in enumerate(sorted(pool)):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(int(task.name), {allowed[number % len(allowed)]})


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on the stderr that C++ writes to as well."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def dali_two_crops(job: Job) -> Generator[tuple]:
    """(u8 (B, S, S, 3), u8 (B, S, S, 3)): no JDA, what no augmenting loader can pass."""
    yield from _runs(_decoded(job, lambda image: (_crop(image), _crop(image))))


def dali_decode(job: Job) -> Generator[tuple]:
    """(u8 (H, W, 3) each,): one decoded image per pair and nothing else."""
    yield from _runs(_decoded(job, lambda image: (image,)))


def _decoded(job: Job, outputs: Callable) -> Any:
    """A graph that reads and decodes as this loader does, in the same order."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    index, steps = opened(job.data), count()

    def read() -> list[np.ndarray]:
        _, rows = part_of(job, next(steps))
        return [np.frombuffer(index.read(row), np.uint8) for row in rows]

    graph = Pipeline(job.batch_size, job.threads, device_id=None, exec_dynamic=True, prefetch_queue_depth=2)
    with graph:
        encoded = fn.external_source(source=read, batch=True, dtype=types.DALIDataType.UINT8)
        image = fn.decoders.image(
            encoded, output_type=types.DALIImageType.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
        )
        graph.set_outputs(*outputs(image))
    graph.build()
    return graph


def _crop(image: Any) -> Any:
    from nvidia.dali import fn

    base = POLICY.base
    cropped = fn.random_resized_crop(
        image, size=base.size, random_area=list(base.scale), random_aspect_ratio=list(base.ratio)
    )
    return fn.flip(cropped, horizontal=fn.random.coin_flip())


def _runs(graph: Any) -> Iterator[tuple]:
    _pin_dali()
    while True:
        yield graph.run()


ARMS: dict[str, Callable[[Job], Generator]] = {
    "jda-distill": jda_distill,
    "pillow": pillow_pairs,
    "torchvision": torchvision_v2,
    "dali-conditionals": dali_conditionals,
    "dali-two-crops": dali_two_crops,
    "decode": dali_decode,
}


def slot(job: Job, name: str, warm: int, timed: int) -> harness.Slot:
    """One slot of an arm, started anew: nothing lies ready at its start, and nothing works on after its end."""
    try:
        with closing(ARMS[name](job)) as batches:
            return harness.measure((len(batch[0]) for batch in batches), warm=warm, timed=timed)
    except RuntimeError as error:  # of DALI or a worker, over an image or a tar that this arm cannot read
        found = " ".join(str(error).split())[:300]
        raise UserError(f"arm {name} failed", found=found, fix="leave it out by --arms") from None
    finally:
        gc.collect()
