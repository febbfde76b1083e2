"""The pixels of every image that is read are Pillow's RGB; any other is quarantined by what it is."""

import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image, features
from support.images import encode, jpeg, pixels, png, tar
from support.prepared import RNG, SMALL, quarantine, samples

from pipeline.data import prepare
from pipeline.data.decode import as_rgb, decode
from pipeline.data.examine import FREE_PIXELS
from pipeline.data.index import Index


def deep_png(kind: int, channels: int, width: int = 7, height: int = 5) -> bytes:
    """A PNG of 16 bits a channel; kinds: 2 colour, 4 grey with alpha, 6 colour with alpha. Pillow writes none."""
    rows = b"".join(b"\0" + RNG.bytes(2 * channels * width) for _ in range(height))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, kind, 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )


PICTURE, SEEN_THROUGH = pixels(RNG, 23, 17), pixels(RNG, 23, 17, "RGBA")
READ = {
    "a.jfif": encode(PICTURE, "JPEG"),
    "b.webp": encode(PICTURE, "WEBP"),
    "c.webp": encode(SEEN_THROUGH, "WEBP", lossless=True),
    "d.bmp": encode(PICTURE, "BMP"),
    "e.gif": encode(PICTURE, "GIF"),
    "f.gif": encode(PICTURE, "GIF", save_all=True, append_images=[pixels(RNG, 23, 17)]),
    "g.tif": encode(PICTURE, "TIFF"),
    "h.tiff": encode(PICTURE.convert("CMYK"), "TIFF", compression="tiff_lzw"),
    "i.ppm": encode(PICTURE, "PPM"),
    "j.pgm": encode(PICTURE.convert("L"), "PPM"),
    "k.jpg": encode(PICTURE, "WEBP"),  # as browsers save it
    "l.png": deep_png(2, 3),
    "m.png": deep_png(4, 2),
    "n.png": deep_png(6, 4),
    "o.jpg": jpeg(RNG, 23, 17, "CMYK"),
    "p.png": png(RNG, 23, 17, "RGBA"),
    "q.jpg": jpeg(RNG, 23, 17),
} | ({"r.avif": encode(PICTURE, "AVIF")} if features.check("avif") else {})


def test_what_is_read_has_pillows_pixels(tmp_path):
    members = [member for name, data in READ.items() for member in ((name, data), (f"{name[0]}.cls", b"0"))]
    tar(tmp_path / "a.tar", members)
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=2)
    data = Index.open(tmp_path / "out")
    assert quarantine(tmp_path / "out") == [] and len(data) == len(READ)
    for row, (name, image) in enumerate(READ.items()):
        expected = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        record, encoded = data.records[row], data.read(row)
        found = decode(as_rgb(encoded) if record["cmyk"] else encoded)
        # A plain JPEG alone may differ, by what two versions of libjpeg-turbo differ.
        assert np.array_equal(found, expected) or name == "q.jpg", name
        assert (record["height"], record["width"]) == expected.shape[:2]


ODD = {
    "grey16": (encode(Image.fromarray(RNG.integers(0, 1 << 16, (9, 5), dtype=np.uint16)), "PNG"), "16-bit", "I;16"),
    "float": (encode(Image.fromarray(RNG.random((9, 5), np.float32)), "TIFF"), "floating-point", "TIFF of mode F"),
    "page": (b"<!DOCTYPE html><html>403</html>", "not an image", "a page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not an image", "git lfs pull"),
    "packed": (b"\x1f\x8b\x08" + bytes(9), "not an image", "gzip"),
    "phone": (b"\0\0\0\x18ftypheic" + bytes(20), "not an image", "HEIC"),
    "cut": (READ["b.webp"][: len(READ["b.webp"]) // 2], "damaged", ""),
    "lab": (encode(PICTURE.convert("LAB"), "TIFF"), "damaged", ""),
}


def test_what_is_not_read_is_named_by_what_it_is(tmp_path):
    members = [member for key, (data, *_) in ODD.items() for member in ((f"{key}.jpg", data), (f"{key}.cls", b"0"))]
    tar(tmp_path / "a.tar", [*members, *samples(9)])
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1)
    lines = {line["key"]: line for line in quarantine(tmp_path / "out")}
    for key, (_, cause, found) in ODD.items():
        if key == "lab" and key not in lines:  # a Pillow that converts it
            continue
        assert cause in lines[key]["cause"] and found in lines[key].get("found", ""), key


def test_an_image_of_few_bytes_may_not_claim_much_memory_unless_the_user_says_so(tmp_path):
    """A plain one of just the free size passes; twice that in as few bytes is a claim."""
    side = int(FREE_PIXELS**0.5)
    small, large = (encode(Image.new("1", (side, side * times)), "PNG") for times in (1, 2))
    assert 2 * FREE_PIXELS / len(large) > 1000
    members = [("free.png", small), ("free.cls", b"0"), ("claim.png", large), ("claim.cls", b"0")]
    tar(tmp_path / "a.tar", [*members, *samples(3)])
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1)
    (line,) = quarantine(tmp_path / "out")
    assert line["key"] == "claim" and "over 1000 pixels per byte (--max-pixels-per-byte)" in line["cause"]
    assert line["found"] == f"{side} × {2 * side} pixels in {len(large):,} bytes"
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "more", threads=1, max_pixels_per_byte=1e9)
    assert quarantine(tmp_path / "more") == []


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_decoder_repairs_is_counted_by_key_and_not_printed(tmp_path, capfd, threads):
    """Half a JPEG that ends in an end marker, as repair tools leave it, among whole ones."""
    whole = jpeg(RNG, 96, 96)
    halves = {f"half{i}": whole[: len(whole) // (i + 2)] + b"\xff\xd9" for i in range(2)}
    members = [member for key, data in halves.items() for member in ((f"{key}.jpg", data), (f"{key}.cls", b"0"))]
    tar(tmp_path / "a.tar", [*samples(80), *members, *samples(5, "z", whole)])
    facts = prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=threads)
    lines = [json.loads(line) for line in (tmp_path / "out" / "warned.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(halves) and facts["good"] == 87
    assert facts["warned"] == {"Corrupt JPEG data: premature end of data segment": 2}
    assert any("Corrupt JPEG data: premature end of data segment" in note for note in facts["notes"])
    assert capfd.readouterr() == ("", "")
    tar(tmp_path / "b.tar", [("x.jpg", SMALL), ("x.cls", b"0")])
    prepare.build(f"webdataset:{tmp_path}/b.tar", tmp_path / "quiet", threads=threads)
    assert not (tmp_path / "quiet" / "warned.jsonl").exists()
