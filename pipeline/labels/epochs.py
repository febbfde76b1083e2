"""An epoch's stored labels where the student needs them: placed, gathered by row, decoded, and checked."""

import hashlib
import json
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import cache
from cache import Manifest, Plane, Store, UserError
from cache.codec import Codec, Features, Subspace
from kernels import EncodedPairs
from kernels.loss.decode import Decoder
from pipeline.config import Machine
from pipeline.data import probes
from pipeline.data.classes import Classes
from pipeline.data.index import Index, matched
from pipeline.system import device as devices
from pipeline.system import ranks
from pipeline.system.terminal import decimal, progress
from pipeline.views import policy as policies
from pipeline.views.policy import Policy

_LARGEST_STEP = 136  # |q - beta u|: a byte and half a dither of up to four steps
_GPU_SHARE, _MEMORY_SHARE = 0.25, 0.5  # of what is free, that two planes may take: one in use, one on its way


def replayed(manifest: Manifest) -> tuple[Policy, str]:
    """A store's policy and who must decode for it.

    Raises UserError if that takes a GPU that is not there, or if the decoder here gives other pixels.
    """
    decoder = probes.decoder_of(manifest.decoder)
    if decoder != "cpu" and not torch.cuda.is_available():
        raise UserError("the store's pixels were decoded on a GPU", found="no CUDA device", fix="use a GPU machine")
    probes.check(manifest.decoder, manifest.versions)
    return policies.from_config({**manifest.policy, "base": manifest.base}, "the store's policy"), decoder


def require_whole(store: Store, views: int) -> None:
    """Raise UserError unless every block of the store's first `views` is there."""
    if missing := [view for view, _ in store.missing_blocks() if view < views]:
        raise UserError(
            f"store {store.path} has missing blocks",
            found=f"{len(missing)} missing",
            expected="all committed",
            fix="run precompute-teacher again, it resumes",
        )


def features_of(store: Store, why: str) -> Features:
    """The store's code. Raises UserError unless it keeps features, which `why` needs."""
    if not isinstance(store.codec, Features):
        raise UserError(
            f"{why} needs the teacher's features",
            found=f"a store of logits ({store.manifest.codec['name']})",
            expected="a store with features",
            fix="run precompute-teacher --features into another store",
        )
    return store.codec


def labels_of(store: Store | None) -> dict[str, Any]:
    """What a store's labels are; it may grow while it is learned from. JSON-safe, empty without a store."""
    if not store:
        return {}
    fields = store.manifest.identity()
    codec = hashlib.sha256(json.dumps(fields["codec"], sort_keys=True).encode()).hexdigest()
    names = ("teacher", "teacher_weights", "teacher_size", "seed", "decoder")
    return {name: fields[name] for name in names if fields[name] is not None} | {"codec": codec}


def numbered_alike(index: Index, machine: Machine, manifest: Manifest) -> Index:
    """`index`, once its classes are those of the store, renumbered by name if the user gave a --class-map.

    Raises UserError with the first difference. A store from before it kept names is taken at its word.
    """
    if manifest.class_list is None:
        return index
    listed = Classes.from_json(manifest.class_list, "the store's manifest")
    return matched(index, machine, listed, "--data", "the store")


@dataclass(frozen=True, eq=False)
class Labels:
    """One view's labels; the student's device decodes them."""

    store: Store
    plane: Plane
    device: torch.device
    codes: torch.Tensor
    """u8 (N, row_bytes), on the device or in memory."""

    in_codes: ClassVar[bool] = True
    """Whether `pairs` has what `logits` says in codes, for kernels."""

    @cached_property
    def decoder(self) -> Decoder:
        return decoder_of(self.store.codec, self.device)

    def known(self, rows: np.ndarray) -> np.ndarray:
        """Bool (B,): whether index rows i64 (B,) have labels; the teacher pass skipped the others."""
        return ~np.isnan(self.plane.weight[rows])

    def logits(self, rows: np.ndarray) -> torch.Tensor:
        """The teacher's logits of index rows i64 (B,): f32 (B, 2, C) on the device."""
        if self.device.type == "cpu":  # the codec's own decoder is the faster one there
            dither_keys = self.store.dither_keys(self.plane.view, rows)
            return torch.from_numpy(self.store.codec.decode(self.plane.gather(rows)[0], dither_keys))
        return self.pairs(rows).logits()

    def features(self, rows: np.ndarray) -> torch.Tensor:
        """The teacher's features of index rows i64 (B,): f32 (B, 2, F) on the device, of a store that keeps them."""
        codec = self.store.codec
        assert isinstance(codec, Features), "features_of comes first"
        if self.device.type == "cpu":
            dither_keys = self.store.dither_keys(self.plane.view, rows)
            return torch.from_numpy(codec.features(self.plane.gather(rows)[0], dither_keys))
        return self.pairs(rows).features()

    def pairs(self, rows: np.ndarray) -> EncodedPairs:
        """The encoded labels of index rows i64 (B,) with their w f32 (B,), NaN where there is none, on the device."""
        dither_keys = devices.put(self.store.dither_keys(self.plane.view, rows).view(np.int64), self.device)
        weight = devices.put(self.plane.weight[rows], self.device)
        if self.codes.is_cuda:
            return EncodedPairs(self.codes, dither_keys, self.decoder, weight, devices.put(rows, self.device))
        # Page-locked, so that the copy runs beside the network.
        pinned = self.device.type == "cuda"
        staged = torch.empty((len(rows), self.codes.shape[1]), dtype=torch.uint8, pin_memory=pinned)
        torch.index_select(self.codes, 0, torch.from_numpy(rows), out=staged)
        return EncodedPairs(devices.put(staged, self.device), dither_keys, self.decoder, weight)


