"""Tars of samples."""

import io
import tarfile
from pathlib import Path

import pipeline  # noqa: F401, before torch and NumPy are imported here and in child processes  # isort: skip
import numpy as np
from PIL import Image
from support.images import jpeg, png


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def mixed_tar(path: Path, count: int = 160, seed: int = 0) -> Path:
    """Colour, gray and CMYK JPEG, progressive, EXIF-rotated ones, PNG; sides from 1 to 640 x 480 pixels."""
    rng = np.random.default_rng(seed)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a viewer would rotate it; training pixels are the stored ones
    kinds = (
        lambda w, h: ("jpg", jpeg(rng, w, h)),
        lambda w, h: ("jpeg", jpeg(rng, w, h, mode="L")),
        lambda w, h: ("jpg", jpeg(rng, w, h, mode="CMYK")),
        lambda w, h: ("jpg", jpeg(rng, w, h, progressive=True, subsampling=0)),
        lambda w, h: ("jpg", jpeg(rng, w, h, exif=turned)),
        lambda w, h: ("png", png(rng, w, h)),
    )
    members = {}
    for number in range(count):
        width, height = (int(rng.integers(1, high + 1)) for high in ((640, 480) if number % 4 == 0 else (200, 160)))
        extension, data = kinds[number % len(kinds)](width, height)
        members[f"{number:04d}.{extension}"] = data
        members[f"{number:04d}.cls"] = str(number % 10).encode()
    return tar_of(path, members)
