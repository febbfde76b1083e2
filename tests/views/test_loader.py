"""Pixels leave the loader exactly as Pillow makes them, and are the same whenever they are asked for again.

All of it holds for both of its engines, the GPU's as `support.engine` has it.
"""

import dataclasses
import io
import subprocess
import sys
import threading
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import engine, pillow
from support.images import jpeg
from support.tars import tar_of

from cache import UserError
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.views import drawing
from pipeline.views.batch import Batch
from pipeline.views.loader import Loader
from pipeline.views.policy import POLICIES, Policy

SEED, VIEW = 2**60 + 3, 5


@pytest.fixture(params=["cpu", "gpu"])
def decoder(request, monkeypatch) -> str:
    engine.on_the_host(monkeypatch)
    return request.param


def roomy(name: str) -> Policy:
    """The published policy; pad-and-crop padded so that even an image of one pixel can be cropped."""
    policy = POLICIES[name]
    return policy if policy.base.pad < 0 else dataclasses.replace(policy, base=dataclasses.replace(policy.base, pad=16))


def plan(index: Index, policy: Policy, rows: np.ndarray, batch: int, view: int = VIEW) -> list:
    parts = [rows[at : at + batch] for at in range(0, len(rows), batch)]
    return [(part, drawing.of(index.records[part], SEED, view, policy)) for part in parts]


