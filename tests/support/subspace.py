"""Subspace codes decoded by an independent reference, and their parts."""

import base64

import numpy as np
from hypothesis import strategies as st

from cache import codec as codecs
from cache.codec.subspace import Subspace
from cache.philox import philox

U = 2.0**-24  # half a unit in the last place of float32, relative

TYPES = {"mean": "<f4", "basis": "i1", "scale": "<f4", "beta": "<u2", "spread": "<i4", "gain": "<i2"}


def coded(
    classes: int = 40,
    dims: int = 24,
    wide: int = 8,
    seed: int = 0,
    trellis: int | tuple[int, int] = 0,
    version: int = 4,
    **arrays,
) -> Subspace:
    """A code of random directions; `arrays` replace those drawn here, (d,) or (2, d) for both segments."""
    rng = np.random.default_rng(seed)
    frame = rng.normal(size=(dims, classes))
    frame = np.linalg.qr((frame - frame.mean(axis=1, keepdims=True)).T)[0].T
    peak = np.abs(frame).max(axis=1)
    joint = (trellis,) * 2 if isinstance(trellis, int) else trellis
    segments = (2, dims) if version > 1 else (dims,)
    drawn = {
        "mean": rng.normal(size=classes),
        "basis": np.rint(frame / peak[:, None] * 127),
        "scale": peak / 127 * np.exp(rng.normal(-1, 1, segments)),
        "beta": rng.integers(0, 257, segments) * np.where(np.arange(dims) < np.array(joint)[:, None], 4, 1),
        "spread": np.rint(np.exp(rng.uniform(0, 9, (2, dims)))),
        "gain": rng.integers(-5000, 5001, dims),
        **arrays,
    }
    for name in ("scale", "beta"):
        both = np.broadcast_to(drawn[name], (2, dims))
        drawn[name] = both if version > 1 else both[0]
    text = {name: base64.b64encode(np.asarray(drawn[name], TYPES[name]).tobytes()).decode() for name in TYPES}
    sizes = {"classes": classes, "dims": dims, "trellis": list(joint) if version > 1 else joint[0], "wide": wide}
    made = codecs.from_config({"name": "subspace", "format": version, **sizes, **text})
    assert isinstance(made, Subspace)
    return made


def fields(codec: Subspace) -> dict[str, np.ndarray]:
    """The arrays of a config, float64; scale and beta (2, d), whatever the version."""
    config = codec.config
    arrays = {name: np.frombuffer(base64.b64decode(config[name]), kind).astype("f8") for name, kind in TYPES.items()}
    arrays["basis"] = arrays["basis"].reshape(config["dims"], config["classes"])
    arrays["spread"] = arrays["spread"].reshape(2, config["dims"])
    arrays["beta"] /= 256
    for name in ("scale", "beta"):
        arrays[name] = np.broadcast_to(arrays[name].reshape(-1, config["dims"]), (2, config["dims"]))
    return arrays


def turned(pairs: np.ndarray) -> np.ndarray:
    """Sums and differences of (B, 2, …)."""
    return np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)


def dither_bytes(key: int, view: int, dims: int) -> np.ndarray:
    calls = -(-dims // 16)
    words = philox((np.arange(calls), view, 0, 0), int(key))
    return words.astype("<u4").view(np.uint8).reshape(calls, 16).T.ravel()[:dims]


def dither(stream: np.ndarray, dims: int) -> np.ndarray:
    """u f64 (B, 2, d)."""
    drawn = np.array([[dither_bytes(key, view, dims) for view in range(2)] for key in stream])
    return (2 * drawn.reshape(len(stream), 2, dims).astype(np.float64) - 255) / 512


def header(stream: np.ndarray) -> np.ndarray:
    """u8 (B, 16): each row's key, lowest byte first, and zeros."""
    return np.array([list(int(key).to_bytes(16, "little")) for key in stream], np.uint8).reshape(len(stream), 16)


def integers(rows: np.ndarray, dims: int, wide: int) -> np.ndarray:
    """q i64 (B, 2, d) of rows: after the header whole bytes, then low nibbles, then high ones, then zeros."""
    assert not rows[:, 8:16].any()
    views = rows[:, 16:].reshape(len(rows), 2, (rows.shape[1] - 16) // 2)
    half = -(-(dims - wide) // 2)
    nibbles = np.concatenate([views[..., wide : wide + half] & 15, views[..., wide : wide + half] >> 4], axis=2)
    assert not nibbles[..., dims - wide :].any()
    assert not views[..., wide + half :].any()
    assert views.shape[2] % 16 == 0
    assert 0 <= views.shape[2] - wide - half < 16
    whole = views[..., :wide].view(np.int8).astype(np.int64)
    signed = nibbles[..., : dims - wide].astype(np.int64)
    return np.concatenate([whole, np.where(signed > 7, signed - 16, signed)], axis=2)


def reference_decode(codec: Subspace, rows: np.ndarray, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decoded f64 (B, 2, C), and how far off float32 arithmetic may be.

    A product of d terms in any order of summation is off by (d - 1) U of the sum of the terms' sizes, each term by 4 U
    (the step, its length, a sum with the other segment's, and the product with the direction), and adding the mean by U
    of the result: (d + 4) U of it all, to first order, so (d + 5) U.
    """
    arrays = fields(codec)
    steps = integers(rows, codec.dims, codec.wide) - arrays["beta"] * dither(stream, codec.dims)
    along, size = steps * arrays["scale"], np.abs(steps * arrays["scale"])
    if codec.version > 1:
        along, size = turned(along), np.repeat(size.sum(axis=1, keepdims=True), 2, axis=1)
    size = size @ np.abs(arrays["basis"]) + np.abs(arrays["mean"])
    return arrays["mean"] + along @ arrays["basis"], (codec.dims + 5) * U * size


def coefficients(codec: Subspace, logits: np.ndarray) -> np.ndarray:
    """x f64 (B, 2, d) in steps, of the centred logits."""
    return resolved(codec, logits - logits.mean(axis=2, keepdims=True, dtype=np.float64))


def resolved(codec: Subspace, vectors: np.ndarray) -> np.ndarray:
    """Coefficients f64 (B, 2, d) of both segments of vectors (B, 2, C), by least squares."""
    arrays = fields(codec)
    along = (vectors - arrays["mean"]) @ np.linalg.pinv(arrays["basis"])
    return (turned(along) / 2 if codec.version > 1 else along) / arrays["scale"]


def with_coefficients(codec: Subspace, steps: np.ndarray) -> np.ndarray:
    """Logits f32 (B, 2, C) of coefficients (B, 2, d); rounded directions are not quite centred, hence the rounds."""
    arrays = fields(codec)
    logits, rest = arrays["mean"], steps
    for _ in range(8):
        along = rest * arrays["scale"]
        logits = logits + (turned(along) if codec.version > 1 else along) @ arrays["basis"]
        rest = steps - coefficients(codec, logits)
    assert np.abs(rest).max(initial=0) < 1e-6 * (1 + np.abs(steps).max(initial=0))
    return logits.astype(np.float32)


def streams(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


@st.composite
def codes(draw) -> Subspace:
    dims, version = draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 4]))
    wide, *trellis = (draw(st.integers(0, dims)) for _ in range(1 + (version + 1) // 2))
    classes, seed = dims + draw(st.integers(1, 9)), draw(st.integers(0, 2**32))
    return coded(classes, dims, wide, seed, tuple(trellis) if version > 1 else trellis[0], version)


def text(dtype: str, *values, count: int = 24) -> str:
    return base64.b64encode(np.resize(np.array(values), count).astype(dtype).tobytes()).decode()