def epochs(
    store: Store, views: Iterator[int], device: torch.device, placement: str, folder: Path | None, held: int = 1
) -> Generator[Labels, None, None]:
    """The labels of `views`, in order; the next plane loads in the background while one is in use.

    `placement`: gpu, pinned (memory), mmap (a file in `folder`, paged by the system), or auto for the first of these
    that the plane fits. The processes of a job on one machine hold a plane together. Only the first plane is waited
    for, and shows its progress. `held`: planes in use at a time.
    """
    placement = place(store, device, placement, held)
    share = None
    if (world := ranks.local_world()) > 1:
        share = cache.Share(ranks.job(), ranks.local_rank(), world)
    mode = "mmap" if placement == "mmap" else "memory"
    with ExitStack() as waiting:
        advance = waiting.enter_context(progress("labels", store.manifest.blocks, "blocks"))
        for plane in cache.planes(store, views, mode=mode, folder=folder, progress=lambda *_: advance(1), share=share):
            waiting.close()
            codes = torch.from_numpy(plane.codes)
            if placement != "mmap" and device.type == "cuda":
                codes = codes.pin_memory()  # so that copies run beside the network
            yield Labels(store, plane, device, codes.to(device, non_blocking=True) if placement == "gpu" else codes)


def place(store: Store, device: torch.device, wanted: str, held: int = 1) -> str:
    """gpu, pinned or mmap. Raises UserError if `held` planes do not fit where they are wanted."""
    need = store.manifest.samples * store.codec.row_bytes * held
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    memory = available_memory()
    if wanted == "auto":
        return (
            "gpu"
            if need < _GPU_SHARE * free
            else "pinned"
            if (1 + 1 / held) * need < _MEMORY_SHARE * memory
            else "mmap"
        )
    room = {"gpu": free, "pinned": memory // 2}.get(wanted, need)
    if need > room:
        what = "no CUDA device" if wanted == "gpu" and device.type != "cuda" else f"{decimal(room)} free"
        raise UserError(
            f"a plane of labels does not fit --plane {wanted}",
            found=what,
            expected=decimal(need),
            fix="use --plane auto",
        )
    return wanted


def available_memory() -> int:
    """Bytes that the system could still hand out."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def decoder_of(codec: Codec, device: torch.device) -> Decoder:
    """What kernels must know of a codec, on the device."""
    if isinstance(codec, Features):
        weight, bias = (torch.from_numpy(array.copy()).to(device) for array in codec.head)
        inner = decoder_of(codec.code, device)
        return replace(inner, kind="features", classes=codec.classes, head=(weight, bias))
    name = codec.config["name"]
    if not isinstance(codec, Subspace):
        return Decoder(name, codec.classes)
    basis, scale = codec.array("basis"), codec.array("scale")
    largest = scale.reshape(-1, codec.dims).sum(axis=0).max()
    unit = 2.0 ** np.ceil(np.log2(largest * _LARGEST_STEP / 2**15))
    return Decoder(
        name,
        codec.classes,
        wide=codec.wide,
        beta=torch.from_numpy(codec.array("beta").astype(np.float32) / 256).to(device),
        basis=torch.from_numpy(np.pad(basis, ((0, 0), (0, -codec.classes % 16)))).to(device),
        scale=torch.from_numpy(scale / np.float32(unit)).to(device),
        unit=float(unit),
        mean=torch.from_numpy(codec.array("mean").copy()).to(device),
    )