@cache
def by_pillow(path: Path, name: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The views of each row of a data set, which both engines are held to."""
    index, policy = Index.open(path), roomy(name)
    drawn = drawing.of(index.records, SEED, VIEW, policy)
    found = {}
    for row in index.good.tolist():
        image = Image.open(io.BytesIO(index.read(row))).convert("RGB")
        augmented = pillow.jda(image, policy.table, int(drawn["mask"][row]), int(drawn["signs"][row]))
        views = [
            pillow.base(source, drawn["box"][row, s], bool(drawn["flip"][row, s]), policy.base.size, policy.base.pad)
            for s, source in enumerate((image, augmented))
        ]
        found[row] = np.asarray(views[0]), np.asarray(views[1])
    return found


def digests(
    index: Index, policy: Policy, rows: np.ndarray, batch: int, threads: int, decoder: str = "cpu"
) -> np.ndarray:
    """(N, 2) digests by row."""
    out = np.zeros((len(index), 2), np.uint32)
    for item in Loader(index, policy, threads=threads, decoder=decoder).batches(
        plan(index, policy, rows, batch), digests=True
    ):
        out[item.rows] = item.digests
    return out


@pytest.mark.parametrize("name", POLICIES)
def test_whole_pairs_equal_pillow(mixed, name, decoder):
    """160 pairs per policy: Pillow decodes, augments, crops, resizes and mirrors; 0 bytes differ, and the digest is
    the CRC-32 of those bytes."""
    policy = roomy(name)
    batches = Loader(mixed, policy, threads=2, decoder=decoder).batches(
        plan(mixed, policy, mixed.good, 17), digests=True
    )
    expected = by_pillow(mixed.path, name)
    pairs = 0
    for batch in batches:
        assert batch.images.shape == (2, len(batch.rows), policy.base.size, policy.base.size, 3)
        for i, row in enumerate(batch.rows):
            for s, view in enumerate(expected[int(row)]):
                np.testing.assert_array_equal(batch.images[s, i].numpy(), view, f"row {row}, view {s}")
                assert batch.digests[i, s] == zlib.crc32(view.tobytes())
            pairs += 1
    assert pairs == len(mixed) == 160


def test_digests_do_not_depend_on_batch_threads_order_or_company(mixed, decoder):
    policy = POLICIES["imagenet"]
    expected = digests(mixed, policy, mixed.good, 64, 2, decoder)
    assert len(np.unique(expected)) > 0.9 * expected.size  # only the smallest images can repeat
    shuffled = np.random.default_rng(0).permutation(mixed.good)
    for rows, batch, threads in [(mixed.good, 7, 1), (shuffled, 7, 2), (shuffled, 64, 1)]:
        np.testing.assert_array_equal(digests(mixed, policy, rows, batch, threads, decoder), expected)
    few = mixed.good[::9]
    np.testing.assert_array_equal(digests(mixed, policy, few, 64, 2, decoder)[few], expected[few])


CHILD = """
import sys
import numpy as np
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/views"]
from test_loader import digests
from pipeline.data.index import Index
from pipeline.views.policy import POLICIES
index = Index.open(sys.argv[2])
np.save(sys.argv[3], digests(index, POLICIES["imagenet"], index.good[::-1], 7, 1))
"""


def test_digests_are_the_same_in_another_process_and_engine(mixed, tmp_path, monkeypatch):
    engine.on_the_host(monkeypatch)
    arguments = [str(Path(__file__).parents[1]), str(mixed.path), str(tmp_path / "d.npy")]
    subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True)
    expected = digests(mixed, POLICIES["imagenet"], mixed.good, 64, 2, "gpu")
    np.testing.assert_array_equal(np.load(tmp_path / "d.npy"), expected)


def test_rows_and_labels_follow_the_plan(mixed, decoder):
    policy = roomy("cifar10")
    rows = np.random.default_rng(1).permutation(mixed.good)
    batches: list[Batch] = list(Loader(mixed, policy, threads=2, decoder=decoder).batches(plan(mixed, policy, rows, 9)))
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), rows)
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    np.testing.assert_array_equal(labels, mixed.records["label"][rows])
    np.testing.assert_array_equal(labels, rows % 10)  # how the fixture labels them
    assert batches[0].digests is None


def test_batches_keep_their_pixels(mixed, decoder):
    """A batch that is held while others are made is not overwritten."""
    policy = roomy("cifar10")
    held = list(
        Loader(mixed, policy, threads=2, decoder=decoder).batches(plan(mixed, policy, mixed.good, 8), digests=True)
    )
    for batch in held:
        for i in range(len(batch.rows)):
            for s in range(2):
                assert zlib.crc32(batch.images[s, i].numpy()) == batch.digests[i, s]


def test_evaluation_makes_the_central_view_alone(mixed, decoder):
    policy = POLICIES["imagenet"]
    rows = mixed.good[:12]
    request = rows, drawing.centre(mixed.records["height"][rows], mixed.records["width"][rows], policy)
    (batch,) = Loader(mixed, policy, threads=1, decoder=decoder).batches([request], pairs=False)
    assert batch.images.shape == (1, 12, 224, 224, 3)
    for i, row in enumerate(rows):
        image = Image.open(io.BytesIO(mixed.read(row))).convert("RGB")
        side = max((7 * min(image.size) + 4) // 8, 1)  # 224 / 256, halves up
        left, top = (image.width - side) // 2, (image.height - side) // 2
        expected = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(batch.original[i].numpy(), np.asarray(expected))


def test_an_image_of_another_size_than_indexed_never_reaches_the_kernel(mixed, decoder):
    """Boxes drawn for a larger image would be read from beyond this one."""
    records = np.array(mixed.records)
    row = int(mixed.good[4])
    records["height"][row] += 4000
    lying, policy = dataclasses.replace(mixed, records=records), POLICIES["imagenet"]
    loader = Loader(lying, policy, threads=2, decoder=decoder, max_bad=1.0)
    (batch,) = loader.batches(plan(lying, policy, mixed.good[:8], 8))
    assert batch.rows.tolist() == [r for r in mixed.good[:8].tolist() if r != row]
    assert "not of the indexed size" in loader.skipped.causes[row]


def test_a_cmyk_image_that_pillow_no_longer_decodes_is_skipped_by_name(mixed, decoder, monkeypatch):
    """It is converted where it is read, before either engine sees it."""
    policy, read = roomy("cifar10"), Index.read
    row = int(mixed.good[mixed.records["cmyk"][mixed.good] == 1][0])
    rows = np.array([row, *mixed.good[mixed.good != row][:3]])
    monkeypatch.setattr(Index, "read", lambda self, at: b"\xff\xd8\xff\xdb\0\x43" if at == row else read(self, at))
    loader = Loader(mixed, policy, threads=2, decoder=decoder, max_bad=1.0)
    (batch,) = loader.batches(plan(mixed, policy, rows, 4))
    assert batch.rows.tolist() == rows[1:].tolist()
    assert list(loader.skipped.causes) == [row] and "cannot be decoded: Pillow: " in loader.skipped.causes[row]


def test_leaving_early_stops_the_threads(mixed, decoder):
    policy = roomy("cifar10")
    batches = Loader(mixed, policy, threads=2, decoder=decoder).batches(plan(mixed, policy, mixed.good, 4))
    next(batches)
    ours = {thread for thread in threading.enumerate() if thread.name.startswith(("loader", "read", "work"))}
    assert ours
    batches.close()
    for thread in ours:
        thread.join(300)
    assert not ours & set(threading.enumerate())


def test_a_shard_damaged_after_indexing_is_one_line(tmp_path, decoder):
    rng = np.random.default_rng(0)
    data = jpeg(rng, 90, 70)
    tar = tar_of(tmp_path / "s.tar", {f"{i}.{e}": d for i in range(4) for e, d in (("jpg", data), ("cls", b"0"))})
    prepare.build(f"webdataset:{tar}", tmp_path / "data", classes=2)
    index = Index.open(tmp_path / "data")
    with tar.open("r+b") as file:
        file.seek(int(index.records["offset"][2]))
        file.write(bytes(200))
    policy = roomy("cifar10")
    with pytest.raises(UserError, match=r"too many samples cannot be read; found 1, .* changed since it was indexed"):
        list(Loader(index, policy, threads=1, decoder=decoder).batches(plan(index, policy, index.good, 2)))
    tar.unlink()
    with pytest.raises(UserError, match=r"shard .* is missing|cannot read shard"):
        list(Loader(Index.open(tmp_path / "data"), policy, threads=1, decoder=decoder).batches([]))
