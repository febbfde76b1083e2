"""--repeat M: a decoded image serves M views in as many steps, each with the labels of its own view."""

import struct
import zlib
from collections import Counter

import numpy as np
import pytest

import cache
from cache import UserError
from pipeline import Replay
from pipeline.config import TrainStudent
from pipeline.training import train_student
from pipeline.views import on_cpu


def replay(labels, digits, **options) -> Replay:
    fixed = dict(batch_size=32, device="cpu", epochs=3, repeat=2, threads=2)
    return Replay(digits / "train", labels, **{**fixed, **options})


def seen(batches) -> list[tuple]:
    return [
        (
            batch.epoch,
            batch.step,
            batch.made.rows.tolist(),
            batch.stored.plane.view,
            zlib.crc32(batch.made.images.numpy()),
        )
        for batch in batches
    ]


def test_every_view_of_every_sample_comes_once_with_its_labels_from_one_decode(labels, digits, monkeypatch):
    """Three epochs of two: the last one is alone. Pixels are the teacher's of that view, by its digests."""
    decoded, decode = [], on_cpu.decode
    monkeypatch.setattr(on_cpu, "decode", lambda data: [decoded.append(data), decode(data)][1])
    planes = [cache.open(labels).load_plane(view) for view in range(2)]
    met: list[Counter] = [Counter(), Counter()]
    with replay(labels, digits) as made:
        steps = made.steps_per_epoch
        batches = list(made)
    for number, batch in enumerate(batches):
        rows, images, view = batch.made.rows, batch.made.images.numpy(), batch.stored.plane.view
        assert (batch.epoch, batch.step) == divmod(number, steps)
        crcs = [[zlib.crc32(images[which, i]) for which in range(2)] for i in range(len(rows))]
        both = [zlib.crc32(struct.pack("<2I", *pair)) for pair in crcs]
        np.testing.assert_array_equal(both, planes[view].digest[rows])
        met[batch.epoch // 2].update((view, row) for row in rows.tolist())
        if batch.epoch < 2 and number % 2:
            assert rows.tolist() == batches[number - 1].made.rows.tolist()
    good = list(made.rows)
    assert met[0] == Counter((view, row) for view in range(2) for row in good)
    assert met[1] == Counter((0, row) for row in good)
    assert len(decoded) == 2 * len(good)


@pytest.mark.parametrize("at", [1, 2, 5, 6, 7, 12, 13])
def test_a_run_resumes_between_two_views_of_a_sample(labels, digits, at):
    with replay(labels, digits) as whole:
        expected, steps = seen(whole), whole.steps_per_epoch
    with replay(labels, digits, start=divmod(at, steps)) as rest:
        assert seen(rest) == expected[at:]


def test_another_repeat_is_another_run(labels, digits):
    state = replay(labels, digits).state_dict()
    with pytest.raises(UserError, match="cannot resume: another repeat; found 1, expected 2"):
        replay(labels, digits, repeat=1).load_state_dict(state)
    with pytest.raises(UserError, match="repeat out of range"):
        replay(labels, digits, repeat=0)


def test_a_student_learns_from_the_labels_of_each_view(labels, digits, tmp_path):
    """Its check of pixels and labels holds in every step, and the loss is finite to the end."""
    config = TrainStudent(
        data=digits / "train", store=str(labels), student="cifar/resnet8", out=tmp_path / "run", device="cpu",
        epochs=2, repeat=2, batch_size=32, check_share=1.0,
    )  # fmt: skip
    assert np.isfinite(train_student.run(config)["loss"])
