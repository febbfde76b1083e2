"""Small stores with known content, for the tests of `cache`."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

import cache
from cache import Manifest, Store
from cache import codec as codecs

VIEWS, SAMPLES, BLOCK_ROWS = 2, 50, 24  # two whole blocks and a short one
BLOCKED = ("pairs", "weight", "digest", "fidelity")


def manifest(**changes) -> Manifest:
    fields = dict(
        dataset="d1",
        samples=SAMPLES,
        classes=5,
        teacher="resnet",
        teacher_weights="w1",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        policy={"name": "p", "probability": 0.2, "ops": [["invert", 0.0], ["rotate", 20 / 3]]},
        base={"size": 32, "scale": [0.08, 1.0]},
        seed=2**64 - 1,
        views=VIEWS,
        size=32,
        decoder={"backend": "libjpeg-turbo"},
        codec={"name": "int8", "format": 1, "classes": 5},
        block_rows=BLOCK_ROWS,
        versions={"numpy": "2"},
        fidelity={"kl": {"4": 1e-06}},
    )
    return Manifest(**(fields | changes))


def status(samples: int = SAMPLES) -> np.ndarray:
    return (np.arange(samples) % 7 == 3).astype(np.uint8) * 2


def key_hash(samples: int = SAMPLES) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**64, 1 << 12, dtype=np.uint64)[:samples]


def make(path: Path | str, **changes) -> Store:
    made = manifest(**changes)
    return cache.create(path, made, status(made.samples), key_hash(made.samples))


def content(store: Store, view: int, block: int) -> tuple:
    """Random bytes of a block: pairs, weight, digest, fidelity, and energy where the store keeps it."""
    rng = np.random.default_rng((view, block))
    start, stop = store.block_range(block)
    pairs = rng.integers(0, 256, (stop - start, store.codec.row_bytes), dtype=np.uint8)
    weight = (rng.integers(0, 2**21, stop - start) / 2**20).astype(np.float32)
    found = pairs, weight, rng.integers(0, 2**32, stop - start, dtype=np.uint32), (view + 0.5, block + 0.25)
    energy = (rng.integers(-(2**13), 2**13, (stop - start, 2)) / 2**8).astype(np.float32)
    return (*found, energy) if store.energies else found


def fill(store: Store) -> Store:
    for view, block in store.missing_blocks():
        store.write_block(view, block, *content(store, view, block))
    return store


def assert_exact_block(store: Store, view: int, block: int) -> None:
    for got, wanted in zip(store.read_block(view, block), content(store, view, block), strict=False):
        np.testing.assert_array_equal(got, wanted)


def assert_exact(store: Store, view: int) -> None:
    plane = store.load_plane(view)
    expected = [content(store, view, block)[:3] for block in range(store.manifest.blocks)]
    for got, parts in zip((plane.codes, plane.weight, plane.digest), zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(got, np.concatenate(parts))
    if store.energies:
        energy = np.concatenate([content(store, view, block)[4] for block in range(store.manifest.blocks)])
        np.testing.assert_array_equal(plane.energy, energy)


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store, without what a killed write left beside its target."""
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if "#" not in name}


def chunk(path: Path, name: str, view: int, block: int) -> Path:
    return path / name / "c" / str(view) / str(block) / ("0" if name in ("pairs", "fidelity") else "")


def framed(data: bytes) -> bytes:
    """A chunk with the checksum that fits."""
    return data + google_crc32c.value(data).to_bytes(4, "little")


@dataclass(frozen=True)
class Zipped:
    """Stands in for codecs that pack: codes of 2 · classes bytes, deflated after they met their dither keys."""

    classes: int
    packed = True

    @property
    def row_bytes(self) -> int:
        return 2 * self.classes

    def pack(self, codes: np.ndarray, dither_keys: np.ndarray) -> bytes:
        return zlib.compress(self._with(codes, dither_keys).tobytes())

    def unpack(self, data: bytes, dither_keys: np.ndarray) -> np.ndarray:
        try:
            codes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(-1, self.row_bytes)
        except zlib.error as error:
            raise ValueError(f"not deflated: {error}") from error
        return self._with(codes, dither_keys)

    def _with(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        return codes ^ (dither_keys[:, None] >> np.arange(0, 16, 16 / self.row_bytes).astype(np.uint64)).astype(
            np.uint8
        )


def zipped(monkeypatch) -> dict:
    """Let every config be that of `Zipped`; returns what to change in a manifest."""
    monkeypatch.setattr(codecs, "from_config", lambda config, where="codec": Zipped(config["classes"]))
    return {"codec": {"name": "zipped", "format": 1, "classes": 5}}
