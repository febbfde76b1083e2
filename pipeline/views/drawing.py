"""A view is a pure function of (store seed, key hash, view number, policy, image size).

Nothing about a view is ever stored. All arithmetic is on integers (square roots are IEEE-exact on them), so no
platform's libm can move a crop by a pixel.
"""

from fractions import Fraction
from functools import cache
from math import isqrt

import numpy as np

from cache import UserError
from cache.philox import below, philox
from pipeline.views.policy import Base, Policy

VIEW = np.dtype([("box", "<i4", (2, 4)), ("flip", "u1", 2), ("mask", "<u4"), ("signs", "<u4")])
"""One view pair: per view (original, augmented) the crop box (top, left, height, width) and whether it is mirrored;
for the augmented view the op mask and signs of `kernels.jda`."""

ATTEMPTS = 10  # torchvision RandomResizedCrop.get_params
_RATIOS = 1024  # steps of the log-uniform aspect ratio

# Fourth counter word: what a word is for. The third is the view, the first two are the key hash. From 0x400 on they are
# of `pipeline.views.mixing`.
_FLIPS_AND_SIGNS, _MASK, _WHICH, _CROP = 0x100, 0x200, 0x280, 0x300


def draw(
    seed: int,
    key_hash: np.ndarray,
    view: int,
    height: np.ndarray,
    width: np.ndarray,
    policy: Policy,
    size: int | None = None,
) -> np.ndarray:
    """View `view` of B samples: structured array (B,) of dtype `VIEW`.

    `key_hash` u64 (B,); `height`, `width` (B,) of the decoded images in pixels; `size` defaults to the policy's.
    The base transform draws crop and flip independently for the two views. Raises UserError where an image is
    smaller than a pad-and-crop wants.
    """
    base = policy.base if size is None else policy.base.resized(size)
    key_hash = np.asarray(key_hash, np.uint64)
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    out = np.zeros(len(key_hash), VIEW)
    extra = words(seed, key_hash, view, _FLIPS_AND_SIGNS, 1)
    out["flip"] = (extra[:, :2] >> np.uint32(31)) * np.uint8(base.flip)
    out["signs"] = extra[:, 2]
    out["mask"] = _mask(seed, key_hash, view, policy)
    crop_words = words(seed, key_hash, view, _CROP, 2 * ATTEMPTS).reshape(len(key_hash), 2, ATTEMPTS, 4)
    out["box"] = _pad_crop(crop_words, height, width, base) if base.pad >= 0 else _rrc(crop_words, height, width, base)
    return out


