"""A view pair made with Pillow's own operations, by somebody who knows Pillow."""

import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from kernels.jda.ops import Op
from pipeline.views.policy import Policy

GRAY = (128, 128, 128)


def pair(data: bytes, view: np.void, policy: Policy, out: np.ndarray) -> None:
    """Decode `data` and write its views of RandomResizedCrop policy `policy` to `out` u8 (2, S, S, 3).

    `view` is one record of `pipeline.views.drawing.draw`.
    """
    original = Image.open(io.BytesIO(data))
    if original.mode != "RGB":  # converting to the same mode copies
        original = original.convert("RGB")
    augmented = original
    mask, signs = int(view["mask"]), int(view["signs"])
    for i, op in enumerate(policy.table):
        if mask >> i & 1 and op != ("color", 0.0):  # the factor 1 copies
            augmented = operation(augmented, op, bool(signs >> i & 1))
    size = (policy.base.size, policy.base.size)
    for s, image in enumerate((original, augmented)):
        top, left, height, width = map(int, view["box"][s])
        # Two steps, for resize(box=…) lets the filter see pixels outside of the box, and is slower.
        image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
        out[s] = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view["flip"][s] else image


def operation(image: Image.Image, op: Op, minus: bool) -> Image.Image:
    """One operation of the ImageNet table on an RGB image."""
    name, magnitude = op
    signed = -magnitude if minus else magnitude
    if name in ("invert", "equalize"):
        return getattr(ImageOps, name)(image)
    if name == "posterize":
        return ImageOps.posterize(image, int(magnitude))
    if name == "solarize":
        return ImageOps.solarize(image, math.ceil(magnitude))  # it compares whole numbers
    if name in ("color", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(image).enhance(1 + signed)
    if name == "rotate":
        return image.rotate(magnitude, fillcolor=GRAY)
    assert name == "shear_x", name
    matrix = (1, signed, 0, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=GRAY)
