"""The terms of `pipeline.training.methods` against the papers' formulas, `papers.py`."""

import math
import re
import statistics
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.papers import (
    NAMES,
    PER_SAMPLE,
    combined,
    lists,
    logits,
    pairs,
    paper_dist,
    paper_jsd,
    paper_mean,
    paper_reverse,
    softmax,
    term,
    views,
    with_gradient,
)
from torch.nn import functional as F

from cache import UserError
from kernels import reference
from pipeline.config import Loss
from pipeline.training.methods import METHODS, loss, make

DEFAULTS = {"temperature": 4.0, "alpha": 0.5, "kd_weight": 2.0}
SHAPES = {"batch": st.integers(1, 6), "classes": st.integers(2, 12), "seed": st.integers(0, 2**31)}
TEMPERATURES = st.floats(0.7, 10)


@pytest.mark.parametrize("name", PER_SAMPLE)
@given(**SHAPES, temperature=TEMPERATURES)
@settings(max_examples=25, deadline=None)
def test_terms_of_one_sample_are_the_papers(name, batch, classes, seed, temperature):
    z, t, target, weight = views(batch, classes, seed)
    expected = PER_SAMPLE[name](*lists(z, t, target), temperature, None)
    assert term(name, z, t, target, temperature, weight).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name, paper", [("reverse", paper_reverse), ("jsd", paper_jsd)])
@given(**SHAPES, temperature=TEMPERATURES)
@settings(max_examples=15, deadline=None)
def test_other_divergences_are_their_definitions(name, paper, batch, classes, seed, temperature):
    """`kd_loss` has them, no --loss does."""
    z, t, target, _ = views(batch, classes, seed)
    found = reference.SOFT[name](z, t, target, temperature)
    assert found.tolist() == pytest.approx(paper(*lists(z, t, target), temperature, None), rel=1e-9, abs=1e-12)
    assert torch.autograd.gradcheck(lambda z: reference.SOFT[name](z, t, target, temperature), z.requires_grad_())


@given(**SHAPES, temperature=TEMPERATURES, beta=st.floats(0, 3), gamma=st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_weighted_mean_of_dist_is_the_papers(batch, classes, seed, temperature, beta, gamma):
    """|r| is known to 2e-16 times its condition, σ over mean, at worst some 1e5 for these logits."""
    z, t, target, weight = views(batch, classes, seed)
    found = term("dist", z, t, target, temperature, weight, beta=beta, gamma=gamma)
    expected = paper_dist(*lists(z, t, target), temperature, weight.numpy(), beta=beta, gamma=gamma)
    assert float((found * weight).sum() / weight.sum()) == pytest.approx(expected, abs=1e-9)


def test_dist_of_equal_weights_is_the_mean_of_numpys_correlations():
    z, t, target, _ = views(9, 5)
    q, p = ((row / 4).softmax(1).numpy() for row in (z, t))
    both = np.corrcoef(q, p)[:9, 9:].diagonal(), np.corrcoef(q, p, rowvar=False)[:5, 5:].diagonal()
    for options, expected in (({"gamma": 0}, 1 - both[0].mean()), ({"beta": 0}, 1 - both[1].mean())):
        assert float(term("dist", z, t, target, 4.0, torch.ones(9), **options).mean()) == pytest.approx(expected)


@given(**SHAPES, temperature=TEMPERATURES)
@settings(max_examples=25, deadline=None)
def test_kd_decouples_into_dkd_as_the_paper_says(batch, classes, seed, temperature):
    z, t, target, weight = views(batch, classes, seed)
    tckd, nckd = (term("dkd", z, t, target, temperature, weight, alpha=a, beta=1 - a) for a in (1, 0))
    rest = 1 - (t / temperature).softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(tckd + rest * nckd, term("kd", z, t, target, temperature, weight))


@pytest.mark.parametrize(
    "name, defaults", [("dkd", {"alpha": 1.0, "beta": 8.0}), ("dist", {"beta": 1.0, "gamma": 1.0})]
)
def test_defaults_are_the_papers(name, defaults):
    z, t, target, weight = views(7, 5)
    plain, spelt = (term(name, z, t, target, 4.0, weight, **options) for options in ({}, defaults))
    assert torch.equal(plain, spelt)


# Derivatives and invariances


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    z, t, target, weight = views(4, 5, seed=2)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: term(name, z, t, target, 2.0, weight), z)
    student, teacher, target, weight = pairs(4, 5, seed=3)
    valid = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(
        lambda z: loss(METHODS[name](), z, teacher, target, weight, valid=valid, **DEFAULTS), student.requires_grad_()
    )