def _mask(seed: int, key_hash: np.ndarray, view: int, policy: Policy) -> np.ndarray:
    """Which ops of the table fire, u64 (B,); with layers at most one of each repetition of it."""
    bits = policy.layers or len(policy.table)
    drawn = words(seed, key_hash, view, _MASK, -(-bits // 4))[:, :bits]
    fires, places = drawn < np.uint64(round(policy.probability * 2**32)), np.arange(bits)
    if policy.layers:
        ops = len(policy.table) // bits
        places = ops * places + below(words(seed, key_hash, view, _WHICH, -(-bits // 4))[:, :bits], ops)
    return (fires.astype(np.uint64) << places.astype(np.uint64)).sum(axis=1)


def words(seed: int, key_hash: np.ndarray, view: int, purpose: int, blocks: int) -> np.ndarray:
    """Random words u32 (B, 4 · blocks) of samples with `key_hash` u64 (B,), for one purpose."""
    low, high = key_hash & np.uint64(0xFFFFFFFF), key_hash >> np.uint64(32)
    counters = purpose + np.arange(blocks)
    return philox((low[:, None], high[:, None], view, counters), seed).reshape(len(key_hash), blocks * 4)


def of(records: np.ndarray, seed: int, view: int, policy: Policy) -> np.ndarray:
    """`draw` for records of an index."""
    return draw(seed, records["key_hash"], view, records["height"], records["width"], policy)


def centre(height: np.ndarray, width: np.ndarray, policy: Policy, size: int | None = None) -> np.ndarray:
    """The evaluation view: the central square, unmirrored, no JDA; (B,) of dtype `VIEW`.

    With RandomResizedCrop it is `base.centre` of the shorter side (224 / 256 on ImageNet: Resize(256) and
    CenterCrop(224) in one step), with pad-and-crop the central `size` pixels.
    """
    base = policy.base if size is None else policy.base.resized(size)
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    out = np.zeros(len(height), VIEW)
    if base.pad >= 0:
        _require_room(height, width, base)
        side = np.full(len(height), base.size)
        margin = 2 * base.pad
    else:
        side = np.maximum(np.minimum(height, width) * round(base.centre * 2**16) + 2**15 >> 16, 1)
        margin = 0
    box = np.stack([(height + margin - side) // 2, (width + margin - side) // 2, side, side], axis=1)
    out["box"] = box[:, None]
    return out


def _require_room(height: np.ndarray, width: np.ndarray, base: Base) -> None:
    small = np.asarray(np.minimum(height, width) + 2 * base.pad < base.size)
    if small.any():
        at = int(np.argmax(small))
        raise UserError(
            f"an image is too small to crop {base.size} pixels from",
            found=f"{width[at]}x{height[at]} padded by {base.pad}",
            expected=f"at least {base.size - 2 * base.pad} pixels a side",
            fix="take a policy that resizes, or a smaller size",
        )


def _pad_crop(words: np.ndarray, height: np.ndarray, width: np.ndarray, base: Base) -> np.ndarray:
    _require_room(height, width, base)
    box = np.empty((len(height), 2, 4), np.int64)
    box[..., 0] = below(words[:, :, 0, 0], (height + 2 * base.pad - base.size + 1)[:, None])
    box[..., 1] = below(words[:, :, 0, 1], (width + 2 * base.pad - base.size + 1)[:, None])
    box[..., 2:] = base.size
    return box


@cache
def ratio_table(ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Aspect ratios at the middle of 1024 equal log steps, and their inverses, in units of 2⁻¹⁶: i64 (1024,) each.

    The step is the 1024th root of high / low, ten exact integer square roots in fixed point.
    """
    one = 1 << 120
    low, high = (Fraction(r).limit_denominator(1000) for r in ratio)
    root = one * high.numerator * low.denominator // (high.denominator * low.numerator)
    for _ in range(10):
        root = isqrt(root * one)
    value = one * low.numerator // low.denominator * isqrt(root * one) // one  # half a step up
    table = []
    for _ in range(_RATIOS):
        table.append(value)
        value = value * root // one
    ratios = np.array([value >> 104 for value in table], np.int64)
    inverses = np.array([(one << 16) // value for value in table], np.int64)
    return ratios, inverses


def rounded_root(area: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """round(sqrt(area · ratio / 2¹⁶)): exact, the radicand stays below 2⁵²."""
    return (np.sqrt((area * ratio >> 14).astype(np.float64)).astype(np.int64) + 1) >> 1


def _rrc(words: np.ndarray, height: np.ndarray, width: np.ndarray, base: Base) -> np.ndarray:
    """torchvision RandomResizedCrop.get_params: the first of ten attempts that fits, else the central crop."""
    height, width = height[:, None, None], width[:, None, None]
    ratios, inverses = ratio_table(base.ratio)
    low, high = (round(s * 2**24) for s in base.scale)
    area = height * width * (low + below(words[..., 0], high - low + 1)) >> 24
    pick = words[..., 1] >> np.uint32(22)
    w, h = rounded_root(area, ratios[pick]), rounded_root(area, inverses[pick])
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top = below(words[..., 2], np.maximum(height - h + 1, 1))
    left = below(words[..., 3], np.maximum(width - w + 1, 1))
    boxes = np.stack([top, left, h, w], axis=-1)
    first = np.argmax(fits, axis=-1)[..., None, None]
    chosen = np.take_along_axis(boxes, first, axis=2)[:, :, 0]
    fallback = _central(height[:, 0, 0], width[:, 0, 0], base)[:, None]
    return np.where(fits.any(axis=-1, keepdims=True), chosen, fallback)


def _central(height: np.ndarray, width: np.ndarray, base: Base) -> np.ndarray:
    """The whole image, its longer side cut down to the nearest allowed aspect ratio: (B, 4)."""
    low, high = (Fraction(r).limit_denominator(1000) for r in base.ratio)
    h = np.minimum(height, (2 * width * low.denominator + low.numerator) // (2 * low.numerator))
    w = np.minimum(width, (2 * height * high.numerator + high.denominator) // (2 * high.denominator))
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=-1)
