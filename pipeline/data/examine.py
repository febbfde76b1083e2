"""Is an encoded image one that training can read? Its size, who decodes it, and what is wrong with it.

The pixels of a good image are Pillow's RGB. Most JPEG and PNG files DALI decodes to just these; the others, and other
formats, are marked, and Pillow decodes them (`pipeline.data.decode.as_rgb`).
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image

from pipeline.data.decode import Undecodable, as_rgb, decode
from pipeline.data.ledger import Flaw
from pipeline.data.records import MAX_SIDE
from pipeline.system.native import NativeStderr

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
FREE_PIXELS = 1 << 22
"""Of an image, however few bytes it has."""

_JPEG_SCAN, _JPEG_END, _PNG_END = b"\xff\xda", b"\xff\xd9", b"IEND\xae\x42\x60\x82"
_STARTS = rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|GIF8|II\*\0|MM\0\*|BM|P[1-6]\s"
_PNG_DEPTH = 24  # place of the byte that says how many bits a channel has
_DEEP = ("I", "F")  # modes begin so: Pillow's RGB of them is clipped, not scaled
_KINDS = {  # the formats that are no FORMATS, and what is brought in place of an image, by how they begin
    rb"\s*<(!doctype|html|\?xml|svg)": "a page or an XML file",
    rb"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
    rb"\x1f\x8b": "gzip",
    rb"PK\x03\x04": "zip",
    rb"%PDF": "PDF",
    rb"....ftyp(heic|heix|mif1|hevc)": "HEIC",
    rb"....ftypavi": "AVIF, which this Pillow does not read",
    rb"\xff\x0a|\x00\x00\x00\x0cJXL ": "JPEG XL",
    rb"\x00\x00\x00\x0cjP|\xff\x4f\xff\x51": "JPEG 2000",
    rb"8BPS": "Photoshop",
    rb"\x93NUMPY": "NumPy",
}


class Item(NamedTuple):
    image: bytes
    """Encoded."""
    by_pillow: bool
    tell: Callable[[tuple[int, int] | Flaw], None]
    """Called with its height and width, or with what is wrong."""
    remark: Callable[[str], None]
    """Called with what the decoder has to say of a good image."""


class Header(NamedTuple):
    """What an image's header and end tell."""

    flaw: Flaw | None
    pixels: int = 0
    by_pillow: bool = False


def header(image: bytes, pixels_per_byte: float) -> Header:
    """A flaw, or how many pixels there are to decode, and whether by Pillow."""
    if not image:
        return Header(Flaw("empty file"))
    try:
        opened = Image.open(io.BytesIO(image), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Header(Flaw(f"over {Image.MAX_IMAGE_PIXELS} pixels"))
    except Exception:  # Pillow's plug-ins raise what they please
        if re.match(_STARTS, image, re.DOTALL):
            return Header(Flaw("damaged"))
        kind = next((kind for start, kind in _KINDS.items() if re.match(start, image, re.DOTALL | re.IGNORECASE)), "")
        return Header(Flaw(f"not an image that is read ({', '.join(FORMATS)})", kind))
    width, height = opened.size
    if max(width, height) > MAX_SIDE:
        return Header(Flaw(f"a side over {MAX_SIDE} pixels"))
    if width * height > max(FREE_PIXELS, pixels_per_byte * len(image)):
        found = f"{width} × {height} pixels in {len(image):,} bytes"
        return Header(Flaw(f"over {pixels_per_byte:g} pixels per byte (--max-pixels-per-byte)", found))
    if opened.mode.startswith(_DEEP):
        return Header(Flaw("16-bit or floating-point grey", f"{opened.format} of mode {opened.mode}"))
    deep = opened.format == "PNG" and image[_PNG_DEPTH] == 16
    by_dali = opened.format in ("JPEG", "MPO", "PNG") and opened.mode != "CMYK" and not deep
    # DALI prints to stderr for each image it refuses: most cuts are found here, in silence.
    suspect = by_dali and not image.endswith((_JPEG_END, _PNG_END))
    return Header(_damage(image) if suspect else None, width * height, not by_dali)


def examine(batches: Iterator[list[Item]], threads: int) -> None:
    """Decode every image, and tell each item what came of it.

    DALI judges JPEG and PNG, as it decodes them in training, and it is the stricter one: it refuses those cut at any
    byte. Pillow reads the header first, which keeps decompression bombs from the decoder, and names the flaws. Damage
    that libjpeg repairs decodes to the same pixels each time; of that it prints a warning, which becomes a remark.
    """
    with (
        warnings.catch_warnings(),
        NativeStderr() as said,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(threads) as workers,
    ):
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on odd EXIF
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)  # read while this one is decoded
            shapes = list(workers.map(_shape, batch))
            noisy = bool(said.read())
            for item, shape in zip(batch, shapes, strict=True):
                if shape is None:
                    item.tell(_damage(item.image) or Flaw("refused by DALI"))
                    continue
                item.tell(shape)
                if noisy and (remark := _remark(item, said)):
                    item.remark(remark)


def _remark(item: Item, said: NativeStderr) -> str:
    """The first line that the decoder prints for this image alone, without its numbers, that would set each apart."""
    _shape(item)
    return re.sub(r"\b(0x[0-9a-f]+|[0-9]+)\b", "N", said.read().strip().partition("\n")[0])


def _shape(item: Item) -> tuple[int, int] | None:
    """Height and width, None for what is refused."""
    image = item.image
    if item.by_pillow:
        try:
            image = as_rgb(image)
        except Exception:  # Pillow's plug-ins raise what they please
            return None
    try:
        height, width, _ = decode(image).shape
    except Undecodable:
        return None
    return height, width


def _damage(image: bytes) -> Flaw | None:
    """Why an image cannot be decoded, as far as Pillow can tell; None if it can."""
    try:
        opened = Image.open(io.BytesIO(image), formats=FORMATS)
        opened.convert("RGB")
    except Exception as error:
        cut = "truncated" in str(error).lower()
        return Flaw("truncated" if cut else "damaged")
    # Pillow forgives a PNG without its last chunk, which DALI does not, and now and then a JPEG without its end marker.
    endless = opened.format == "PNG" and _PNG_END not in image
    endless |= opened.format == "JPEG" and image.find(_JPEG_END, image.find(_JPEG_SCAN)) < 0
    return Flaw("truncated") if endless else None
