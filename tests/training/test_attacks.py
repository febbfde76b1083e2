"""Samples that a live teacher's gradient makes, by a linear teacher whose steps NumPy takes as well."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from cache import UserError
from pipeline.config import TrainStudent
from pipeline.training.methods import make
from pipeline.training.methods.bss import to_boundary
from pipeline.training.methods.tald import climbed
from pipeline.training.objectives import Distillation, Seen
from pipeline.views.batch import Batch

B, S, C = 7, 4, 5
GENERATOR = np.random.default_rng(0)
WEIGHTS = GENERATOR.normal(size=(C, S * S * 3)) / 50
PIXELS = GENERATOR.integers(60, 190, (B, S, S, 3)).astype(np.float64)
TARGET = GENERATOR.integers(0, C, B)


def linear(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flatten(1) @ torch.from_numpy(WEIGHTS).to(pixels.dtype).T


def within(moved, centre, reach):
    return np.clip(np.clip(moved, centre - reach, centre + reach), 0, 255)


@pytest.mark.parametrize("reach", [3.0, 1000.0])
def test_steps_to_the_boundary_are_those_of_the_paper(reach):
    wanted = (TARGET + 1 + np.arange(B) % 3) % C
    found = to_boundary(
        torch.from_numpy(PIXELS), torch.from_numpy(TARGET), torch.from_numpy(wanted), linear, 6, 0.3, reach
    )
    moved = PIXELS.reshape(B, -1)
    for _ in range(6):
        slope = WEIGHTS[TARGET] - WEIGHTS[wanted]
        gap = (moved * slope).sum(1)
        moved = moved - 0.3 * ((gap + 0.01) / (slope**2).sum(1))[:, None] * slope
        moved = within(moved, PIXELS.reshape(B, -1), reach)
    np.testing.assert_allclose(found.detach().numpy().reshape(B, -1), moved, rtol=1e-9)


def test_a_boundary_is_reached():
    """Where nothing stops it, each step leaves 0.7 of the gap, and of the hundredth beyond."""
    wanted = (TARGET + 1) % C
    pixels = torch.from_numpy(PIXELS)
    gap = lambda x: (x.flatten(1).numpy() * (WEIGHTS[TARGET] - WEIGHTS[wanted])).sum(1)  # noqa: E731
    moved = to_boundary(pixels, torch.from_numpy(TARGET), torch.from_numpy(wanted), linear, 10, 0.3, 1000.0).detach()
    inside = ((moved > 0) & (moved < 255)).flatten(1).all(1).numpy()
    assert inside.sum() >= 3
    expected = 0.7**10 * (gap(pixels) + 0.01) - 0.01
    np.testing.assert_allclose(gap(moved)[inside], expected[inside], atol=1e-9)


def test_a_climb_is_by_signs_within_the_ball():
    start = PIXELS + GENERATOR.uniform(-20, 20, PIXELS.shape)
    found = climbed(
        torch.from_numpy(PIXELS), torch.from_numpy(start), torch.from_numpy(TARGET), linear, 5, 2.0, 8.0
    ).detach()
    moved = within(start, PIXELS, 8.0)
    for _ in range(5):
        p = softmax(moved.reshape(B, -1) @ WEIGHTS.T, axis=1)
        slope = ((p - np.eye(C)[TARGET]) @ WEIGHTS).reshape(PIXELS.shape)
        moved = within(moved + 2 * np.sign(slope), PIXELS, 8.0)
    np.testing.assert_allclose(found.numpy(), moved, rtol=1e-12)
    hard = lambda x: -log_softmax(x.reshape(B, -1) @ WEIGHTS.T, axis=1)[np.arange(B), TARGET]  # noqa: E731
    assert (hard(moved) > hard(PIXELS)).all()


class Linear:
    """A teacher of that kind."""

    device = torch.device("cpu")

    def of_pixels(self, pixels):
        return linear(pixels.float())

    def __call__(self, batch):
        return torch.stack([self.of_pixels(images) for images in batch.images], dim=1)


def objective(loss: str, epoch: int, **options) -> tuple[Distillation, Batch]:
    config = TrainStudent(data=None, out=None, store=None, student="x", loss=loss, epochs=4, temperature=3.0)  # type: ignore[arg-type]
    config = dataclasses.replace(config, **options)
    images = torch.from_numpy(np.stack([PIXELS, PIXELS[::-1]]).astype(np.uint8))
    batch = Batch(np.arange(B), torch.from_numpy(TARGET), images, None)
    return Distillation(config, epoch, teacher=Linear()), batch  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "epoch", "counts"), [("bss", 0, 2.0), ("bss", 2, 2 / 3), ("bss", 3, 0), ("tald", 3, 1)]
)
def test_the_loss_is_kds_and_that_of_the_samples_at_the_temperature(loss, epoch, counts):
    torch.manual_seed(0)
    made, batch = objective(loss, epoch)
    chosen = np.ones((2, B), bool)
    more = made.begin(batch, chosen)
    assert more is not None and more.dtype == torch.uint8
    student = torch.randn(2 * B + len(more), C) * 3
    found, terms = made(student, Seen(batch, chosen, 2.0 * B, logged=True))
    plain = objective("kd", epoch)[0]
    plain.begin(batch, chosen)
    expected, _ = plain(student[: 2 * B], Seen(batch, chosen, 2.0 * B))
    t, z = more.numpy().reshape(len(more), -1) @ WEIGHTS.T, student[2 * B :].numpy().astype(np.float64)
    log_p, log_q = log_softmax(t / 3, axis=1), log_softmax(z / 3, axis=1)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    assert float(terms["kl_attack"]) == pytest.approx(kl, rel=1e-4)
    assert float(found) == pytest.approx(float(expected) + counts * 9 * kl, rel=1e-4)


def test_samples_are_those_that_the_teacher_knows_and_stay_near():
    made, batch = objective("bss", 0, loss_option=("samples=2", "reach=4"))
    right = np.flatnonzero((batch.images[0].numpy().reshape(B, -1) @ WEIGHTS.T).argmax(1) == TARGET)
    more = made.begin(batch, np.ones((2, B), bool))
    if len(right):
        assert more is not None and len(more) == min(len(right), 2)
        assert (more.int() - batch.images[0][right[:2]].int()).abs().max() <= 4
    known = torch.from_numpy((batch.images[0].numpy().reshape(B, -1) @ WEIGHTS.T).argmax(1))
    nobody = dataclasses.replace(batch, labels=(known + 1) % C)
    assert made.begin(nobody, np.ones((2, B), bool)) is None
    made, batch = objective("tald", 0, loss_option=("samples=3", "particles=2"))
    more = made.begin(batch, np.ones((2, B), bool))
    assert more is not None and len(more) == 6 and not torch.equal(more[:3], more[3:])
    assert (more.int() - batch.images[0][:3].int().repeat(2, 1, 1, 1)).abs().max() <= 8
    assert made.begin(batch, np.zeros((2, B), bool)) is None


def test_without_a_live_teacher_there_is_no_gradient(tiny, tmp_path):
    from pipeline.training import train_student

    config = TrainStudent(
        data=tiny.data, store=str(tiny.stores / "store"), student="cifar/resnet8", out=tmp_path / "run", loss="bss"
    )
    with pytest.raises(UserError, match="--loss bss needs the teacher's gradient; found none; fix: give --live"):
        train_student.run(config)
    assert not (tmp_path / "run").exists() and make("bss").needs >= {"attack"}
