"""Photographs for `pipeline bench codec-transfer --teacher`: crops and composites of pictures from Debian packages.

    apt-get download plasma-workspace-wallpapers gnome-backgrounds mate-backgrounds tuxpaint-stamps-default
    for package in *.deb; do dpkg -x $package pictures; done
    python -m bench.labels.photographs pictures --out photographs
    pipeline prepare imagefolder:photographs/train --out photographs/data
    pipeline prepare imagefolder:photographs/held-out --out photographs/val

A picture with transparent parts is a thing, any other a scene. An image is a crop of a scene, three times out of four
with one to three things on it. Every sixth picture is held out: images of the two folders share no picture, so that a
student is judged by photographs it has not seen. Image i is a function of i, of the seed and of the pictures.
"""

import argparse
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

_LEFT_OUT = re.compile(r"cartoon|alphabets|symbols|screenshot|images_dark|/\d{3,4}x(1440|1920|2880)\.|_\d+x\d+\.")
"""Drawings, letters, and smaller or darker copies of the same picture."""
_LEAST = 96  # pixels of a picture's shorter side
_MOST = 1600  # of a scene's longer side, to which it is reduced
_HELD_OUT = 6


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.labels.photographs")
    parser.add_argument("pictures", type=Path, help="folder, searched in depth")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--train", type=int, default=3000, help="images of OUT/train")
    parser.add_argument("--held-out", type=int, default=600, help="images of OUT/held-out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    parts = split(options.pictures)
    for number, (name, count) in enumerate((("train", options.train), ("held-out", options.held_out))):
        folder = options.out / name / "photograph"
        folder.mkdir(parents=True)
        for i, image in enumerate(images(*parts[name], count, (options.seed, number))):
            image.save(folder / f"{i:05d}.jpg", quality=92)
        print(f"{folder}: {count} images of {len(parts[name][0])} scenes and {len(parts[name][1])} things")


def split(folder: Path) -> dict[str, tuple[list[Image.Image], list[Image.Image]]]:
    """Scenes and things of the two parts."""
    found: tuple[list[tuple[str, Image.Image]], ...] = ([], [])
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp") or _LEFT_OUT.search(f"/{name}"):
            continue
        with Image.open(path) as file:
            if min(file.size) < _LEAST:
                continue
            file.draft("RGB", (_MOST, _MOST))
            thing = "A" in file.getbands() or "transparency" in file.info
            picture = file.convert("RGBA" if thing else "RGB")
        picture.thumbnail((_MOST, _MOST))
        found[thing].append((hashlib.sha256(path.name.encode() + path.parent.name.encode()).hexdigest(), picture))
    scenes, things = ([picture for _, picture in sorted(kind, key=lambda named: named[0])] for kind in found)
    held = slice(None, None, _HELD_OUT)
    kept = [[kind[i] for i in range(len(kind)) if i % _HELD_OUT] for kind in (scenes, things)]
    return {"train": (kept[0], kept[1]), "held-out": (scenes[held], things[held])}


def images(
    scenes: list[Image.Image], things: list[Image.Image], count: int, seed: tuple[int, int]
) -> Iterator[Image.Image]:
    """`count` RGB images of 256 to 384 pixels a side."""
    for i in range(count):
        rng = np.random.default_rng((*seed, i))
        width, height = rng.integers(256, 385, 2).tolist()
        image = _crop(scenes[rng.integers(len(scenes))], width, height, rng)
        for _ in range(rng.integers(1, 4) if rng.random() < 0.75 else 0):
            thing = things[rng.integers(len(things))]
            scale = rng.uniform(0.4, 1.0) * min(width / thing.width, height / thing.height)
            size = max(1, round(scale * thing.width)), max(1, round(scale * thing.height))
            place = int(rng.integers(width - size[0] + 1)), int(rng.integers(height - size[1] + 1))
            small = thing.resize(size, Image.Resampling.BICUBIC)
            image.paste(small, place, small)
        yield image


def _crop(scene: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    share = rng.uniform(0.25, 1.0) * min(scene.width / width, scene.height / height)
    wide, high = share * width, share * height
    left, top = rng.uniform(0, scene.width - wide), rng.uniform(0, scene.height - high)
    box = (left, top, left + wide, top + high)
    return scene.resize((width, height), Image.Resampling.BICUBIC, box)


if __name__ == "__main__":
    main()
