"""Methods that move temperatures, repair labels or compare samples: each against its definition in NumPy."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from support.papers import isotonic, logits, pairs, views, with_gradient

from pipeline.training.methods import METHODS, View, ida, loss

NAMES = ["energy", "dytkd", "triplet", "ida", "calibrated"]
BY_BATCH = ("triplet", "calibrated")
DEFAULTS = {"temperature": 4.0, "alpha": 0.5, "kd_weight": 2.0}
SHAPES = {"batch": st.integers(2, 6), "classes": st.integers(2, 9), "seed": st.integers(0, 2**31)}


def ranks(batch: int) -> torch.Tensor:
    """Energies of all kinds, whatever the batch."""
    return (torch.arange(batch, dtype=torch.float64) * 0.37 + 0.05) % 1


def term(name, student, teacher, target, temperature, weight, method=None, kept=None):
    view = View(
        student=student, teacher=teacher, target=target, weight=weight, temperature=temperature,
        energy=ranks(len(student)).to(student.dtype), kept=kept,
    )  # fmt: skip
    return (method or METHODS[name]()).term(view)


def divergence(t, z, temperature, student=None):
    log_p, log_q = log_softmax(t / temperature, axis=-1), log_softmax(z / (student or temperature), axis=-1)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


# In NumPy, as the docstrings say it: z, t (B, C), target, temperature, weight -> (B,)


def paper_energy(z, t, target, temperature, weight):
    times = [1.5 if rank < 0.3 else 0.5 if rank >= 0.7 else 1.0 for rank in ranks(len(z)).tolist()]
    return [f**2 * divergence(b, a, f * temperature) for a, b, f in zip(z, t, times, strict=True)]


def paper_dytkd(z, t, target, temperature, weight):
    return divergence(t, z, temperature)


def paper_triplet(z, t, target, temperature, weight):
    z, t = (values - values.mean(1, keepdims=True) for values in (z, t))
    found = []
    for i in range(len(z)):
        after = [*range(i + 1, len(z)), *range(i)]
        others = [j for j in after if target[j] != target[i] and weight[j] > 0]
        distances = [np.linalg.norm(t[i] - z[j]) for j in (i, *others)]
        found.append(max(0.0, distances[0] - distances[1] + 5) * 2 / temperature**2 if others else 0.0)
    return found


def paper_ida(z, t, target, temperature, weight):
    found = []
    for a, b, y in zip(z, t, target, strict=True):
        m = isotonic(softmax(b / temperature), int(y))
        found.append((m * (np.log(m) - log_softmax(a / temperature))).sum())
    return found


def paper_calibrated(z, t, target, temperature, weight):
    def mean(log_s):
        return (weight * divergence(t, z, temperature, temperature * np.exp(log_s))).sum()

    best = minimize_scalar(mean, bounds=(-np.log(64), np.log(64)), method="bounded", options={"xatol": 1e-11}).x
    return divergence(t, z, temperature, temperature * np.exp(best))


PAPERS = {name.removeprefix("paper_"): value for name, value in globals().items() if name.startswith("paper_")}


@pytest.mark.parametrize("name", NAMES)
@given(**SHAPES, temperature=st.floats(0.7, 10))
@settings(max_examples=15, deadline=None)
def test_terms_are_their_definitions(name, batch, classes, seed, temperature):
    z, t, target, weight = views(batch, classes, seed)
    expected = np.array(PAPERS[name](z.numpy(), t.numpy(), target.numpy(), temperature, weight.numpy()))
    found = term(name, z, t, target, temperature, weight).numpy()
    if name == "calibrated":  # alike where it is asked for: on the mean, which is least there
        found, expected = (np.average(values, weights=weight) for values in (found, expected))
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    z, t, target, weight = views(5, 6, seed=4)
    if name in BY_BATCH:
        one = lambda z: (term(name, z, t, target, 2.0, weight) * weight).sum()  # noqa: E731
    else:
        one = lambda z: term(name, z, t, target, 2.0, weight)  # noqa: E731
    assert torch.autograd.gradcheck(one, z.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
@given(**SHAPES)
@settings(max_examples=8, deadline=None)
def test_a_shift_of_teacher_or_student_changes_nothing(name, batch, classes, seed):
    z, t, target, weight = views(batch, classes, seed)
    shift_z, shift_t = logits(2, batch, 1, seed=seed, scale=100.0)
    here = with_gradient(lambda z: term(name, z, t, target, 3.0, weight), z)
    there = with_gradient(lambda z: term(name, z, t + shift_t, target, 3.0, weight), z + shift_z)
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(here[1].sum(1), torch.zeros_like(weight), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_that_are_not_valid_might_as_well_not_be_there(name):
    student, teacher, target, weight = pairs(7, 5)
    energy = torch.stack([ranks(7), ranks(7).flip(0)], 1)
    keep = torch.tensor([0, 2, 3, 6])
    valid = torch.zeros(7, dtype=torch.bool).index_fill(0, keep, True)
    dead = ~valid
    student[:, dead], teacher[dead], weight[dead], target[dead], energy[dead] = *(torch.nan,) * 3, -100, torch.nan
    method = METHODS[name]()
    value, gradient = with_gradient(
        lambda z: loss(method, z, teacher, target, weight, valid=valid, energy=energy, **DEFAULTS), student
    )
    dropped = with_gradient(
        lambda z: loss(method, z, teacher[keep], target[keep], weight[keep], energy=energy[keep], **DEFAULTS),
        student[:, keep],
    )
    torch.testing.assert_close((value, gradient[:, keep]), dropped)
    assert not gradient[:, dead].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_extreme_logits_have_finite_losses_and_gradients(name, size):
    z, t, target, _ = (values.float() if values.is_floating_point() else values for values in views(4, 6))
    hot = size * torch.nn.functional.one_hot(target, 6).float()
    cases = (hot, t), (z, hot), (hot, hot), (hot.roll(1, 1), hot), (hot[:1], t[:1])
    for student, teacher in cases:
        found = with_gradient(lambda z, t=teacher: term(name, z, t, target[: len(t)], 4.0, torch.ones(len(t))), student)
        assert all(values.isfinite().all() for values in found)


@pytest.mark.parametrize("name", ["energy", "dytkd", "calibrated"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    _, t, target, weight = views(6, 9)
    for values in with_gradient(lambda z: term(name, z, t, target, 4.0, weight), t):
        torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-7)


def test_the_size_of_a_students_logits_is_nothing_to_a_calibrated_temperature():
    z, t, target, weight = views(6, 9)
    z = z + t  # a student that agrees with its teacher not at all is best left undecided: S has no end
    here, there = (term("calibrated", z * size, t, target, 4.0, weight) for size in (1, 7))
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-8)


def test_a_temperature_moves_with_the_loss_within_its_bounds():
    """Above 3.5 nats 1.1 times, between 0.04 and 0.08 0.91 times, never beyond 1 and 16; and it is that of the loss."""
    method = METHODS["dytkd"]()
    kept, expected = method.keeps(SimpleNamespace(temperature=4.0)), 4.0
    for hard in (5.0, 3.6, 1.0, 0.05, 0.09, 0.03, *[0.05] * 20, *[9.0] * 40):
        method.observe(kept, torch.tensor(hard))
        expected *= 1.1 if hard > 3.5 else 0.91 if 0.04 < hard < 0.08 else 1
        expected = min(max(expected, 1.0), 16.0)
        assert float(kept.temperature) == pytest.approx(expected, rel=1e-5)
    z, t, target, weight = views(3, 5)
    found = term("dytkd", z, t, target, 4.0, weight, kept=kept)
    assert 4**2 * found.numpy() == pytest.approx(16**2 * divergence(t.numpy(), z.numpy(), 16.0), rel=1e-6)


def test_a_batch_tells_the_temperature_its_mean_cross_entropy():
    student, teacher, target, weight = pairs(4, 5)
    told = []

    class Told(METHODS["dytkd"]):
        def observe(self, kept, hard):
            told.append(float(hard))

    valid = torch.tensor([True, True, False, True])
    loss(Told(), student, teacher, target, weight, valid=valid, kept=torch.nn.Identity(), **DEFAULTS)
    z, y = student[:, valid].flatten(0, 1), target[valid].repeat(2)
    assert told == [pytest.approx(float(torch.nn.functional.cross_entropy(z, y)))]


# Isotonic labels


def trees(count: int):
    """Distributions of 1 to 9 classes, with ties, and their classes: first, second (half of them mixed)."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        classes = int(rng.integers(1, 10))
        p = rng.dirichlet(np.full(classes, rng.choice([0.1, 1.0, 10.0])))
        p = np.round(p, 1) + 0.01 if rng.random() < 0.3 else p
        yield p, *rng.integers(0, classes, 2)


