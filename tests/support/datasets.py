"""Data sets that several tests read; each is prepared once, by the product, from real encoded images."""

from pathlib import Path

import pytest
from support import undrawn  # noqa: F401, runs of tests draw no plots
from support.passes import network, teacher_pass
from support.tars import mixed_tar, tar_of

from pipeline.config import PrecomputeTeacher
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels import precompute
from pipeline.networks import models


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("mixed")
    mixed_tar(folder / "shard-0.tar")
    prepare.build(f"webdataset:{folder}/shard-*.tar", folder / "data", classes=10)
    return Index.open(folder / "data")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A tenth of the digits, in train and val parts that both hold every class."""
    folder = tmp_path_factory.mktemp("digits")
    prepare.build("digits", folder / "all")
    for split in ("train", "val"):
        index = Index.open(folder / "all", split=split)
        members = {}
        for row in range(0, len(index), 8):
            members[f"{split}{row:05d}.jpg"] = index.read(row)
            members[f"{split}{row:05d}.cls"] = str(index.records["label"][row]).encode()
        tar_of(folder / f"{split}.tar", members)
        prepare.build(f"webdataset:{folder}/{split}.tar", folder / "data" / split, classes=10)
    return folder / "data"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    """A teacher with random weights: labels are labels."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    models.save_weights(models.create("cifar/resnet8", 10, seed=3).module, path)
    return f"cifar/resnet8@{path}"


@pytest.fixture(scope="session")
def labels(digits, teacher, tmp_path_factory) -> Path:
    """A store of two views of the digits; tests that harm a store take a copy."""
    store = tmp_path_factory.mktemp("labels") / "labels.zarr"
    precompute.run(
        PrecomputeTeacher(
            data=digits, teacher=teacher, store=store, views=2, policy=POLICY, codec="int8", block_rows=64, device="cpu"
        )
    )
    return store


@pytest.fixture(scope="session")
def certain(digits, tmp_path_factory) -> str:
    """A teacher with random weights whose logits are as varied as a trained one's."""
    path = tmp_path_factory.mktemp("certain") / "teacher.safetensors"
    models.save_weights(network(digits), path)
    return f"cifar/resnet8@{path}"


@pytest.fixture(scope="session")
def featured(digits, certain, tmp_path_factory) -> Path:
    """A store of a view of the digits with that teacher's features."""
    return teacher_pass(digits, certain, tmp_path_factory.mktemp("featured") / "labels.zarr", views=1, features=True)
