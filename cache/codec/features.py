"""`features`: what a teacher's last linear layer is given, and the layer itself: one code serves features and logits.

Features are coded as `cache.codec.subspace` codes logits, but not centred: dithered, unbiased integers along their
principal directions. The head, weight and bias, is kept with the code, and logits are the head's of the decoded
features, so that they are unbiased too. What their noise costs is measured in those logits, by the KL divergence. A
head of fewer classes than features does not feel all of them: a share `NOISE` of the features' variance, were it all
noise, is priced like the whole budget, and both prices add up to it.
"""

import base64
import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cache.codec import fitting, subspace
from cache.codec.base import MAX_CLASSES, RESTORE, require_encodable, require_keys
from cache.codec.fidelity import TEMPERATURE, divergences
from cache.codec.fitting import Directions
from cache.codec.subspace import Subspace
from cache.outside import require, whole

NOISE = 0.2
CONFIG_KEYS, CONFIG_FORMATS = ("classes", "code", "weight", "bias"), (1,)
HEADER_KEYS, HEADER_FORMATS = ("classes", "code", "head"), (2,)
_FEWER = "take more samples, or leave --features out"
_MAX_HEAD = 1e6  # of a weight, as of a code's own arrays


@dataclass(frozen=True)
class Features:
    """A code of features, and the head that makes logits of them; codes and their packing are those of `code`."""

    code: Subspace
    """Of features: its `classes` are their number F."""
    classes: int
    """C."""
    weight: bytes
    """f32 (C, F)."""
    bias: bytes
    """f32 (C,)."""

    packed = True

    @property
    def width(self) -> int:
        """F."""
        return self.code.classes

    @property
    def row_bytes(self) -> int:
        return self.code.row_bytes

    @property
    def config(self) -> dict:
        """JSON-safe; `from_config` gives an equal codec."""
        head = {name: base64.b64encode(getattr(self, name)).decode() for name in ("weight", "bias")}
        return {"name": "features", "format": 1, "classes": self.classes, "code": self.code.config, **head}

    @cached_property
    def head(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight f32 (C, F) and bias f32 (C,)."""
        weight = np.frombuffer(self.weight, "<f4").reshape(self.classes, self.width)
        return weight, np.frombuffer(self.bias, "<f4")

    def principal(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The features' mean f32 (F,) and, of length 1, at most so many directions f32 (k, F) by falling variance."""
        basis = self.code.array("basis").astype(np.float32)
        length = np.linalg.norm(basis, axis=1)
        variance = fitting.variance(self.code) * np.square(self.code.of_both("scale") * length)
        # A view varies by the sum and by the difference; of version 1 the first segment is a view.
        variance = variance.sum(axis=0) if self.code.sums else variance[0]
        found = np.argsort(-variance, kind="stable")[:most]
        return self.code.array("mean").copy(), basis[found] / length[found, None]

    def encode(self, features: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, F), u64 (B,) -> u8 (B, row_bytes). Raises UserError for features that no codec keeps."""
        require_encodable(features, self.width, "feature")
        return self.code.quantised(features, dither_keys)

    def features(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> np.ndarray:
        """u8 (B, row_bytes) -> features f32 (B, 2, F); `dither_keys` as of `Subspace.decode`."""
        return self.code.decode(codes, dither_keys)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> np.ndarray:
        """u8 (B, row_bytes) -> the head's logits of the features, f32 (B, 2, C), not centred."""
        weight, bias = self.head
        return self.features(codes, dither_keys) @ weight.T + bias

    def pack(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> bytes:
        """As `Subspace.pack`."""
        return self.code.pack(codes, dither_keys)

    def unpack(self, data: bytes, dither_keys: np.ndarray | None = None) -> np.ndarray:
        """As `Subspace.unpack`."""
        return self.code.unpack(data, dither_keys)


def fit(
    features: np.ndarray, weight: np.ndarray, bias: np.ndarray, kl: float, temperature: float = TEMPERATURE
) -> Features:
    """The code of features f32 (n, 2, F), in random order, of a head f32 (C, F) and (C,).

    On held-out pairs the KL of its logits at `temperature`, in nats, and the noise of its features, as a share of their
    variance, are `kl` · (1 − share / `NOISE`) and `share`. Raises UserError for a budget that is not positive or not
    reached, for fewer than `fitting.MIN_PAIRS` pairs, and for a head that is not finite.
    """
    fitting.require_budget(kl)
    fitting.require_pairs(len(features), _FEWER)
    require_encodable(features, features.shape[2], "feature")
    vectors, exact = features.astype(np.float64), weight.astype(np.float64)
    logits = vectors @ exact.T + bias
    variance = float(np.square(vectors - vectors.mean(axis=(0, 1))).sum(-1).mean())
    price = kl / (NOISE * max(variance, 1e-12))

    def directions(part: slice) -> Directions:
        return fitting.principal(
            vectors[part], lambda basis: fitting.sensitivity(logits[part], basis @ exact.T, temperature) + price
        )

    def cost(code: Subspace, part: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        decoded = code.decode(code.quantised(features[part], dither_keys), dither_keys).astype(np.float64)
        noise = np.square(decoded - vectors[part]).sum(-1)
        return (divergences(logits[part], decoded @ exact.T + bias, temperature) + price * noise).mean(axis=1)

    code = fitting.search(vectors, directions, cost, kl, _FEWER)
    head = {"weight": weight.astype("<f4").tobytes(), "bias": bias.astype("<f4").tobytes()}
    made = Features(code, len(bias), **head)
    _require_head(made, "the teacher's head")
    return made


def noise(codec: Features, features: np.ndarray, codes: np.ndarray, dither_keys: np.ndarray) -> float:
    """Mean square of what codes u8 (n, row_bytes) are off by, as a share of the variance of the features (n, 2, F)."""
    true = features.astype(np.float64)
    off = np.square(codec.features(codes, dither_keys) - true).sum(-1).mean()
    return float(off / max(np.square(true - true.mean(axis=(0, 1))).sum(-1).mean(), 1e-12))


def split(codec: Features) -> tuple[dict, dict[str, np.ndarray]]:
    """What a store keeps: a header, which is JSON and holds digests of the arrays (format 2), and the arrays."""
    code, arrays = subspace.split(codec.code)
    weight, bias = codec.head
    header = {"name": "features", "format": 2, "classes": codec.classes, "code": code, "head": _digest(weight, bias)}
    return header, {**arrays, "weight": weight, "bias": bias}


def array_shapes(header: dict, where: str) -> dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Of the arrays of a header from outside: name -> type, axes, shape. Raises UserError naming the key."""
    code = require_keys(header["code"], f"{where}: code", "subspace", subspace.HEADER_FORMATS, subspace.HEADER_KEYS)
    classes, width = _classes(header, where), code["classes"]
    found = {
        name: (dtype, tuple("feature" if axis == "class" else axis for axis in axes), shape)
        for name, (dtype, axes, shape) in subspace.array_shapes(code, f"{where}: code").items()
    }
    return {**found, "weight": ("<f4", ("class", "feature"), (classes, width)), "bias": ("<f4", ("class",), (classes,))}


def join(header: dict, arrays: dict[str, np.ndarray], where: str) -> dict:
    """The config of a header from outside and its arrays. Raises UserError for arrays that are not its own."""
    weight, bias = arrays["weight"], arrays["bias"]
    digest = _digest(weight, bias)
    require(header["head"] == digest, header["head"], f"{where}: head", RESTORE, digest)
    head = {"weight": base64.b64encode(weight.tobytes()).decode(), "bias": base64.b64encode(bias.tobytes()).decode()}
    own = {name: array for name, array in arrays.items() if name not in head}
    code = subspace.join(header["code"], own, f"{where}: code")
    return {"name": "features", "format": 1, "classes": header["classes"], "code": code, **head}


def from_config(config: dict, where: str) -> Features:
    """The codec of a config from outside, every value checked. Raises UserError naming the key."""
    inner = require_keys(config["code"], f"{where}: code", "subspace", subspace.CONFIG_FORMATS, subspace.CONFIG_KEYS)
    code, classes = subspace.from_config(inner, f"{where}: code"), _classes(config, where)
    head = {}
    for name, size in (("weight", 4 * classes * code.classes), ("bias", 4 * classes)):
        head[name] = subspace.from_base64(config[name], size, f"{where}: {name}")
    made = Features(code, classes, **head)
    _require_head(made, where)
    return made


def _classes(config: dict, where: str) -> int:
    return whole(config["classes"], f"{where}: classes", RESTORE, 1, MAX_CLASSES)


def _require_head(codec: Features, where: str) -> None:
    for name, values in zip(("weight", "bias"), codec.head, strict=True):
        good = bool((np.abs(values) <= _MAX_HEAD).all())  # NaN compares false
        found = "a value that is not finite or too large"
        require(good, found, f"{where}: {name}", RESTORE, f"numbers in ±{_MAX_HEAD:g}")


def _digest(weight: np.ndarray, bias: np.ndarray) -> str:
    return hashlib.sha256(weight.tobytes() + bias.tobytes()).hexdigest()
