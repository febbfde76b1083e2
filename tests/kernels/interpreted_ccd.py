"""The loss kernels in Triton's interpreter; `test_ccd_interpreted.py` runs this file in a process of its own.

Where the interpreter differs from a GPU (Triton 3.9): float32 becomes bfloat16 by cutting bits off, where a GPU rounds
to nearest, so bfloat16 gradients are allowed two units in the last place here and one on a GPU; exp, exp2, log and
rsqrt are numpy's, exact to half a unit, where a GPU's are exact to about two (`hardware_exp2` is for that).
Barriers do nothing, so races between threads cannot be seen; programs share nothing but slots and ticket of `finish`.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from interpreted import (
    CPU,
    TOLERANCE,
    assert_close,
    call,
    exact,
    hardware_exp2,
    long_rows,
    needs_fma,
    students,
    subspace,
)
from support.losses import DEFAULTS, oracle, random_case
from support.subspace import streams
from torch.nn import functional as F
from triton.runtime import interpreter

from kernels import EncodedPairs, ccd_loss, kd_loss, reference
from kernels.loss import unpack
from pipeline.labels.epochs import decoder_of

# Sizes and formats


SIZES = {2: 5, 10: 17, 100: 2, 257: 2, 1001: 2, 8192: 1, 8193: 1, 21841: 1}  # classes: batch


@pytest.mark.parametrize("classes", [2, 10, 100, 257, 1001, *long_rows(8192, 8193, 21841)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "temperature": 2.0}, {"temperature": 7.0}], ids=str)
def test_every_size_meets_float64(classes, options):
    case = random_case(classes, SIZES[classes])
    logits, target = case["logits"], case["target"]
    found, true = (function(logits[:2], target, logits[2:], **options) for function in (call, exact))
    # In the plain form a KL is wrong by an amount, T² of which is in the loss.
    assert_close(found, true, loss=2 * TOLERANCE if options.get("temperature") == 7.0 else TOLERANCE)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 20.0])
@pytest.mark.parametrize("classes", [10, *long_rows(8201)])
def test_every_temperature_meets_float64(temperature, classes):
    case = random_case(classes, 2, scale=2.0)
    logits, target = case["logits"], case["target"]
    # At T = 20 the KL is so small that the plain form keeps five digits of it.
    options = {"temperature": temperature, "alpha": 0.3, "report": "exact" if temperature > 7 else "plain"}
    found, true = (function(logits[:2], target, logits[2:], **options) for function in (call, exact))
    # What cancels is kd_weight·(1 − alpha)·T·w/2B times a row's probabilities, which add up to one.
    assert_close(found, true, terms=0.7 * temperature)


def hard_cases(classes: int) -> dict:
    """[student_o, student_a, teacher_o, teacher_a], target, options."""
    case = random_case(classes, 3)
    logits, target = case["logits"], case["target"]
    hot = F.one_hot(target, classes).float()
    z_o, z_a, t_o, t_a = logits
    sure = {"alpha": 1.0, "report": "exact"}
    return {
        "all +1e4": ([row + 1e4 for row in logits], {}),
        "all -1e4": ([row - 1e4 for row in logits], {}),
        "sure student": ([z_o + 20 * hot, z_a + 20 * hot, t_o, t_a], sure),
        "one-hot teacher": ([z_o, z_a, 1e4 * hot, 1e4 * hot.roll(1, 1)], {}),
        "opposed views": ([z_o, z_a, t_o, -t_o], {}),
        "w = 0": ([z_o, z_a, t_o, t_a], {"weight": torch.zeros(3)}),
        "one w": ([z_o, z_a, t_o, t_a], {"weight": 1.3}),
        "near its teacher": ([t_o + 0.1 * z_o, t_a + 0.1 * z_a, t_o, t_a], {"alpha": 0.0, "report": "exact"}),
        "a teacher of zeros": ([z_o, z_a, t_o * 0, t_a], {}),
        "smooth and sure": (
            [z_o + 30 * hot, z_a, t_o, t_a],
            {"label_smoothing": 0.05, **sure},
        ),
    }


@pytest.mark.parametrize("classes", [2, 100, *long_rows(8201)])
@pytest.mark.parametrize("name", hard_cases(2))
def test_hard_cases_meet_float64(classes, name):
    needs_fma(name)
    logits, options = hard_cases(classes)[name]
    target = random_case(classes, 3)["target"]
    found, true = (function(logits[:2], target, logits[2:], **options) for function in (call, exact))
    # Exponents up to the gap of 30 are off by half a unit of log2(e)/T. Of a student near its teacher the gradient is
    # kd_weight·T·w/2B times a difference of probabilities, each good to 2^-22; where it is sure the target's is
    # kd_weight/2B times what a probability lacks to one.
    terms = 8 / 3 * ("near" in name) + 1 / 3 * ("sure" in name)
    assert_close(found, true, loss=TOLERANCE + 30 * 2**-24 * ("sure" in name), terms=terms)


@pytest.mark.parametrize("classes", [2, 100, *long_rows(8201)])
@pytest.mark.parametrize("gap", [1.0, 20.0, 60.0])
def test_a_sure_student_keeps_its_little_cross_entropy(classes, gap):
    """log(1 + (C - 1) exp(-gap)), of which float64 PyTorch keeps nothing beyond a gap of 36.

    An exponent gap·log2(e)/T is off by half a unit of that factor in float32, so by gap·2^-24 at most.
    """
    target = torch.tensor([1, 0])
    rows = [F.one_hot(target, classes) * gap] * 2
    loss, *_ = call(rows, target, rows, weight=1.0, alpha=1.0, kd_weight=1.0, report="exact")
    assert abs(loss.item() / math.log1p((classes - 1) * math.exp(-gap)) - 1) <= TOLERANCE + gap * 2**-24


@pytest.mark.parametrize("classes", [5, 100, 1001, *long_rows(8999)])
@pytest.mark.parametrize("kind", ["int8", "fp16"])
@pytest.mark.parametrize("stored", [True, False])
def test_rows_are_decoded_in_registers(classes, kind, stored):
    from cache import codec as codecs

    batch = 3
    rng = np.random.default_rng(classes)
    codec = codecs.make(kind, classes=classes)
    rows = codec.encode((rng.normal(size=(batch, 2, classes)) * 5 + 3).astype(np.float32), streams(batch))
    teacher = torch.from_numpy(codec.decode(rows, streams(batch))).double()
    target = torch.from_numpy(rng.integers(0, classes, batch))
    weight = torch.rand(batch) * 2 if stored else None
    encoded = [EncodedPairs(torch.from_numpy(rows), torch.zeros(batch, dtype=torch.int64), decoder_of(codec, CPU))]
    found = call(students(batch, classes), target, encoded, weight=weight)
    # The decoder's float32 arithmetic is that of the specification too: scale · q + offset, in one or two roundings.
    assert_close(found, exact(students(batch, classes), target, teacher.unbind(1), weight=weight), loss=1e-6)


CODES = [(40, 1, 0, 3), (40, 24, 8, 3), (40, 33, 33, 2), (300, 299, 16, 1)]
CODES += [pytest.param(1001, 513, 100, 2, marks=pytest.mark.slow)]  # as the one before it, in more tiles


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize(("classes", "dims", "wide", "batch"), CODES)
def test_subspace_rows_become_float16_logits(classes, dims, wide, batch, version):
    """Off by what float16 rounds: coefficients, directions that are exact, the mean's rest, and the result, which the
    product on a CPU may round once more."""
    (pairs,), truth = subspace(classes, dims, wide, batch, version=version)
    decoder, order = pairs.decoder, torch.arange(batch).flip(0)
    lean = decoder.lean
    for rows in (None, order):
        keys = pairs.dither_keys if rows is None else pairs.dither_keys[rows]
        found = unpack.subspace_logits(pairs.codes, rows, keys, lean, decoder.wide)[..., :classes].double() * lean.unit
        expected = truth if rows is None else truth[rows]
        size = largest(decoder) @ decoder.basis.double().abs()[:, :classes]
        bound = 2**-11 * (size + truth.abs().amax(2, keepdim=True) + 2 * expected.abs()) + 2**-24 * 64 * lean.unit
        assert ((found - expected).abs() <= 1.01 * bound.amax((0, 1))).all()


def largest(decoder) -> torch.Tensor:
    """|q − β·u| · scale f64 (d,) at most, of both segments together where both are in a view."""
    return (
        (136.0 if decoder.wide else 12.0) * decoder.unit * decoder.scale.double().reshape(-1, len(decoder.basis)).sum(0)
    )


@pytest.mark.parametrize(("classes", "dims", "wide", "batch"), CODES[1:2])
def test_the_loss_of_subspace_rows_is_that_of_their_logits(classes, dims, wide, batch):
    encoded, _ = subspace(classes, dims, wide, batch)
    decoder, order = encoded[0].decoder, torch.arange(batch).flip(0)
    logits = unpack.subspace_logits(encoded[0].codes, order, encoded[0].dither_keys[order], decoder.lean, wide)
    teacher = logits[..., :classes].double() * decoder.lean.unit
    target, weight = torch.arange(batch) % classes, torch.linspace(0.1, 2, batch)
    pairs = [replace(encoded[0], dither_keys=encoded[0].dither_keys[order], rows=order, weight=weight)]
    found = call(students(batch, classes), target, pairs)
    assert_close(found, exact(students(batch, classes), target, teacher.unbind(1), weight=weight), loss=1e-6)


@pytest.mark.parametrize("classes", [257, *long_rows(8203)])
def test_padding_between_rows_is_neither_used_nor_harmed(classes):
    """Rows a multiple of 8 apart are read to the end of their padding: NaN there must not matter."""
    case = random_case(classes, 3)
    apart = -(-classes // 8) * 8
    rows = [F.pad(row, (0, apart - classes), value=torch.nan) for row in case["logits"]]
    padded = [row[:, :classes] for row in rows]
    leaves = [row.detach().requires_grad_() for row in rows[:2]]
    students = [leaf[:, :classes] for leaf in leaves]
    loss = ccd_loss(*students, *padded[2:], case["target"], impl="triton")
    (3 * loss).backward()
    expected = exact(case["logits"][:2], case["target"], case["logits"][2:])
    assert_close((loss.detach(), *(leaf.grad[:, :classes] / 3 for leaf in leaves)), expected)
    assert not any(leaf.grad[:, classes:].any() for leaf in leaves)


@pytest.mark.parametrize("classes", [10, *long_rows(8201)])
@pytest.mark.parametrize("hard", [False, True])
def test_kd_of_rows_of_any_shape_meets_float64(classes, hard):
    student, teacher = torch.randn(2, 2, 3, classes, generator=torch.Generator().manual_seed(0)) * 3
    target = torch.randint(classes, (2, 3)) if hard else None
    losses = []
    for function, dtype in ((partial(kd_loss, impl="triton"), torch.float32), (reference.kd_loss, torch.float64)):
        z = student.to(dtype).requires_grad_()
        loss = function(z, teacher.to(dtype), 2.0, target, alpha=0.4 if hard else 0.0)
        losses.append((loss.detach(), torch.autograd.grad(loss, z)[0].flatten(0, 1)))
    assert_close(*losses)


@pytest.mark.parametrize("case", [(10, {}), (257, {"temperature": 3.0}), (257, {"report": "exact"})], ids=str)
def test_a_gpus_exponentials_do_no_harm(monkeypatch, case):
    """2^-22 of each exponential: of a KL above 2 as much, and of the gradient kd_weight·T·w/2B of it."""
    classes, options = case
    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_exp2", lambda self, arg: self.unary_op(arg, hardware_exp2))
    drawn = random_case(classes, 3)
    args = drawn["logits"][:2], drawn["target"], drawn["logits"][2:]
    found = call(*args, **options)
    assert not torch.equal(found[1], exact(*args, **options)[1].float())
    assert_close(found, exact(*args, **options), loss=1e-6, terms=8 / 3)


# 16-bit students


@pytest.mark.parametrize("classes", [10, 1001, *long_rows(8201)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_students_are_as_exact_as_pytorch_in_float32(classes, dtype):
    """Loss: PyTorch's own float32 path plus one unit of float32; gradient: units in the last place of the student's."""
    case = random_case(classes, 2)
    logits = [row.to(dtype) for row in case["logits"]]
    target = case["target"]
    expected = exact(logits[:2], target, logits[2:])
    plain = [row.float().requires_grad_() for row in logits[:2]]
    own = reference.ccd_loss(*plain, *(row.float() for row in logits[2:]), target, **DEFAULTS)
    own_grads = torch.autograd.grad(own, plain)
    scale = torch.tensor(1024.0)
    found = call(logits[:2], target, logits[2:], loss_scale=scale if dtype == torch.half else None)
    assert abs(found[0] - expected[0]) <= abs(own - expected[0]) + 2**-23 * expected[0]
    for actual, true, theirs in zip(found[1:], expected[1:], own_grads, strict=True):
        assert actual.dtype == dtype
        units = (2 if dtype == torch.bfloat16 else 1) * torch.finfo(dtype).eps
        slack = (theirs - true).abs().max() + torch.finfo(dtype).tiny / 1024
        assert ((actual.double() - true).abs() <= units * true.abs() + slack + 1e-7 * true.abs().max()).all()


def test_a_loss_scale_keeps_the_small_gradients_of_a_float16_student():
    """Nothing is lost but what float16 cannot hold even when scaled; without a scale a thousand times as much is."""
    case = random_case(1000, 2, scale=2.0)
    options = {"alpha": 1.0, "kd_weight": 0.05}  # gradients as small as those of a large batch
    logits = [row.half() for row in case["logits"]]
    scale = torch.tensor(2.0**14)
    rows = [row.requires_grad_() for row in logits[:2]]
    loss = ccd_loss(*rows, *logits[2:], case["target"], **options, loss_scale=scale, impl="triton")
    (loss * scale).backward()
    true = exact(logits[:2], case["target"], logits[2:], **options)[1]
    assert (true.half() == 0).float().mean() > 1e-3
    assert (rows[0].grad == 0).float().mean() < 1e-6
    assert rows[0].grad.dtype == torch.half
    torch.testing.assert_close(rows[0].grad.double() / 2**14, true, rtol=2e-3, atol=1e-9)
    again = [row.detach().requires_grad_() for row in logits[:2]]
    ccd_loss(*again, *logits[2:], case["target"], **options, loss_scale=scale, impl="triton").backward()
    torch.testing.assert_close(again[0].grad, true.half(), rtol=2e-3, atol=1e-7)  # unscaled by backward


# Which pairs count


@pytest.mark.parametrize("classes", [10, *long_rows(8201)])
def test_invalid_pairs_count_for_nothing_and_are_not_read(classes):
    case = random_case(classes, 6)
    valid = torch.tensor([True, False, True, True, False, True])
    logits, target = case["logits"], case["target"]
    kept = [row[valid] for row in logits]
    expected = exact(kept[:2], target[valid], kept[2:])
    poisoned = [torch.where(valid[:, None], row, torch.nan) for row in logits]
    target = torch.where(valid, target, 10**6)
    weight = reference.cosine_weight(*logits[2:])
    weight = torch.where(valid, weight, torch.nan)
    for options in ({}, {"weight": weight}, {"count": 4}, {"count": torch.tensor(4)}):
        loss, *grads = call(poisoned[:2], target, poisoned[2:], valid=valid, **options)
        assert all((grad[~valid] == 0).all() for grad in grads)
        assert_close((loss, *(grad[valid] for grad in grads)), expected, loss=1e-6)


def test_no_valid_pair_is_no_loss():
    case = random_case(10, 3)
    found = call(case["logits"][:2], case["target"], case["logits"][2:], valid=torch.zeros(3, dtype=torch.bool))
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("count", [7, 2.5, torch.tensor(7), torch.tensor(2.5)])
def test_the_mean_is_over_the_count_that_is_given(count):
    case = random_case(10, 3)
    args = case["logits"][:2], case["target"], case["logits"][2:]
    assert_close(call(*args, count=count), exact(*args, count=float(count)))


@pytest.mark.parametrize("classes", [10, 8201])
def test_parts_are_the_terms_of_each_pair(classes):
    case = random_case(classes, 4)
    logits, target = case["logits"], case["target"]
    logits[0][0], logits[1][2] = logits[2][0], logits[3][2]  # agree
    valid = torch.tensor([True, True, True, False])
    with torch.no_grad():
        _, parts = ccd_loss(*logits, target, valid=valid, parts=True, impl="triton")
    expected = reference.ccd_parts(*(row.double() for row in logits), target, temperature=4.0, valid=valid)
    for name, found, true in zip(parts._fields, parts, expected, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=1e-6, msg=name)
    assert parts.agree_o[0] == parts.agree_a[2] == 1
    assert parts.agree_o.sum() < 4


def test_oracle_and_cases_are_those_of_the_other_file():
    case = random_case(10, 3)
    found = exact(case["logits"][:2], case["target"], case["logits"][2:])
    assert found[0] == oracle(case)["loss"]