def test_the_tree_algorithm_is_isotonic_regression():
    """1,000 random trees against non-negative least squares, which knows no trees."""
    for number, (p, first, second) in enumerate(trees(1000)):
        rows = torch.tensor(p)[None], torch.tensor([first])
        second = second if number % 2 else first
        found = ida.tree(*rows, torch.tensor([second]))[0].numpy()
        np.testing.assert_allclose(found, isotonic(p, first, second), rtol=0, atol=1e-9)
        if second == first:
            np.testing.assert_array_equal(ida.tree(*rows)[0].numpy(), found)


def test_the_linear_approximation_keeps_order_and_sum_and_is_no_nearer():
    further = 0
    for p, first, second in trees(500):
        rows = torch.tensor(p)[None], torch.tensor([first]), torch.tensor([second])
        near, found = (solve(*rows)[0].numpy() for solve in (ida.tree, ida.linear))
        rest = np.delete(found, [first, second])
        assert found.sum() == pytest.approx(p.sum()) and (found[first] >= found[second] - 1e-12)
        assert (rest <= found[second] + 1e-12).all()
        distances = ((near - p) ** 2).sum(), ((found - p) ** 2).sum()
        assert distances[0] <= distances[1] + 1e-12
        further += distances[1] > distances[0] + 1e-9
        if (p[first] >= p[second]) and (np.delete(p, [first, second]) <= p[second]).all():
            np.testing.assert_allclose(found, p, atol=1e-15)  # nothing to repair
    assert further > 50


