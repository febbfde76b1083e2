"""How others store soft labels, made anew to be compared with; nothing here is offered to users.

Each format is a codec of pairs as `cache.codec` has them. What a row holds, and in how many bytes, is the peer's; what
it costs on disk is `pack`, the smallest of several lossless stages, whether the peer has one or not. Where a peer
leaves room, the caller chooses what suits it best: `temperature` is the T at which probabilities are stored (peers
take 1; the student's own T keeps most), and `tail` is where the mass goes that was not kept, spread evenly over the
other classes or dropped and the kept classes scaled to sum to 1.

`decode` gives logits z such that the student is taught softmax(z / T): T_stored · log p, and `ABSENT` for a class
without mass, which softmax makes exactly zero up to T = 50.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numcodecs import Blosc
from pcodec import ChunkConfig, standalone  # pyright: ignore[reportAttributeAccessIssue]

from cache.philox import philox

Tail = Literal["uniform", "zero"]

ABSENT = -1e4
_LEAST = 1e-8  # probabilities below are taken for it, as DistillKit's densify.py does
_REPLAY_KEY, _SAMPLE_KEY = 0x5245504C, 0x52534B44  # keys of Philox: what a row draws differs by use


# --- codes of bytes, and their lossless stage


@dataclass(frozen=True)
class Field:
    """`count` numbers of every vector."""

    name: str
    dtype: str
    count: int
    bits: int = 0
    """Unsigned integers in so many bits each, the lowest first; 0: as they lie in memory."""

    @property
    def size_bytes(self) -> int:
        return -(-self.count * self.bits // 8) if self.bits else self.count * np.dtype(self.dtype).itemsize


class _Peer:
    """What the formats share: codes made of fields, of the original and then of the augmented view."""

    packed = True
    layout: tuple[Field, ...]

    @property
    def row_bytes(self) -> int:
        return 2 * sum(field.size_bytes for field in self.layout)

    @property
    def config(self) -> dict:
        """JSON-safe."""
        return {"format": type(self).__name__.lower(), **dataclasses.asdict(self)}  # pyright: ignore[reportArgumentType]

    def pack(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> bytes:
        """u8 (B, row_bytes) -> the smallest of some lossless codes of it, field by field."""
        parts = [smallest(numbers) for numbers in read(codes, self.layout).values()]
        return b"".join([len(codes).to_bytes(4, "little"), *parts])

    def unpack(self, data: bytes, dither_keys: np.ndarray | None = None) -> np.ndarray:
        """What `pack` was given."""
        count, data = int.from_bytes(data[:4], "little"), data[4:]
        numbers = {}
        for field in self.layout:
            numbers[field.name], data = expanded(data, field.dtype, (count, 2, field.count))
        return write(numbers, self.layout)


def write(numbers: dict[str, np.ndarray], layout: tuple[Field, ...]) -> np.ndarray:
    """Fields, each (B, 2, count), -> codes u8 (B, row_bytes)."""
    parts = []
    for field in layout:
        part = np.ascontiguousarray(numbers[field.name], field.dtype).view(np.uint8)
        if field.bits:
            part = part.reshape(*part.shape[:2], field.count, -1)
            bits = np.unpackbits(part, axis=-1, count=field.bits, bitorder="little")
            part = np.packbits(bits.reshape(*part.shape[:2], -1), axis=-1, bitorder="little")
        parts.append(part)
    codes = np.concatenate(parts, axis=2)
    return codes.reshape(len(codes), -1)


def read(codes: np.ndarray, layout: tuple[Field, ...]) -> dict[str, np.ndarray]:
    """Codes u8 (B, row_bytes) -> fields, each (B, 2, count)."""
    vectors = codes.reshape(len(codes), 2, -1)
    numbers, at = {}, 0
    for field in layout:
        part = vectors[..., at : at + field.size_bytes]
        at += field.size_bytes
        if field.bits:
            bits = np.unpackbits(part, axis=-1, count=field.count * field.bits, bitorder="little")
            wide = np.zeros((*part.shape[:2], field.count, 8 * np.dtype(field.dtype).itemsize), np.uint8)
            wide[..., : field.bits] = bits.reshape(*part.shape[:2], field.count, field.bits)
            part = np.packbits(wide, axis=-1, bitorder="little").reshape(*part.shape[:2], -1)
        numbers[field.name] = np.ascontiguousarray(part).view(field.dtype)
    return numbers


_ZSTD = Blosc(cname="zstd", clevel=7, shuffle=Blosc.BITSHUFFLE)


def smallest(numbers: np.ndarray) -> bytes:
    """Code (n, 2, count) losslessly: as it is, bit-shuffled under zstd, or by pcodec; by vector or by column.

    A byte says which; then the length in 4 bytes, and the code.
    """
    codes = [np.ascontiguousarray(numbers).tobytes()]
    for order in (numbers, numbers.reshape(-1, numbers.shape[2]).T):
        flat = np.ascontiguousarray(order).ravel()
        codes.append(bytes(_ZSTD.encode(flat)))
        codes.append(standalone.simple_compress(flat, ChunkConfig(enable_8_bit=True)))
    method = min(range(len(codes)), key=lambda i: len(codes[i]))
    return bytes([method]) + len(codes[method]).to_bytes(4, "little") + codes[method]


def expanded(data: bytes, dtype: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, bytes]:
    """What `smallest` was given, and the bytes after its code."""
    method, size = data[0], int.from_bytes(data[1:5], "little")
    code, rest = data[5 : 5 + size], data[5 + size :]
    if method == 0:
        flat = np.frombuffer(code, dtype)
    elif method % 2:
        flat = np.frombuffer(bytes(_ZSTD.decode(code)), dtype)
    else:
        flat = np.asarray(standalone.simple_decompress(code))
    return (flat.reshape(shape[2], -1).T if method > 2 else flat).reshape(shape), rest


# --- the formats


@dataclass(frozen=True)
class TopK(_Peer):
    """The k largest probabilities, the largest first, and what it takes to make the view again."""

    name: str
    classes: int
    k: int
    temperature: float
    tail: Tail
    value: str
    """dtype of a probability."""
    index: str
    """dtype of a class."""
    replay: tuple[Field, ...] = ()

    @property
    def layout(self) -> tuple[Field, ...]:
        return (*self.replay, Field("index", self.index, self.k), Field("value", self.value, self.k))

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C), u64 (B,) -> u8 (B, row_bytes)."""
        index, log_p = _top(logits, self.k, self.temperature)
        return write({"index": index, "value": np.exp(log_p), **_replay(self.replay, dither_keys)}, self.layout)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C)."""
        numbers = read(codes, self.layout)
        p = numbers["value"].astype(np.float32)
        return _dense(numbers["index"], p, self.classes, self.temperature, self.tail)


def fkd(classes: int, temperature: float = 4.0, tail: Tail = "uniform") -> TopK:
    """FKD (Shen & Xing, ECCV 2022), `marginal_smoothing_k5` (tail uniform) or `marginal_renorm` of utils_FKD.py.

    57 bytes: class and probability as float32 (FKD_SLG/generate_soft_label.py), four crop coordinates, the flip.
    """
    replay = (Field("crop", "<f4", 4), Field("flip", "u1", 1))
    return TopK("fkd", classes, 5, temperature, tail, "<f4", "<f4", replay)


def tinyvit(classes: int, k: int, temperature: float = 4.0, tail: Tail = "uniform") -> TopK:
    """TinyViT (Wu et al., ECCV 2022): 4 + 4k bytes, a 31-bit seed, int16 classes, float16 probabilities.

    microsoft/Cream TinyViT/save_logits.py; main.py spreads the rest of the mass evenly.
    """
    return TopK("tinyvit", classes, k, temperature, tail, "<f2", "<i2", (Field("seed", "<i4", 1),))


def apple(classes: int, temperature: float = 4.0, tail: Tail = "uniform") -> TopK:
    """ml-dr (Faghri et al., ICCV 2023): top 10, `densify: smooth` of dr/utils.py as in configs/imagenet/plus.yaml.

    ml-dr pickles lists of Python numbers and compresses the file, 65 to 104 bytes a view with its operations. Here
    it gets what they hold at the least, 69 bytes: float32 probabilities, two bytes a class, crop and flip.
    """
    replay = (Field("crop", "<u2", 4), Field("flip", "u1", 1))
    return TopK("apple", classes, 10, temperature, tail, "<f4", "<u2", replay)


@dataclass(frozen=True)
class DistillKit(_Peer):
    """arcee-ai/DistillKit's "budget pick" (README.md): the k largest log-probabilities, one as bfloat16, the others
    as a + b t + c sqrt(t) of their rank t, three float32; classes in as few bits as tell them apart.

    distillkit/compression/config.py counts the bits: 114 bytes for a vocabulary of 2^16, 77 for 1000 classes.
    `tail` is its `missing_probability_handling`.
    """

    classes: int
    k: int = 50
    temperature: float = 4.0
    tail: Tail = "zero"
    name: str = "distillkit"

    @property
    def layout(self) -> tuple[Field, ...]:
        index = Field("index", "<u2", self.k, bits=_bits(self.classes))
        return index, Field("first", "<u2", 1), Field("terms", "<f4", 3)

    @property
    def _curve(self) -> np.ndarray:
        rank = np.arange(self.k - 1, dtype=np.float32)
        return np.stack([np.ones_like(rank), rank, np.sqrt(rank)])

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C) -> u8 (B, row_bytes)."""
        index, log_p = _top(logits, self.k, self.temperature)
        first = np.ascontiguousarray(log_p[..., :1]).view("<u4") + 0x8000 >> 16  # round to the nearest bfloat16
        terms = log_p[..., 1:] @ np.linalg.pinv(self._curve)
        return write({"index": index, "first": first, "terms": terms}, self.layout)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C)."""
        numbers = read(codes, self.layout)
        first = (numbers["first"].astype("<u4") << 16).view("<f4")
        log_p = np.concatenate([first, numbers["terms"] @ self._curve], axis=2)
        return _dense(numbers["index"], np.exp(log_p), self.classes, self.temperature, self.tail)


@dataclass(frozen=True)
class Sampled(_Peer):
    """Random Sampling KD (Anshumann et al., *Sparse Logit Sampling*, ACL 2025): classes drawn from the teacher's own
    distribution, with replacement; a class's share of the draws is its probability, unbiased.

    A vector is kept as the `draws` classes in ascending order, each in as few bits as tell 1000 apart: 125 bytes for
    100 draws. At T = 4 nearly all differ, so that classes with counts (3 bytes a class in the paper) would take more.
    """

    classes: int
    draws: int
    temperature: float = 4.0
    name: str = "rskd"

    @property
    def layout(self) -> tuple[Field, ...]:
        return (Field("index", "<u2", self.draws, bits=_bits(self.classes)),)

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C), u64 (B,) -> u8 (B, row_bytes); a function of both, as the draws are of the keys."""
        below = (
            np.exp(_log_softmax(logits, self.temperature), dtype=np.float64).cumsum(axis=2).reshape(-1, self.classes)
        )
        below /= below[:, -1:]
        uniform = (_words(dither_keys, self.draws, _SAMPLE_KEY) + 0.5) * 2.0**-32
        uniform = np.sort(uniform, axis=2).reshape(len(below), -1)
        # One search for all: vector i's cumulative probabilities are moved to [i, i + 1].
        vector = np.arange(len(below))[:, None]
        index = np.searchsorted((below + vector).ravel(), (uniform + vector).ravel()).reshape(uniform.shape)
        index = np.minimum(index - vector * self.classes, self.classes - 1)
        return write({"index": index.reshape(len(logits), 2, -1)}, self.layout)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C)."""
        index = read(codes, self.layout)["index"].reshape(2 * len(codes), -1).astype(np.int64)
        index += np.arange(len(index))[:, None] * self.classes
        counts = np.bincount(index.ravel(), minlength=2 * len(codes) * self.classes)
        share = np.arange(1, self.draws + 1) / self.draws
        logits = np.concatenate([[ABSENT], self.temperature * np.log(share)]).astype(np.float32)
        return logits[counts].reshape(len(codes), 2, self.classes)


@dataclass(frozen=True)
class PerRow(_Peer):
    """Uniform steps between each vector's smallest and largest logit, both kept as float16 offset and step.

    A `share` below 1 of all labels stands for pruning as in LPLD and LPQLD: students see those pairs alone, again.
    """

    classes: int
    bits: int
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def layout(self) -> tuple[Field, ...]:
        q = Field("q", "u1", self.classes, bits=self.bits if self.bits < 8 else 0)
        return Field("offset", "<f2", 1), Field("step", "<f2", 1), q

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C) -> u8 (B, row_bytes)."""
        levels = (1 << self.bits) - 1
        low, high = logits.min(axis=2, keepdims=True), logits.max(axis=2, keepdims=True)
        # Rounded outwards, so that the steps reach from one end to the other.
        offset = low.astype("<f2")
        offset = np.where(offset > low, np.nextafter(offset, np.float16(-np.inf)), offset)
        width = (high - offset.astype(np.float32)) / levels
        step = width.astype("<f2")
        step = np.where(step < width, np.nextafter(step, np.float16(np.inf)), step)
        q = np.rint((logits - offset.astype(np.float32)) / np.where(step > 0, step, 1).astype(np.float32))
        return write({"offset": offset, "step": step, "q": np.minimum(q, levels).astype(np.uint8)}, self.layout)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C)."""
        numbers = read(codes, self.layout)
        return numbers["q"] * numbers["step"].astype(np.float32) + numbers["offset"].astype(np.float32)


@dataclass(frozen=True)
class Dense(_Peer):
    """All logits as float16 and 28 bytes of parameters: 2,028 bytes, as SRe2L (Yin et al., NeurIPS 2023) and LPLD
    (Xiao & He, NeurIPS 2024) keep them."""

    classes: int
    name: str = "dense"

    @property
    def layout(self) -> tuple[Field, ...]:
        return Field("logits", "<f2", self.classes), Field("view", "<u4", 7)

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C), u64 (B,) -> u8 (B, row_bytes)."""
        return write({"logits": logits, **_replay(self.layout[1:], dither_keys)}, self.layout)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C)."""
        return read(codes, self.layout)["logits"].astype(np.float32)


# --- common arithmetic


def _bits(classes: int) -> int:
    return max(1, math.ceil(math.log2(classes)))


def _log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """f32 (B, 2, C) at a temperature, computed in float32."""
    scaled = (logits - logits.max(axis=2, keepdims=True)) / np.float32(temperature)
    return scaled - np.log(np.exp(scaled).sum(axis=2, keepdims=True))


def _top(logits: np.ndarray, k: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(classes i64, log-probabilities f32) of the k largest, the largest first: (B, 2, k)."""
    log_p = _log_softmax(logits, temperature)
    index = np.argpartition(-log_p, k - 1, axis=2)[..., :k]
    kept = np.take_along_axis(log_p, index, axis=2)
    order = np.argsort(-kept, axis=2, kind="stable")
    return np.take_along_axis(index, order, axis=2), np.take_along_axis(kept, order, axis=2)