@pytest.mark.parametrize("name", NAMES)
@given(**SHAPES, temperature=TEMPERATURES)
@settings(max_examples=15, deadline=None)
def test_a_shift_of_teacher_or_student_changes_nothing(name, batch, classes, seed, temperature):
    """Logits of some 10 shifted by some 100 keep 13 digits; a gradient row, being along the shift, sums to 0."""
    z, t, target, weight = views(batch, classes, seed)
    shift_z, shift_t = logits(2, batch, 1, seed=seed, scale=100.0)
    here = with_gradient(partial(term, name), z, t, target, temperature, weight)
    there = with_gradient(partial(term, name), z + shift_z, t + shift_t, target, temperature, weight)
    torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(here[1].sum(1), torch.zeros_like(weight), rtol=0, atol=1e-8)


def test_the_size_of_logits_is_nothing_to_the_standardised_term():
    """Invariant to a factor on either side; so its gradient is orthogonal to the student's logits too."""
    z, t, target, weight = views(5, 8)
    here = with_gradient(partial(term, "standardised"), z, t, target, 2.0, weight)
    factors = torch.tensor([0.01, 0.3, 1.0, 7.0, 90.0])[:, None]
    there = with_gradient(partial(term, "standardised"), z * factors, t * factors.flip(0), target, 2.0, weight)
    torch.testing.assert_close(here[0], there[0])
    torch.testing.assert_close(here[1], there[1] * factors)
    torch.testing.assert_close((here[1] * z).sum(1), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    _, t, target, weight = views(6, 9)
    value, gradient = with_gradient(partial(term, name), t, t, target, 4.0, weight)
    assert float((value * weight).sum()) == pytest.approx(0, abs=1e-12)
    weighted = with_gradient(lambda z: term(name, z, t, target, 4.0, weight) * weight, t)[1]
    for rows in (weighted, gradient) if name != "dist" else (weighted,):  # of DIST only the mean has a minimum there
        torch.testing.assert_close(rows, torch.zeros_like(t), rtol=0, atol=1e-12)


def test_dist_lies_between_0_and_2_for_each_relation():
    t = torch.tensor([[4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    for z, expected in ((3 * t, 0.0), (-3 * t, 2.0)):
        for options in ({"gamma": 0}, {"beta": 0}):
            value = term("dist", z, t, torch.zeros(2), 1.0, torch.ones(2), **options)
            assert value.tolist() == pytest.approx([expected] * 2, abs=1e-12)


# Extremes


def extremes() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    z, t, target, _ = views(4, 6)
    hot = F.one_hot(target, 6).double()
    absent = torch.zeros(6, dtype=torch.float64)
    absent[[2, 4]] = torch.tensor([-44.0, -80.0], dtype=torch.float64)
    return {
        "one-hot teacher": (z, 1e4 * hot, target),
        "one-hot student": (1e4 * hot, t, target),
        "both, agreed": (1e4 * hot, 1e4 * hot, target),
        "both, opposed": (1e4 * hot.roll(1, 1), 1e4 * hot, target),
        "teacher without the target": (z, -1e4 * hot, target),
        "student without the target": (-1e4 * hot, 1e4 * hot, target),
        "all +1e4": (z + 1e4, t + 1e4, target),
        "all -1e4": (z - 1e4, t - 1e4, target),
        "p_target rounds to 1": (30 * hot, 40 * hot + t, target),
        "student of equal logits": (torch.zeros_like(z) + 0.1, t, target),
        "teacher of equal logits": (z, torch.zeros_like(t) + 0.1, target),
        "equal samples": (z[:1].expand(4, 6), t[:1].expand(4, 6), target),
        "classes of probability 1e-19 and 1e-35": (z + absent, t + absent, target),
        "one sample": (z[:1], t[:1], target[:1]),
        "two classes": (z[:, :2], t[:, :2], target % 2),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", extremes())
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_have_finite_losses_and_gradients(name, case, dtype):
    """Rows of the gradient sum to 0 within the rounding of its parts: 8 (of DKD) times C = 6 of at most 1."""
    z, t, target = extremes()[case]
    for temperature in (1.0, 4.0):
        found = with_gradient(
            partial(term, name), z.to(dtype), t.to(dtype), target, temperature, torch.ones(len(z), dtype=dtype)
        )
        assert all(tensor.isfinite().all() for tensor in found)
        size = found[1].abs().sum(1).clamp(min=8 * 6)
        assert (found[1].sum(1).abs() <= torch.finfo(dtype).eps * size).all()


def test_dkd_sees_the_other_classes_of_a_teacher_that_is_certain():
    """Here 1 − p_y = 0 in any dtype; NCKD is KD on the other classes all the same."""
    t = torch.tensor([[300.0, 1.0, 2.0, 3.0]])
    z = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    expected = reference.kl_divergence(z[:, 1:], t[:, 1:], 1.0)
    found = term("dkd", z, t, torch.tensor([0]), 1.0, torch.ones(1), alpha=0.0, beta=1.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["dist", "standardised"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_an_undecided_student_is_not_thrown(name, value):
    """Without the care for equal values, rounding would set the direction and 1/σ the size, 1e6 and more.

    z-scores of a teacher's row or column have length √C or √B, and softmax at T a derivative of at most 1/2T, so that
    the mean of DIST has a gradient of at most 1/√(B·C) here; the standardised term's is at most √2/T a row.
    """
    t = logits(8, 7).float()
    t[0] = value  # a teacher without an opinion
    z, target = torch.full((8, 7), value), torch.zeros(8)
    found = with_gradient(partial(term, name), z, t, target, 1.0, torch.ones(8))[1]
    if name == "dist":
        found = with_gradient(lambda z: term(name, z, t, target, 1.0, torch.ones(8)).mean(), z)[1]
        assert 0 < found.norm() <= 1 / math.sqrt(8 * 7)
    else:
        assert 0 < found.norm(dim=1).max() <= math.sqrt(2)


@pytest.mark.parametrize("name", NAMES)
def test_float32_meets_float64(name):
    """Logits of some 10 in float32 are wrong by 1e-6, and so, by factors of a few (8 in DKD), are these."""
    z, t, target, weight = views(32, 100, seed=4)
    exact = with_gradient(
        partial(term, name), z.float().double(), t.float().double(), target, 4.0, weight.float().double()
    )
    found = with_gradient(partial(term, name), z.float(), t.float(), target, 4.0, weight.float())
    for actual, true in zip(found, exact, strict=True):
        assert (actual - true).abs().max() <= 1e-5 * true.abs().max()


# The whole loss


@given(
    **SHAPES,
    temperature=TEMPERATURES,
    alpha=st.floats(0, 1),
    kd_weight=st.floats(0.1, 5),
    smoothing=st.sampled_from([0.0, 0.1]),
    kind=st.sampled_from(["ones", "fixed", "given"]),
    masked=st.booleans(),
    count=st.sampled_from([None, 3.5]),
)
@settings(max_examples=50, deadline=None)
def test_with_kd_it_is_the_reference(
    batch, classes, seed, temperature, alpha, kd_weight, smoothing, kind, masked, count
):
    student, teacher, target, weight = pairs(batch, classes, seed)
    w = {"ones": torch.ones_like(weight), "fixed": 1.7, "given": weight}[kind]
    options = {
        "temperature": temperature,
        "alpha": alpha,
        "kd_weight": kd_weight,
        "label_smoothing": smoothing,
        "valid": torch.rand(batch, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None,
        "count": count,
    }
    found = combined("kd", student, teacher, target, w, **options)
    expected = with_gradient(lambda z: reference.ccd_loss(*z, *teacher.unbind(1), target, weight=w, **options), student)
    torch.testing.assert_close(found, expected)


def test_kd_is_the_reference_to_the_bit():
    z, t, target, weight = views(5, 9)
    assert torch.equal(term("kd", z, t, target, 3.0, weight), reference.kl_divergence(z, t, 3.0))


@pytest.mark.parametrize("name", NAMES)
@given(**SHAPES, temperature=TEMPERATURES, alpha=st.floats(0, 1), kd_weight=st.floats(0.1, 5))
@settings(max_examples=15, deadline=None)
def test_it_is_the_sum_of_its_papers(name, batch, classes, seed, temperature, alpha, kd_weight):
    student, teacher, target, weight = pairs(batch, classes, seed)
    (z_o, z_a), (t_o, t_a), y, ones = *lists(student, teacher.transpose(0, 1)), target.tolist(), np.ones(batch)
    hard = -statistics.fmean(math.log(softmax(z)[c]) for rows in (z_o, z_a) for z, c in zip(rows, y, strict=True))
    soft_o = paper_mean(name, z_o, t_o, y, temperature, ones)
    soft_a = paper_mean(name, z_a, t_a, y, temperature, weight.numpy()) * float(weight.mean())
    expected = kd_weight * (alpha * hard + (1 - alpha) * temperature**2 * (soft_o + soft_a) / 2)
    options = {"temperature": temperature, "alpha": alpha, "kd_weight": kd_weight}
    assert float(loss(METHODS[name](), student, teacher, target, weight, **options)) == pytest.approx(
        expected, rel=1e-7, abs=1e-7
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_pairs_that_are_not_valid_might_as_well_not_be_there(name, poison):
    student, teacher, target, weight = pairs(7, 5)
    keep = torch.tensor([0, 2, 3, 6])
    valid = torch.zeros(7, dtype=torch.bool).index_fill(0, keep, True)
    dead = ~valid
    student[:, dead], teacher[dead], weight[dead], target[dead] = poison, poison, poison, -100
    value, gradient = combined(name, student, teacher, target, weight, valid=valid, **DEFAULTS)
    dropped = combined(name, student[:, keep], teacher[keep], target[keep], weight[keep], **DEFAULTS)
    torch.testing.assert_close((value, gradient[:, keep]), dropped)
    assert not gradient[:, dead].any()


@pytest.mark.parametrize("name", NAMES)
def test_one_view_of_a_pair_may_count_without_the_other(name):
    """`valid` (2, B): 4 original views and 2 augmented ones are 3 pairs' worth, one of the 5 pairs being dead."""
    student, teacher, target, weight = pairs(5, 5, seed=5)
    kept = [0, 1, 2, 4], [0, 4]
    valid = torch.zeros(2, 5, dtype=torch.bool)
    hard = soft = 0.0
    for view, (keep, w) in enumerate(zip(kept, (torch.ones_like(weight), weight), strict=True)):
        valid[view, list(keep)] = True
        z, t, y = lists(student[view, keep], teacher[keep, view], target[keep])
        hard -= math.fsum(math.log(softmax(row)[c]) for row, c in zip(z, y, strict=True))
        soft += paper_mean(name, z, t, y, 4.0, w[keep].numpy()) * float(w[keep].sum())
    student[~valid], teacher[~valid.T], weight[~valid[1]], target[3] = math.nan, math.nan, math.nan, -100
    for options in ({}, {"count": 3}):
        value, gradient = combined(name, student, teacher, target, weight, valid=valid, **DEFAULTS, **options)
        assert float(value) == pytest.approx((hard + 16 * soft) / (2 * 3))
        assert gradient.isfinite().all() and torch.equal(gradient.any(2), valid)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_valid_pairs_has_no_loss_and_no_gradient(name):
    student, teacher, target, weight = pairs(3, 5)
    for bad in (teacher, torch.full_like(teacher, math.nan)):
        value, gradient = combined(name, student, bad, target, weight, valid=torch.zeros(3).bool(), **DEFAULTS)
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_of_weight_0_leaves_no_trace_in_the_augmented_term(name):
    student, teacher, target, weight = pairs(5, 6)
    weight[1] = 0
    options = DEFAULTS | {"alpha": 0.0}
    gradient = combined(name, student, teacher, target, weight, **options)[1]
    assert not gradient[1, 1].any() and gradient[0, 1].any()
    teacher[1, 1] += logits(6)
    torch.testing.assert_close(gradient, combined(name, student, teacher, target, weight, **options)[1])


@pytest.mark.parametrize("name", ["kd", "dkd", "standardised"])
def test_shares_of_a_batch_with_its_count_add_up_to_it(name):
    student, teacher, target, weight = pairs(7, 5)
    whole = loss(METHODS[name](), student, teacher, target, weight, **DEFAULTS)
    parts = [
        loss(
            METHODS[name](),
            student[:, part],
            teacher[part],
            target[part],
            weight[part],
            count=torch.tensor(7),
            **DEFAULTS,
        )
        for part in (slice(0, 3), slice(3, 7))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_student_learns(name):
    *learners, target, weight = pairs(4, 5)
    learners = [tensor.requires_grad_() for tensor in (*learners, weight)]
    value = loss(METHODS[name](), *learners[:2], target.int(), weight, **DEFAULTS)
    found = torch.autograd.grad(value, learners, allow_unused=True)
    assert [gradient is not None for gradient in found] == [True, False, False]


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_options_reach_the_term(name):
    """Its loss is linear in beta."""
    student, teacher, target, weight = pairs(4, 5)
    none, one, two = (
        float(loss(METHODS[name](beta=beta), student, teacher, target, weight, **DEFAULTS)) for beta in (0.0, 1.0, 2.0)
    )
    assert one > none and two - one == pytest.approx(one - none)


# By name


def test_each_method_is_a_choice_of_the_command_line():
    assert set(METHODS) == set(get_args(Loss)) and all(kind.name == name for name, kind in METHODS.items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dkd", ["beta=0.5", "alpha=nan"], "--loss-option alpha out of range; found nan, expected 0 to"),
        ("dkd", ["beta=x"], "--loss-option beta; found x, expected a number"),
        ("dkd", ["betta=1"], "--loss dkd has no option betta; found betta=1; fix: did you mean beta?"),
        ("dkd", ["beta=1", "beta=2"], "--loss-option beta is given twice; found beta=2"),
        ("dkd", ["0.5"], "--loss dkd has no option 0.5"),
        ("kd", ["beta=1"], "--loss kd has no option beta; found beta=1; fix: leave --loss-option out"),
    ],
)
def test_options_that_a_method_has_not_are_refused(name, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(name, options)


def test_options_of_the_command_line_reach_the_method():
    assert make("dkd", ["beta=0.5"]) == METHODS["dkd"](alpha=1.0, beta=0.5)