def test_mixed_labels_of_a_batch_are_those_of_its_rows():
    p = torch.tensor(np.random.default_rng(1).dirichlet(np.ones(7), 64))
    first, second = torch.arange(64) % 7, torch.arange(64) // 7 % 7
    for solve in (ida.tree, ida.linear):
        rows = [solve(p[i : i + 1], first[i : i + 1], second[i : i + 1]) for i in range(64)]
        torch.testing.assert_close(solve(p, first, second), torch.cat(rows))


def test_the_linear_solver_is_an_option():
    z, t, target, weight = views(5, 6)
    one, other = (term("ida", z, t, target, 1.0, weight, METHODS["ida"](solver=way)) for way in ("tree", "linear"))
    m = ida.linear(t.softmax(1), target)
    torch.testing.assert_close(other, (m * (m.log() - z.log_softmax(1))).sum(1))
    assert (one != other).any()


def test_options_are_those_of_the_method():
    z, t, target, weight = views(5, 6)
    for name, changes in {"energy": {"warm": 1.0, "cold": 1.0}, "triplet": {"factor": 0.0}}.items():
        found = term(name, z, t, target, 4.0, weight, dataclasses.replace(METHODS[name](), **changes))
        expected = divergence(t.numpy(), z.numpy(), 4.0) if name == "energy" else np.zeros(5)
        assert found.numpy() == pytest.approx(expected)
