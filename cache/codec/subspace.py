"""`subspace`: logits as dithered integers along the principal directions of the teacher's logits.

A vector of logits, centred (softmax does not see its mean), less the mean over the data, is projected on directions
b_i, and its coefficient along b_i is rounded with a dither u that the reader subtracts again (Gray & Stockham,
*Dithered quantizers*, 1993): decoded = mean + sum_i (q_i - beta_i u_i) step_i b_i. The expectation over the dither is
the truth, whatever the logits; the errors are independent between pairs. Students average such errors away, whereas
they learn a bias, be it a smaller one.

A pair's views are alike. So what is rounded is not each view, but half their sum and half their difference (their
Karhunen-Loeve transform, where both vary alike), with steps of their own: original = mean + sum + difference,
augmented = mean + sum - difference. Codes of version 1 kept the views themselves.

Steps and beta are chosen per direction and segment. A direction of spread s costs the rate I(s / step) (the mutual
information of x and x + u) and adds the noise step^2 D(s / step), which KL at T feels with the weight g_i; `fit`
minimises the sum of rates for a sum of g_i step_i^2 D. beta < 1 trades the independence of the noise's variance for
less of it where s is small against the step: with beta = 1 even a direction that never moves would be noisy. Errors
stay unbiased, because E[u] = 0.
"""

import base64
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cache.codec import entropy
from cache.codec.base import MAX_CLASSES, RESTORE, checked_codes, checked_keys, require_encodable, untouched
from cache.errors import UserError
from cache.outside import require, whole

MAX_DIMS = 4096

_THREADS, _LEAST_PAIRS = 4, 16  # that quantise a batch, and pairs of each
_ALIGN = 16  # bytes: a view's segment can be read in vectors
_MAX_BYTES = 1 << 32
_HEADER = 5  # number of pairs, and whether their dither keys are left out
_KEY_BYTES = 8
_STATES = {1: 8, 3: 256, 4: 256}
"""Versions -> states of the trellis."""
_HEADER_FORMAT = {1: 2, 3: 3, 4: 4}
"""Versions, which are a config's format -> that of the header beside arrays."""
CONFIG_FORMATS, HEADER_FORMATS = tuple(_HEADER_FORMAT), tuple(_HEADER_FORMAT.values())
_RANGES = (  # of the arrays' values
    ("mean", -1e6, 1e6),
    ("scale", 1e-12, 1e6),
    ("beta", 0, entropy.TRELLIS_DITHER * entropy.BETA_UNIT),
    ("spread", 1, 1 << 20),
    ("gain", -(1 << 15), (1 << 15) - 1),
)
_FIELDS = {  # array -> dtype, shape in terms of classes and dims
    "mean": ("<f4", "c"),
    "basis": ("i1", "dc"),
    "scale": ("<f4", "2d"),
    "beta": ("<u2", "2d"),
    "spread": ("<i4", "2d"),
    "gain": ("<i2", "d"),
}
_OLD = {"scale": ("<f4", "d"), "beta": ("<u2", "d")}
"""In version 1, for both segments."""
_SIZES = ("classes", "dims", "trellis", "wide")
CONFIG_KEYS = (*_SIZES, *_FIELDS)
HEADER_KEYS = (*_SIZES, "arrays")
_AXES = {"c": "class", "d": "direction", "2": "image"}


def _fields(version: int) -> dict[str, tuple[str, str]]:
    return _FIELDS | _OLD if version == 1 else _FIELDS


