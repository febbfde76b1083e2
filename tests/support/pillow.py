"""The pixel path written with Pillow's own operations: the independent reference of `kernels.jda`."""

from PIL import Image, ImageEnhance, ImageOps

GRAY = (128, 128, 128)


def operation(image: Image.Image, name: str, magnitude: float, minus: bool) -> Image.Image:
    """One JDA operation on an RGB image, as the paper's published policies call Pillow."""
    signed = -magnitude if minus else magnitude
    if name in ("invert", "autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    if name == "posterize":
        return ImageOps.posterize(image, int(magnitude))
    if name == "solarize":
        return ImageOps.solarize(image, magnitude)
    if name in ("color", "contrast", "brightness", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(image).enhance(1 + signed)
    if name == "rotate":
        return image.rotate(magnitude, fillcolor=GRAY)
    width, height = image.size
    matrix, resample = {
        "shear_x": ((1, signed, 0, 0, 1, 0), Image.Resampling.BICUBIC),
        "shear_y": ((1, 0, 0, signed, 1, 0), Image.Resampling.BICUBIC),
        "translate_x": ((1, 0, signed * width, 0, 1, 0), Image.Resampling.NEAREST),
        "translate_y": ((1, 0, 0, 0, 1, signed * height), Image.Resampling.NEAREST),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=GRAY)


def jda(image: Image.Image, table, mask: int, signs: int) -> Image.Image:
    for i, (name, magnitude) in enumerate(table):
        if mask >> i & 1:
            image = operation(image, name, magnitude, bool(signs >> i & 1))
    return image


def base(image: Image.Image, box, flip: bool, size: int, pad: int) -> Image.Image:
    """Pad and crop, or crop and resize, then mirror; `box` is (top, left, height, width)."""
    top, left, height, width = map(int, box)
    if pad >= 0:
        image = ImageOps.expand(image, pad).crop((left, top, left + width, top + height))
    else:
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
