"""The door for other people's loops: what a batch holds, where a run goes on, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tars import mixed_tar

import cache
from kernels import ccd_loss
from pipeline import Replay, UserError
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.views import draw

OPTIONS = {"batch_size": 16, "epochs": 3, "device": "cpu", "threads": 2}


def seen(replay: Replay) -> list[tuple]:
    """Where each batch was, its rows and its pixels."""
    return [
        (batch.epoch, batch.step, batch.made.rows.tolist(), batch.made.images.numpy().tobytes()) for batch in replay
    ]


@pytest.fixture(scope="module")
def whole(digits, labels) -> list[tuple]:
    with Replay(digits / "train", labels, **OPTIONS) as replay:
        assert len(replay) == 3 * replay.steps_per_epoch
        found = seen(replay)
        assert len(replay) == 0 and seen(replay) == []
    return found


def test_every_sample_comes_once_an_epoch(whole, digits):
    good = Index.open(digits / "train").good.tolist()
    for epoch in range(3):
        assert sorted(row for at, _, rows, _ in whole if at == epoch for row in rows) == good


@pytest.mark.parametrize("start", [(0, 5), (1, 0), (1, 12), (2, 3)])
def test_a_run_begins_anywhere_and_sees_the_rest(whole, digits, labels, start):
    steps = len(whole) // 3
    with Replay(digits / "train", labels, start=start, **OPTIONS) as replay:
        assert seen(replay) == whole[start[0] * steps + start[1] :]


def test_another_run_goes_on_from_a_state(whole, digits, labels):
    with Replay(digits / "train", labels, **OPTIONS) as replay:
        for _ in zip(range(7), replay, strict=False):
            pass
        state = replay.state_dict()
    with Replay(digits / "train", labels, **OPTIONS) as other:
        for _ in other.epoch():  # reading ahead elsewhere
            break
        other.load_state_dict(state)
        assert seen(other) == whole[7:]


def test_epochs_end_and_follow_each_other(whole, digits, labels):
    with Replay(digits / "train", labels, start=(0, 4), **OPTIONS) as replay:
        lengths = []
        while len(replay):
            lengths.append(len(list(replay.epoch())))
    steps = replay.steps_per_epoch
    assert lengths == [steps - 4, steps, steps]


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_each_batch(whole, digits, labels, world):
    ranks = [Replay(digits / "train", labels, rank=rank, world=world, **OPTIONS) for rank in range(world)]
    parts = [seen(replay) for replay in ranks]
    for at, (epoch, step, rows, _) in enumerate(whole):
        assert [part[at][:2] for part in parts] == [(epoch, step)] * world
        assert [row for part in parts for row in part[at][2]] == rows
    for replay in ranks:
        replay.close()


def test_a_batch_holds_what_the_teacher_saw_and_said(digits, labels):
    store, index = cache.open(str(labels)), Index.open(digits / "train")
    with Replay(index, store, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), **OPTIONS) as replay:
        batch = next(iter(replay))
        rows, plane = batch.made.rows, store.load_plane(0)
        pixels = batch.made.images.flatten(0, 1).numpy().astype(np.float64)
        expected = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]
        np.testing.assert_allclose(batch.images.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
        assert batch.images.is_contiguous(memory_format=torch.channels_last) and len(batch) == 16
        assert batch.target.tolist() == index.records["label"][rows].tolist()
        decoded = store.codec.decode(plane.codes[rows], store.dither_keys(0, rows))
        np.testing.assert_allclose(batch.teacher.logits().numpy(), decoded, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(batch.teacher.weight.numpy(), plane.weight[rows])
        views = draw(
            store.manifest.seed,
            index.records["key_hash"][rows],
            0,
            index.records["height"][rows],
            index.records["width"][rows],
            replay.policy,
        )
        assert len(views) == 16 and batch.valid.all()


def test_a_sample_that_the_teacher_skipped_has_no_loss(digits, labels, monkeypatch):
    load = cache.Store.load_plane
    lost: set[int] = set()

    def holed(store, view, *arguments):
        plane = load(store, view, *arguments)
        plane.weight[list(lost)] = np.nan
        return plane

    with Replay(digits / "train", labels, **OPTIONS) as replay:
        rows = next(iter(replay)).made.rows
    lost |= {int(rows[3]), int(rows[8])}
    monkeypatch.setattr(cache.Store, "load_plane", holed)
    with Replay(digits / "train", labels, **OPTIONS) as replay:
        batch = next(iter(replay))
        assert np.flatnonzero(~batch.valid.numpy()).tolist() == [3, 8]
        student = torch.randn(32, 10, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
        loss = ccd_loss(*student.chunk(2), batch.teacher, batch.target, valid=batch.valid)
        (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()
    assert (gradient.abs().sum(1) == 0).nonzero().flatten().tolist() == [3, 8, 19, 24]


def test_a_student_may_take_the_first_views_alone_and_needs_no_others(digits, labels, tmp_path):
    store = cache.open(shutil.copytree(labels, tmp_path / "labels.zarr"))
    shutil.rmtree(Path(store.path) / "commit" / "c" / "1")
    assert {view for view, _ in cache.open(store.path).missing_blocks()} == {1}
    with pytest.raises(UserError, match="missing blocks"):
        Replay(digits / "train", store.path, **OPTIONS)
    index, plane = Index.open(digits / "train"), store.load_plane(0)
    with Replay(digits / "train", store.path, views=1, **OPTIONS) as replay:
        state, batches = replay.state_dict(), list(replay)
    assert [batch.epoch for batch in batches] == sorted(batch.epoch for batch in batches)
    first = {}
    for batch in batches:
        expected = plane.gather(batch.made.rows)[0]
        np.testing.assert_array_equal(batch.teacher.gathered().numpy(), expected)
        for row, image in zip(batch.made.rows, batch.made.images.numpy().swapaxes(0, 1), strict=True):
            np.testing.assert_array_equal(image, first.setdefault(row, image))  # the same view in every epoch
    assert sorted(first) == index.good.tolist()
    with pytest.raises(UserError, match="cannot resume: another views"):
        Replay(digits / "train", labels, **OPTIONS).load_state_dict(state)


def test_without_a_store_views_come_from_the_seed(digits):
    with Replay(digits / "train", policy="cifar10", seed=3, **OPTIONS) as replay:
        first, second = (list(replay.epoch()) for _ in range(2))
    assert first[0].made.images.shape == (2, 16, 32, 32, 3)
    assert first[0].valid.all() and sorted(np.concatenate([b.made.rows for b in second])) == replay.index.good.tolist()


def test_other_pixels_than_the_teachers_end_the_run(digits, labels):
    """As another decoder's would be: one value of one view is one level off."""
    with Replay(digits / "train", labels, **OPTIONS) as replay:
        batches = replay.loader.batches

        def nudged(*arguments, **options):
            for batch in batches(*arguments, **options):
                batch.images[1, 5, 3, 3, 0] ^= 1
                yield batch

        replay.loader.batches = nudged
        with pytest.raises(UserError, match="would not see the pixels that the teacher saw; found 1 of 16 pairs"):
            next(iter(replay))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 3, "world": 4, "rank": 0}, "batch_size out of range; found 3, expected at least 4"),
        ({"world": 2, "rank": 2}, "rank out of range; found 2, expected 0 to 1"),
        ({"rank": -1}, "rank out of range; found -1, expected 0 to 0"),
        ({"epochs": 0}, "epochs out of range; found 0, expected at least 1"),
        ({"start": (4, 0)}, "no such place in the run; found epoch 4, step 0, expected up to 3 epochs"),
        ({"start": (0, -1)}, "no such place in the run"),
        ({"policy": "cifar10"}, "policy and store; found both, expected one"),
        ({"device": "tpu"}, "unknown device; found tpu"),
        ({"views": 3}, "views out of range; found 3, expected 1 to 2, as the store has"),
        ({"few_shot": 0.0}, "--few-shot out of range"),
        ({"threads": -1}, "--threads out of range"),
    ],
)
def test_what_does_not_fit_is_one_line(digits, labels, options, said):
    with pytest.raises(UserError) as caught:
        Replay(digits / "train", labels, **OPTIONS | options)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_store_of_other_data_or_without_all_its_labels_is_refused(digits, labels, tmp_path):
    mixed_tar(tmp_path / "a.tar", 20)
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "data", classes=10)
    with pytest.raises(UserError, match="dataset"):
        Replay(tmp_path / "data", labels, **OPTIONS)
    with pytest.raises(UserError, match=r"no store|cannot|not"):
        Replay(digits / "train", tmp_path / "nowhere.zarr", **OPTIONS)
    halved = shutil.copytree(labels, tmp_path / "halved.zarr")
    shutil.rmtree(next(path for path in halved.iterdir() if path.name.startswith("commit")))
    with pytest.raises(UserError):
        Replay(digits / "train", halved, **OPTIONS)


def test_a_state_of_another_run_is_refused(digits, labels):
    with Replay(digits / "train", labels, **OPTIONS) as replay:
        state = replay.state_dict()
    for options in ({"batch_size": 8}, {"seed": 1}, {"few_shot": 0.5}):
        with pytest.raises(UserError, match="cannot resume: another"):
            Replay(digits / "train", labels, **OPTIONS | options).load_state_dict(state)
