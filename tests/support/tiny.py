"""Forty tiny images of three classes, teachers of them, and their stores: for runs of a second."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from support.images import jpeg
from support.tars import tar_of

from pipeline.config import PrecomputeTeacher
from pipeline.data import prepare
from pipeline.labels import precompute
from pipeline.networks import models

TINY = "name: tiny\nprobability: 0.5\nops: cifar10\nbase: {size: 8}\n"


class Tiny(NamedTuple):
    data: Path
    policy: Path
    teacher: str
    stores: Path
    """Of two views: `store`, without energies `plain`, and of another teacher `second`."""


def made(folder: Path) -> Tiny:
    (folder / "policy.yaml").write_text(TINY)
    members = {}
    for number in range(40):
        members[f"{number:02d}.jpg"] = jpeg(np.random.default_rng(number), 12, 12)
        members[f"{number:02d}.cls"] = str(number % 3).encode()
    tar_of(folder / "images.tar", members)
    prepare.build(f"webdataset:{folder}/images.tar", folder / "data", classes=3)
    for seed in (3, 8):
        network = models.create("cifar/resnet8", 3, seed=seed).module
        network.fc.weight.data *= 4
        models.save_weights(network, folder / f"{seed}.safetensors")
    found = Tiny(folder / "data", folder / "policy.yaml", f"cifar/resnet8@{folder}/3.safetensors", folder)
    precompute.run(taught(found, folder / "store", energy=True))
    precompute.run(taught(found, folder / "plain"))
    precompute.run(taught(found, folder / "second", teacher=f"cifar/resnet8@{folder}/8.safetensors", block_rows=30))
    return found


def taught(tiny: Tiny, store: Path, **changes) -> PrecomputeTeacher:
    return PrecomputeTeacher(
        store=str(store), codec="fp16", device="cpu",
        **({"data": tiny.data, "views": 2, "teacher": tiny.teacher, "policy": str(tiny.policy)} | changes),
    )  # fmt: skip
