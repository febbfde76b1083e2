"""JDA operations and the three published op tables, as data.

A table is an ordered list of operations; each view fires a subset of them, always in list order. Magnitudes are
points of a float64 grid of ten, as in AutoAugment, whose published sub-policies the tables flatten (Li et al.,
*What Role Does Data Augmentation Play in Knowledge Distillation?*, ACCV 2022).
"""

import math
from typing import NamedTuple

import numpy as np

# Codes are what the compiled kernel switches on; the order has no meaning.
CODES = {
    name: code
    for code, name in enumerate(
        (
            "invert",
            "posterize",
            "solarize",
            "autocontrast",
            "equalize",
            "color",
            "contrast",
            "brightness",
            "sharpness",
            "rotate",
            "shear_x",
            "shear_y",
            "translate_x",
            "translate_y",
        )
    )
}
MAX_OPS = 32  # the op mask is one 32-bit word

_GRID = {
    "posterize": np.round(np.linspace(8, 4, 10)),
    "solarize": np.linspace(256, 0, 10),
    "rotate": np.linspace(0, 30, 10),
    **dict.fromkeys(("shear_x", "shear_y"), np.linspace(0, 0.3, 10)),
    **dict.fromkeys(("translate_x", "translate_y"), np.linspace(0, 150 / 331, 10)),
    **dict.fromkeys(("color", "contrast", "sharpness", "brightness"), np.linspace(0, 0.9, 10)),
}
# Bounds of what a custom table may ask for; beyond them an operation has no meaning (or no pixel left).
BOUNDS = {
    "posterize": (0, 8),
    "solarize": (0, 256),
    "rotate": (0, 45),
    **dict.fromkeys(("shear_x", "shear_y", "translate_x", "translate_y"), (-1, 1)),
    **dict.fromkeys(("color", "contrast", "sharpness", "brightness"), (0, 10)),
}


class Op(NamedTuple):
    """One operation. `magnitude` is bits (posterize), threshold (solarize), degrees (rotate), slope (shear),
    a fraction of the side (translate) or the distance of the enhancement factor from 1; 0 where it has none."""

    name: str
    magnitude: float = 0.0


def _table(text: str) -> tuple[Op, ...]:
    """Parse ``"op index, op index, …"`` against the grid."""
    ops = []
    for item in text.split(","):
        name, *index = item.split()
        ops.append(Op(name, float(_GRID[name][int(index[0])]) if index else 0.0))
    return tuple(ops)


TABLES: dict[str, tuple[Op, ...]] = {
    "cifar10": _table(
        "invert, rotate 2, shear_y 8, posterize 9, autocontrast, color 3, sharpness 9, equalize, contrast 7,"
        "translate_y 3, brightness 6, solarize 2, translate_x 3, shear_x 8"
    ),
    "cifar100": _table(
        "autocontrast, contrast 3, posterize 0, solarize 4, translate_y 8, shear_x 5, brightness 3, shear_y 0,"
        "translate_x 1, sharpness 5, invert, color 4, equalize, rotate 3"
    ),
    "imagenet": _table(
        "posterize 8, solarize 5, equalize, posterize 7, equalize, equalize, solarize 3, posterize 5, rotate 3,"
        "equalize, rotate 8, rotate 9, equalize, invert, color 4, rotate 8, color 8, sharpness 7, shear_x 5, color 0,"
        "equalize, solarize 5, invert, color 4, equalize"
    ),
}


class Program(NamedTuple):
    """A table in the form the kernel reads: `codes` i32 (ops,), `params` f64 (ops, 2)."""

    codes: np.ndarray
    params: np.ndarray


def compile_table(table: tuple[Op, ...]) -> Program:
    """Turn a table into a `Program`. Raises ValueError for an unknown op, a bad magnitude or too many ops."""
    if not 0 < len(table) <= MAX_OPS:
        raise ValueError(f"op table: expected 1 to {MAX_OPS} operations, got {len(table)}")
    params = np.zeros((len(table), 2))
    for i, (name, magnitude) in enumerate(table):
        if name not in CODES:
            raise ValueError(f"op table: expected one of {', '.join(CODES)}, got {name!r}")
        low, high = BOUNDS.get(name, (0, 0))
        if not low <= magnitude <= high:
            raise ValueError(f"op table: expected a magnitude of {name} in [{low}, {high}], got {magnitude}")
        if name == "posterize" and magnitude != int(magnitude):
            raise ValueError(f"op table: expected a whole number of bits for posterize, got {magnitude}")
        params[i, 0] = magnitude
        if name == "rotate":
            # PIL.Image.rotate rounds to 15 decimals, which also hides the platform's libm.
            angle = -math.radians(magnitude)
            params[i] = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return Program(np.array([CODES[name] for name, _ in table], np.int32), params)
