"""The teacher pass: what it stores is what the teacher says, and a kill at any moment costs at most a block."""

import dataclasses
import io
import multiprocessing
import random
import signal
import time
from pathlib import Path

import numpy as np
import pillow
import pytest
import torch
from PIL import Image

import cache
from cache import UserError, philox
from pipeline import models, precompute, views
from pipeline import policy as policies
from pipeline.config import PrecomputeTeacher
from pipeline.demo import POLICY
from pipeline.index import Index
from pipeline.loader import load

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["pipeline.precompute", "pipeline.train"])  # so that a child starts in milliseconds


@pytest.fixture(scope="module")
def options(digits, teacher, tmp_path_factory) -> PrecomputeTeacher:
    return PrecomputeTeacher(
        data=digits,
        teacher=teacher,
        store=tmp_path_factory.mktemp("store") / "labels.zarr",
        views=3,
        policy=POLICY,
        seed=2**62 + 1,
        batch_size=16,
        block_rows=24,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(options) -> PrecomputeTeacher:
    """The store of an uninterrupted run."""
    precompute.run(options)
    return options


def contents(path: Path) -> dict[str, np.ndarray]:
    store = cache.open(path)
    planes = [store.load_plane(view) for view in range(store.manifest.views)]
    return {
        "pairs": np.stack([plane.encoded for plane in planes]),
        "weight": np.stack([plane.weight for plane in planes]),
        "digest": np.stack([plane.digest for plane in planes]),
        "status": store.status,
    }


def files_of(store: Path, view: int, block: int) -> list[Path]:
    """The files of a block, all arrays."""
    return [path for path in store.glob(f"*/c/{view}/{block}*/**/*") if path.is_file()] + [
        path for path in store.glob(f"*/c/{view}/{block}") if path.is_file()
    ]


def assert_equal_stores(one: Path, other: Path) -> None:
    ours, theirs = contents(one), contents(other)
    for name, array in ours.items():
        np.testing.assert_array_equal(array.view(np.uint8), theirs[name].view(np.uint8), name)


def test_labels_are_what_the_teacher_says_of_pillows_pixels(whole):
    """Pillow makes the view, a plain forward pass the logits, float64 the cosine; int8 is off by half a step."""
    index, store, policy = Index.open(whole.data), cache.open(whole.store), policies.load(POLICY)
    network = models.create(whole.teacher, index.classes)
    network.module.eval()
    view = 2
    rows = index.good[::3]
    drawn = views.of(index.records, whole.seed, view, policy)
    encoded, weight = store.load_plane(view).gather(rows)
    decoded = store.codec.decode(encoded, philox.stream(whole.seed, index.records["key_hash"][rows], view))
    for i, row in enumerate(rows):
        image = Image.open(io.BytesIO(index.read(row))).convert("RGB")
        augmented = pillow.jda(image, policy.table, int(drawn["mask"][row]), int(drawn["signs"][row]))
        pixels = [
            np.asarray(pillow.base(source, drawn["box"][row, s], bool(drawn["flip"][row, s]), 32, -1))
            for s, source in enumerate((image, augmented))
        ]
        with torch.inference_mode():
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
            logits = network.module((batch - 0.5) / 0.5).numpy()
        step = np.ptp(logits, axis=1, keepdims=True) / 254
        assert (np.abs(decoded[i] - logits) <= 0.5001 * step + 1e-4).all()
        o, a = logits.astype(np.float64)
        assert weight[i] == pytest.approx(1 + o @ a / np.linalg.norm(o) / np.linalg.norm(a), abs=1e-5)


def test_the_student_replays_the_teachers_pixels(whole):
    """Stored digests equal those of a shuffled pass in other batches, for every sample and view."""
    index, store, policy = Index.open(whole.data), cache.open(whole.store), policies.load(POLICY)
    rng = np.random.default_rng(0)
    for view, (batch, threads) in enumerate([(7, 1), (64, 2), (7, 2)]):
        seen, digest = 0, store.load_plane(view).digest
        requests = [
            (rows, views.of(index.records[rows], whole.seed, view, policy))
            for rows in np.array_split(rng.permutation(index.good), -(-len(index.good) // batch))
        ]
        for item in load(index, requests, policy, threads=threads, digests=True):
            np.testing.assert_array_equal(item.digests, digest[item.rows])
            seen += len(item.rows)
        assert seen == len(index.good)


def test_a_finished_store_is_left_alone(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.store.rglob("*") if path.is_file()}
    precompute.run(whole)
    assert before == {path: path.stat().st_mtime_ns for path in whole.store.rglob("*") if path.is_file()}
    assert "none, all were there" in capsys.readouterr().out


def finished(target, config) -> float:
    """Run in a child of its own to the end; seconds."""
    child = FORK.Process(target=target, args=(config,))
    started = time.monotonic()
    child.start()
    child.join()
    assert child.exitcode == 0
    return time.monotonic() - started


def killed(target, config, delay: float) -> bool:
    """Run in a child and SIGKILL it after `delay` seconds; was it still running?"""
    child = FORK.Process(target=target, args=(config,))
    child.start()
    child.join(delay)
    child.kill()  # SIGKILL; nothing happens to a child that has ended
    child.join()
    return child.exitcode == -signal.SIGKILL


def changed(options, **fields):
    return dataclasses.replace(options, **fields)


def test_sigkill_at_twenty_random_moments(whole, tmp_path):
    """Rerun after each kill: the store equals the uninterrupted one, and committed blocks keep their files."""
    moments = random.Random(0)
    finished(int, 0)  # starts the server that children are forked from
    duration = finished(precompute.run, changed(whole, store=tmp_path / "timed"))
    kills = partial = 0
    for number in range(80):
        run = changed(whole, store=tmp_path / str(number))
        hit = killed(precompute.run, run, moments.uniform(0, duration))
        kills += hit
        kept = {}
        if run.store.exists():
            missing = cache.open(run.store).missing_blocks()
            blocks = {(view, block) for view in range(whole.views) for block in range(blocks_of(whole))}
            partial += 0 < len(missing) < len(blocks)
            kept = {
                path: path.stat().st_mtime_ns
                for view, block in blocks - set(missing)
                for path in files_of(run.store, view, block)
            }
        if hit:
            finished(precompute.run, run)
            assert kept == {path: path.stat().st_mtime_ns for path in kept}
        assert_equal_stores(run.store, whole.store)
        if kills == 20:
            break
    assert kills == 20, "the kills came too late"
    assert partial >= 3, "the kills never fell between two blocks"


def blocks_of(options: PrecomputeTeacher) -> int:
    return cache.open(options.store).manifest.blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed"),
        ({"views": 4}, "views"),
        ({"policy": "cifar10"}, "mean|policy|base|size"),
        ({"codec": "fp16"}, "codec"),
        ({"block_rows": 25}, "block_rows"),
    ],
)
def test_a_store_of_other_options_is_refused(whole, change, message):
    with pytest.raises(UserError, match=f"another ({message})"):
        precompute.run(changed(whole, **change))


def test_a_store_of_another_teacher_is_refused(whole, tmp_path):
    path = tmp_path / "other.safetensors"
    models.save_weights(models.create("cifar/resnet8", 10, seed=4).module, path)
    with pytest.raises(UserError, match=r"another teacher_weights"):
        precompute.run(changed(whole, teacher=f"cifar/resnet8@{path}"))


def test_non_finite_logits_are_refused(whole, tmp_path):
    network = models.create("cifar/resnet8", 10, seed=3).module
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    models.save_weights(network, tmp_path / "nan.safetensors")
    run = changed(whole, teacher=f"cifar/resnet8@{tmp_path / 'nan.safetensors'}", store=tmp_path / "s")
    with pytest.raises(UserError, match="finite"):
        precompute.run(run)
    assert len(cache.open(run.store).missing_blocks()) == whole.views * cache.open(run.store).manifest.blocks
