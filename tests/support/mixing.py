"""Mixed views written again, one at a time: whole numbers of Python, Beta by SciPy, pixels by NumPy in float64."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import betainc

from cache.philox import philox


class Drawn(NamedTuple):
    partner: int
    ratio: float
    share: int
    """Of 256."""
    patch: tuple[int, int, int, int] | None
    """Top, left, bottom, right."""
    erase: tuple[int, int, int, int] | None


def words(seed: int, key: int, view: int, purpose: int) -> list[int]:
    return philox((key & 0xFFFFFFFF, key >> 32, view, purpose), seed).tolist()


def partner(row: int, samples: int, seed: int, view: int, good) -> int:
    a = math.ceil(math.sqrt(samples))
    b = math.ceil(samples / a)
    at = row
    while True:
        left, right = at // b, at % b
        for number in range(6):
            word = philox((left if number % 2 else right, number, view, 0x600), seed)[0].item()
            if number % 2:
                right = (right + (word * b >> 32)) % b
            else:
                left = (left + (word * a >> 32)) % a
        at = left * b + right
        if at < samples and good(at):
            return at


def drawn(records: np.ndarray, row: int, seed: int, view: int, policy) -> Drawn:
    key, size, mix, erase = int(records["key_hash"][row]), policy.base.size, policy.mix, policy.erase
    other, ratio, share, patch, erased = row, 1.0, 256, None, None
    whether, switch, of_share, _ = words(seed, key, view, 0x400)
    if mix and whether < mix.probability * 2**32:
        other = partner(row, len(records), seed, view, lambda at: records["status"][at] == 0)
        cut = mix.cutmix_alpha and (not mix.mixup_alpha or switch < mix.switch_probability * 2**32)
        alpha = mix.cutmix_alpha if cut else mix.mixup_alpha
        number = int((betainc(alpha, alpha, (np.arange(256) + 0.5) / 256) * 2**32 <= of_share).sum())
        if cut:
            y, x, _, _ = words(seed, key, view, 0x401)
            y, x = y * size >> 32, x * size >> 32
            side = int(size * math.sqrt(1 - number / 256))
            low, high = side // 2, side - side // 2
            patch = max(y - low, 0), max(x - low, 0), min(y + high, size), min(x + high, size)
            ratio = 1 - (patch[2] - patch[0]) * (patch[3] - patch[1]) / size**2
        else:
            share, ratio = number, number / 256
    if erase and words(seed, key, view, 0x500)[0] < erase.probability * 2**32:
        for attempt in range(10):
            of_area, of_ratio, of_top, of_left = words(seed, key, view, 0x501 + attempt)
            low, high = (round(end * 2**24) for end in erase.scale)
            area = size**2 * (low + (of_area * (high - low + 1) >> 32)) >> 24
            tall = erase.ratio[0] * (erase.ratio[1] / erase.ratio[0]) ** (((of_ratio >> 22) + 0.5) / 1024)
            h, w = round(math.sqrt(area * tall)), round(math.sqrt(area / tall))
            if 0 < h < size and 0 < w < size:
                top, left = of_top * (size - h + 1) >> 32, of_left * (size - w + 1) >> 32
                erased = top, left, top + h, left + w
                break
    return Drawn(other, 1.0 if other == row else ratio, share, patch, erased)


def applied(how: Drawn, own: np.ndarray, other: np.ndarray, value: int) -> np.ndarray:
    """The view u8 (S, S, 3) made of an image's own augmented view and its partner's."""
    weight = np.full((*own.shape[:2], 1), how.share / 256)
    if how.patch:
        weight[how.patch[0] : how.patch[2], how.patch[1] : how.patch[3]] = 0.0
    found = np.floor(own * weight + other * (1 - weight) + 0.5).astype(np.uint8)  # exact: a multiple of 1/256
    if how.erase:
        found[how.erase[0] : how.erase[2], how.erase[1] : how.erase[3]] = value
    return found
