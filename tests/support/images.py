"""What tests read: encoded images (smooth random colour fields, which a lossy codec keeps), tars, CIFAR archives."""

import ctypes
import io
import mmap
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(rng: np.random.Generator, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A random image of any Pillow mode whose channels are uint8 (RGB, L, CMYK, RGBA, LA)."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, channels), dtype=np.uint8)
    bands = [
        Image.fromarray(coarse[..., band]).resize((width, height), Image.Resampling.BICUBIC) for band in range(channels)
    ]
    return Image.merge(mode, bands)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(rng: np.random.Generator, width: int, height: int, mode: str = "RGB", quality: int = 90, **options) -> bytes:
    """A JPEG of mode RGB, L or CMYK; options go to Pillow (progressive, exif, subsampling)."""
    return encode(pixels(rng, width, height, mode), "JPEG", quality=quality, **options)


def png(rng: np.random.Generator, width: int, height: int, mode: str = "RGB", **options) -> bytes:
    """A PNG of mode RGB, L, RGBA or LA."""
    return encode(pixels(rng, width, height, mode), "PNG", **options)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that only claims its size."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    start = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big")
    return start + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big") + b"\0\0\0\0IEND\xae\x42\x60\x82"


def tar(path: Path, members: list[tuple[str, bytes]]) -> list[tarfile.TarInfo]:
    """Write a tar of (name, content) members; returns them as they lie in the file."""
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as file:
        return file.getmembers()


CIFAR = {
    10: ("cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "batches.meta"),
    100: ("cifar-100-python", ["train", "test"], "meta"),
}


def cifar(folder: Path, classes: int) -> tuple[Path, dict[str, list[tuple[int, np.ndarray]]]]:
    """A small archive in the official format (Python 2 pickles: keys and names are bytes), 7 images a batch.

    Returns its folder and, by batch, the labels and images (32, 32, 3) uint8.
    """
    name, batches, meta = CIFAR[classes]
    labels, names = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    truth = {}
    (folder / name).mkdir(parents=True)
    for number, batch in enumerate(batches):
        rng = np.random.default_rng(number)
        data = rng.integers(0, 256, (7, 3072), dtype=np.uint8)
        label = rng.integers(0, classes, 7).tolist()
        content = {b"data": data, labels.encode(): label, b"coarse_labels": [0] * 7, b"batch_label": b"x"}
        (folder / name / batch).write_bytes(pickle.dumps(content, protocol=2))
        truth[batch] = [(label[i], data[i].reshape(3, 32, 32).transpose(1, 2, 0)) for i in range(7)]
    content = {names.encode(): [b"class %d" % i for i in range(classes)]}
    (folder / name / meta).write_bytes(pickle.dumps(content, protocol=2))
    return folder / name, truth


def guarded(image: np.ndarray, at_end: bool) -> np.ndarray:
    """A copy between pages that may not be touched, directly at one of them: a kernel that strays is killed."""
    page = mmap.PAGESIZE
    room = -(-image.nbytes // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), page, 0) == 0
    first = page + at_end * (room - image.nbytes)
    copy = np.frombuffer(memory, np.uint8, image.nbytes, first).reshape(image.shape)
    copy[:] = image
    return copy
