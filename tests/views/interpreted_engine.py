"""Loader, engine and Triton's kernels together, byte for byte Pillow's: run by `test_engine`, in the interpreter."""

import dataclasses
import io
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from support import pillow
from support.images import jpeg, png
from support.tars import tar_of

from kernels.jda.gpu import pairs as jda_gpu
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.views import drawing, plan
from pipeline.views.loader import Loader
from pipeline.views.policy import POLICIES

COUNT, SEED, VIEW, SIZE = int(os.environ["ENGINE_IMAGES"]), 2**60 + 3, 5, 12


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    """Colour, gray, CMYK, progressive and PNG images; sides of 1 to 24 pixels."""
    folder, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    kinds = (
        lambda w, h: ("jpg", jpeg(rng, w, h)),
        lambda w, h: ("jpg", jpeg(rng, w, h, mode="CMYK")),
        lambda w, h: ("png", png(rng, w, h)),
        lambda w, h: ("jpg", jpeg(rng, w, h, mode="L")),
        lambda w, h: ("jpg", jpeg(rng, w, h, progressive=True, subsampling=0)),
    )
    members = {}
    for number in range(COUNT):
        extension, data = kinds[number % len(kinds)](*map(int, rng.integers(1, 25, 2)))
        members[f"{number:03d}.{extension}"], members[f"{number:03d}.cls"] = data, b"0"
    prepare.build(f"webdataset:{tar_of(folder / 's.tar', members)}", folder / "data", classes=10)
    return Index.open(folder / "data")


@pytest.mark.parametrize("name", POLICIES)
def test_whole_pairs_equal_pillow(index, name, monkeypatch):
    """And again from the middle of the plan on, without digests, with an image that cannot be decoded."""
    for constants in (jda_gpu.PIXELS, jda_gpu.VIEW):
        monkeypatch.setitem(constants, "ROWS", 32)
    monkeypatch.setitem(jda_gpu.COEFFICIENTS, "BLOCK", 16)
    base = POLICIES[name].base
    base = dataclasses.replace(base.resized(SIZE), **({"pad": SIZE} if base.pad >= 0 else {}))
    policy = dataclasses.replace(POLICIES[name], base=base)
    parts = list(plan.cut(VIEW, index.good, max(COUNT // 5, 1)))
    loader = Loader(index, policy, threads=2, decoder="gpu")
    drawn = drawing.of(index.records, SEED, VIEW, policy)
    whole = {}
    for batch in loader.batches(plan.requests(index, policy, SEED, parts), digests=True):
        for i, row in enumerate(batch.rows):
            image = Image.open(io.BytesIO(index.read(row))).convert("RGB")
            augmented = pillow.jda(image, policy.table, int(drawn["mask"][row]), int(drawn["signs"][row]))
            for s, source in enumerate((image, augmented)):
                expected = pillow.base(source, drawn["box"][row, s], bool(drawn["flip"][row, s]), SIZE, base.pad)
                np.testing.assert_array_equal(batch.images[s, i].numpy(), np.asarray(expected), f"row {row}, view {s}")
                assert batch.digests[i, s] == zlib.crc32(np.asarray(expected).tobytes())
            whole[int(row)] = batch.images[:, i]
    assert list(whole) == list(range(COUNT)) == index.good.tolist()

    bad, read = COUNT - 1, Index.read
    monkeypatch.setattr(Index, "read", lambda self, row: b"\xff\xd8\xff\xdb\0\x43" if row == bad else read(self, row))
    resumed = Loader(index, policy, threads=2, decoder="gpu", max_bad=1.0)
    batches = list(resumed.batches(plan.requests(index, policy, SEED, parts[-2:])))
    assert [batch.rows.tolist() for batch in batches] == [parts[-2][1].tolist(), parts[-1][1][:-1].tolist()]
    for batch in batches:
        assert batch.digests is None
        for i, row in enumerate(batch.rows.tolist()):
            assert torch.equal(batch.images[:, i], whole[row])
    assert list(resumed.skipped.causes) == [bad]