@dataclass(frozen=True)
class Subspace:
    """One fitted code. Arrays are little-endian bytes, so that equality and JSON come for free.

    A pair's codes are its dither key, u64, eight zeros, and two segments: `wide` signed bytes, then
    the other coefficients as nibbles (the first half of them low, the second high), padded to a multiple of 16 bytes.
    """

    version: int
    """4; 3, which does not look ahead; or 1, whose segments are the views, whose scale and beta are both segments', and
    whose trellis is smaller."""
    classes: int
    dims: int
    """d, directions."""
    trellis: tuple[int, int]
    """Leading coefficients of each segment that are rounded together, see `cache.codec.entropy`."""
    wide: int
    """Coefficients that take a whole byte; the others keep within [-8, 7]."""
    mean: bytes
    """f32 (C,) of the centred logits."""
    basis: bytes
    """i8 (d, C); times `scale` a direction of the length of its step."""
    scale: bytes
    """f32 (2, d)."""
    beta: bytes
    """u16 (2, d), share of the dither that decoding subtracts, in 1/256."""
    spread: bytes
    """i32 (2, d), standard deviations of the entropy models in 1/512 step, of the second segment given the first."""
    gain: bytes
    """i16 (d,), prediction of the second segment's coefficient from the first's, in 1/4096."""

    packed = True

    @property
    def sums(self) -> bool:
        """Whether the segments are half the sum and half the difference of the views."""
        return self.version != 1

    @property
    def states(self) -> int:
        """Of the trellis."""
        return _STATES[self.version]

    @property
    def looks_ahead(self) -> bool:
        """Whether the entropy code of a coefficient on the trellis sees the dither of those after it."""
        return self.version > 3

    @property
    def segment(self) -> int:
        """Bytes of one of a pair's two segments."""
        return -(-(self.wide + (self.dims - self.wide + 1) // 2) // _ALIGN) * _ALIGN

    @property
    def row_bytes(self) -> int:
        return _ALIGN + 2 * self.segment

    @property
    def sizes(self) -> dict:
        """What a config and a header say beside the arrays."""
        trellis = list(self.trellis) if self.sums else self.trellis[0]
        return {"classes": self.classes, "dims": self.dims, "trellis": trellis, "wide": self.wide}

    @property
    def config(self) -> dict:
        """JSON-safe; `from_config` gives an equal codec."""
        arrays = {name: base64.b64encode(getattr(self, name)).decode() for name in _FIELDS}
        return {"name": "subspace", "format": self.version, **self.sizes, **arrays}

    def array(self, name: str) -> np.ndarray:
        """A field as the array that it is; `scale` and `beta` of version 1 are (d,)."""
        dtype, shape = _fields(self.version)[name]
        lengths = {"c": self.classes, "d": self.dims, "2": 2}
        return np.frombuffer(getattr(self, name), dtype).reshape([lengths[axis] for axis in shape])

    def of_both(self, name: str) -> np.ndarray:
        """`scale` or `beta` of both segments, (2, d), whatever the version."""
        return np.broadcast_to(self.array(name), (2, self.dims))

    @property
    def joint(self) -> np.ndarray:
        """bool (2, d): whether a coefficient is on the trellis."""
        return np.arange(self.dims) < np.array(self.trellis)[:, None]

    @cached_property
    def _synthesis(self) -> np.ndarray:
        return self.array("basis").astype(np.float32)

    @cached_property
    def _analysis(self) -> np.ndarray:
        # The rounded directions are not quite orthonormal; least squares does not mind.
        basis = self.array("basis").astype(np.float64)
        return np.linalg.solve(basis @ basis.T, basis).T.astype(np.float32)

    @cached_property
    def _trellis(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.trellis), entropy.labels(self.states)

    @cached_property
    def _models(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        beta = self.of_both("beta")[0]
        return self.array("spread").astype(np.int64), self.array("gain").astype(np.int64), beta.astype(np.int64)

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """Centred logits f32 (B, 2, C) -> coefficients of both segments in steps, f32 (B, 2, d)."""
        along = (vectors - self.array("mean")).reshape(-1, self.classes) @ self._analysis
        along = along.reshape(len(vectors), 2, self.dims)
        return (turned(along) / 2 if self.sums else along) / self.of_both("scale")

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C), u64 (B,) -> u8 (B, row_bytes). Raises UserError for logits that no codec keeps."""
        require_encodable(logits, self.classes)
        return self.quantised(logits - logits.mean(axis=2, keepdims=True), dither_keys)

    def quantised(self, vectors: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """`encode` of vectors f32 (B, 2, C) as they are, centred or not."""
        segments = np.empty((len(vectors), 2, self.segment), np.uint8)
        dither_keys, steps = checked_keys(dither_keys, len(segments)), self.project(vectors)
        # Threads, as one core codes fewer vectors a second than a GPU's teacher makes.
        size = max(_LEAST_PAIRS, -(-len(segments) // min(_THREADS, len(os.sched_getaffinity(0)))))

        def quantise(at: int) -> None:
            part = slice(at, at + size)
            entropy.quantise(steps[part], dither_keys[part], *self._trellis, self.wide, segments[part])

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="quantise") as pool:
            list(pool.map(quantise, range(0, len(segments), size)))
        return self._codes(segments, dither_keys)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C); centred, each vector's mean is zero but for rounding.

        `dither_keys` u64 (B,) stand in for those that the codes carry.
        """
        segments, carried = self._parts(codes)
        dither_keys = carried if dither_keys is None else checked_keys(dither_keys, len(segments))
        steps = np.empty((len(segments), 2, self.dims), np.float32)
        entropy.dequantise(segments, dither_keys, self.wide, self.of_both("beta").astype(np.int32), steps)
        along = steps * self.of_both("scale")
        along = turned(along) if self.sums else along
        decoded = along.reshape(-1, self.dims) @ self._synthesis + self.array("mean")
        return decoded.reshape(len(segments), 2, self.classes)

    def pack(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> bytes:
        """Entropy code of codes u8 (B, row_bytes).

        With `dither_keys` u64 (B,) given they are left out, as `unpack` will be given them too; zeros are then a pair
        without labels. Raises ValueError for codes that `encode` does not make, or of other keys.
        """
        segments, carried = self._parts(codes)
        there = codes.any(axis=1)
        if dither_keys is not None and (carried != checked_keys(dither_keys, len(segments)))[there].any():
            raise ValueError("codes of other dither keys")
        segments, carried = segments[there], carried[there]
        words = np.empty(2 * self.dims * len(segments) + 2, "<u4")
        used = entropy.encode(segments, carried, *self._trellis, self.looks_ahead, self.wide, *self._models, words)
        if not used or codes[:, _KEY_BYTES:_ALIGN].any():
            raise ValueError("codes that no logits make")
        kept = b"" if dither_keys is not None else carried.astype("<u8").tobytes()
        head = len(codes).to_bytes(4, "little") + bytes([dither_keys is not None])
        return head + np.packbits(there).tobytes() + kept + words[len(words) - used :].tobytes()

    def unpack(self, data: bytes, dither_keys: np.ndarray | None = None) -> np.ndarray:
        """What `pack` was given: u8 (B, row_bytes). Raises ValueError for bytes that are no code of such codes."""
        if len(data) < _HEADER or data[4] > 1:
            raise ValueError("no packed codes")
        count, left_out = int.from_bytes(data[:4], "little"), data[4] == 1
        if left_out and dither_keys is None:
            raise ValueError("codes packed with their dither keys cannot be unpacked without")
        if dither_keys is not None and count != len(dither_keys):
            raise ValueError(f"{count} packed codes, expected {len(dither_keys)}")
        if count * self.row_bytes > _MAX_BYTES:
            raise ValueError(f"{count} packed codes would take more than {_MAX_BYTES} bytes")
        at = _HEADER + -(-count // 8)
        if len(data) < at:
            raise ValueError("packed codes cut short")
        there = np.unpackbits(np.frombuffer(data, np.uint8, at - _HEADER, _HEADER), count=count).astype(bool)
        if np.packbits(there).tobytes() != data[_HEADER:at]:
            raise ValueError("no packed codes")
        if left_out:
            assert dither_keys is not None  # refused above
            dither_keys = checked_keys(dither_keys, count)[there]
        else:
            size = 8 * int(there.sum())
            if len(data) < at + size:
                raise ValueError("packed codes cut short")
            dither_keys = np.frombuffer(data, "<u8", size // 8, at).astype(np.uint64)
            at += size
        if (len(data) - at) % 4:
            raise ValueError("packed codes cut short")
        segments = untouched((len(dither_keys), 2, self.segment))
        words = np.frombuffer(data, "<u4", offset=at)
        if not entropy.decode(words, dither_keys, *self._trellis, self.looks_ahead, self.wide, *self._models, segments):
            raise ValueError("packed codes that do not end where they should")
        codes = untouched((count, self.row_bytes))
        codes[there] = self._codes(segments, dither_keys)
        return codes

    def _codes(self, segments: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        codes = np.zeros((len(segments), self.row_bytes), np.uint8)
        codes[:, :_KEY_BYTES] = dither_keys.astype("<u8").view(np.uint8).reshape(-1, _KEY_BYTES)
        codes[:, _ALIGN:] = segments.reshape(len(segments), 2 * self.segment)
        return codes

    def _parts(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Segments u8 (B, 2, segment) and dither keys u64 (B,) of codes."""
        codes = checked_codes(codes, self)
        carried = codes[:, :_KEY_BYTES].copy().view("<u8").astype(np.uint64).reshape(len(codes))
        return np.ascontiguousarray(codes[:, _ALIGN:]).reshape(len(codes), 2, self.segment), carried


def turned(pairs: np.ndarray) -> np.ndarray:
    """Sums and differences of pairs (B, 2, …), which are twice the pairs again of those."""
    return np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)


def split(codec: Subspace) -> tuple[dict, dict[str, np.ndarray]]:
    """What a store keeps: a header, which is JSON and holds a digest of the arrays, and the arrays."""
    arrays = {name: codec.array(name) for name in _FIELDS}
    header = {"name": "subspace", "format": _HEADER_FORMAT[codec.version], **codec.sizes, "arrays": _digest(arrays)}
    return header, arrays


def array_shapes(header: dict, where: str) -> dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Of the arrays of a header from outside: name -> type, axes, shape. Raises UserError naming the key."""
    version = _version(header, HEADER_FORMATS)
    return _shapes(version, _sizes(header, version, where))


def _shapes(version: int, sizes: dict) -> dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]]:
    lengths = {"c": sizes["classes"], "d": sizes["dims"], "2": 2}
    return {
        name: (dtype, tuple(_AXES[axis] for axis in shape), tuple(lengths[axis] for axis in shape))
        for name, (dtype, shape) in _fields(version).items()
    }


def _version(config: dict, formats: tuple[int, ...]) -> int:
    return CONFIG_FORMATS[formats.index(config["format"])]


def join(header: dict, arrays: dict[str, np.ndarray], where: str) -> dict:
    """The config of a header from outside and its arrays. Raises UserError for arrays that are not its own."""
    digest = _digest(arrays)
    require(header["arrays"] == digest, header["arrays"], f"{where}: arrays", RESTORE, digest)
    texts = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
    version = _version(header, HEADER_FORMATS)
    return {"name": "subspace", "format": version, **{name: header[name] for name in _SIZES}, **texts}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in _FIELDS:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _sizes(config: dict, version: int, where: str) -> dict:
    sizes: dict = {}
    for name, low, bound in (("classes", 2, ""), ("dims", 1, "classes"), ("trellis", 0, "dims"), ("wide", 0, "dims")):
        high = min(MAX_DIMS, sizes[bound]) if bound else MAX_CLASSES
        given, what = config[name], f"{where}: {name}"
        if name != "trellis" or version == 1:
            sizes[name] = whole(given, what, RESTORE, low, high)
        else:
            require(type(given) is list and len(given) == 2, given, what, RESTORE, "a list of two numbers")
            sizes[name] = tuple(whole(value, what, RESTORE, low, high) for value in given)
    if version == 1:
        sizes["trellis"] = (sizes["trellis"],) * 2
    return sizes


def from_base64(text: object, size: int, where: str) -> bytes:
    """So many bytes. Raises UserError."""
    found, data = f"{len(text)} characters" if type(text) is str else type(text).__name__, b""
    if type(text) is str and len(text) == 4 * -(-size // 3):
        try:
            data = base64.b64decode(text, validate=True)
            found = f"{len(data)} bytes"
        except ValueError as error:
            found = error
    if len(data) != size:
        raise UserError(where, found=found, expected=f"{size} bytes in base64", fix=RESTORE)
    return data


def from_config(config: dict, where: str) -> Subspace:
    """The codec of a config from outside, every value checked. Raises UserError naming the key."""
    version = _version(config, CONFIG_FORMATS)
    fields = _sizes(config, version, where)
    for name, (dtype, _, shape) in _shapes(version, fields).items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        fields[name] = from_base64(config[name], size, f"{where}: {name}")
    codec = Subspace(version, **fields)
    for name, low, high in _RANGES:
        values = codec.array(name).astype(np.float64)
        good = bool(((values >= low) & (values <= high)).all())  # NaN compares false
        require(good, "a value beyond", f"{where}: {name}", RESTORE, f"values in [{low:g}, {high:g}]")
    good = not (codec.of_both("beta")[~codec.joint] > entropy.BETA_UNIT).any()
    require(good, "a value beyond", f"{where}: beta", RESTORE, f"at most {entropy.BETA_UNIT} off the trellis")
    return codec