def _dense(index: np.ndarray, p: np.ndarray, classes: int, temperature: float, tail: Tail) -> np.ndarray:
    """Logits f32 (B, 2, C) of the kept classes and probabilities, both (B, 2, k), and of what becomes of the others."""
    kept = temperature * np.log(np.maximum(p, _LEAST))
    others = np.float32(ABSENT)
    if tail == "uniform":
        rest = (1 - p.sum(axis=2, keepdims=True)) / max(1, classes - p.shape[2])
        others = temperature * np.log(np.maximum(rest, _LEAST))
    logits = np.empty((*p.shape[:2], classes), np.float32)
    logits[:] = others
    np.put_along_axis(logits, index.astype(np.int64), kept.astype(np.float32), axis=2)
    return logits


def _words(dither_keys: np.ndarray, count: int, key: int) -> np.ndarray:
    """u32 (B, 2, count), random words of each view of a pair."""
    low, high = (dither_keys & np.uint64(0xFFFFFFFF))[:, None, None], (dither_keys >> np.uint64(32))[:, None, None]
    words = philox((low, high, np.arange(2)[:, None], np.arange(-(-count // 4))), key)
    return words.reshape(len(dither_keys), 2, -1)[..., :count]


def _replay(fields: tuple[Field, ...], dither_keys: np.ndarray) -> dict[str, np.ndarray]:
    """Stand-ins for the parameters of a view: coordinates in [0, 1), coins for single bytes, else any integers."""
    numbers = {}
    for field in fields:
        words = _words(dither_keys, field.count, _REPLAY_KEY)
        kind = np.dtype(field.dtype)
        bits = 1 if kind.itemsize == 1 else 8 * kind.itemsize - (kind.kind == "i")
        numbers[field.name] = words * 2.0**-32 if kind.kind == "f" else words >> np.uint32(32 - bits)
    return numbers
