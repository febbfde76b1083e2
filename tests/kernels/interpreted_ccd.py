"""The loss kernels in Triton's interpreter; `test_ccd_interpreted.py` runs this file in a process of its own.

Where the interpreter differs from a GPU (Triton 3.9): float32 becomes bfloat16 by cutting bits off, where a GPU rounds
to nearest, so bfloat16 gradients are allowed two units in the last place here and one on a GPU; exp, exp2, log and
rsqrt are numpy's, exact to half a unit, where a GPU's are exact to about two (`noise` in `interpreted.py` is for that).
Barriers do nothing, so races between threads cannot be seen; programs share nothing but slots and ticket of `finish`.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from interpreted import CPU, TOLERANCE, assert_close, call, exact, students, subspace
from support.losses import DEFAULTS, oracle, random_case
from support.subspace import streams
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import EncodedPairs, ccd_loss, kd_loss, reference
from kernels.loss import autograd, finish, long, row, unpack
from pipeline.labels.epochs import decoder_of

# Sizes and formats


SIZES = {2: 5, 10: 40, 100: 5, 257: 3, 1001: 2, 8192: 1, 8193: 1, 21841: 1}  # classes: batch


def slow(*classes: int) -> list:
    """Sizes of which a program takes seconds here."""
    return [pytest.param(count, marks=pytest.mark.slow) for count in classes]


@pytest.mark.parametrize("classes", [2, 10, 100, 257, 1001, 8193, *slow(8192, 21841)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "temperature": 2.0}, {"temperature": 7.0}], ids=str)
def test_every_size_meets_float64(classes, options):
    case = random_case(classes, SIZES[classes])
    logits, target = case["logits"], case["target"]
    assert_close(call(logits[:2], target, logits[2:], **options), exact(logits[:2], target, logits[2:], **options))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 20.0])
@pytest.mark.parametrize("classes", [10, *slow(8201)])
def test_every_temperature_meets_float64(temperature, classes):
    case = random_case(classes, 2, scale=2.0)
    logits, target = case["logits"], case["target"]
    # At T = 20 the KL is so small that the plain form keeps five digits of it.
    options = {"temperature": temperature, "alpha": 0.3, "report": "exact" if temperature > 7 else "plain"}
    assert_close(call(logits[:2], target, logits[2:], **options), exact(logits[:2], target, logits[2:], **options))


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


@pytest.mark.parametrize("classes", [2, 100, *slow(8201)])
@pytest.mark.parametrize("name", hard_cases(2))
def test_hard_cases_meet_float64(classes, name):
    logits, options = hard_cases(classes)[name]
    target = random_case(classes, 3)["target"]
    found, true = (function(logits[:2], target, logits[2:], **options) for function in (call, exact))
    # Exponents up to the gap of 30 are off by half a unit of log2(e)/T. Of a student near its teacher the gradient is
    # kd_weight·T·w/2B times a difference of probabilities, each good to 2^-22.
    assert_close(found, true, loss=TOLERANCE + 30 * 2**-24 * ("sure" in name), terms=8 / 3 * ("near" in name))


@pytest.mark.parametrize("classes", [2, 100, *slow(8201)])
@pytest.mark.parametrize("gap", [1.0, 20.0, 60.0])
def test_a_sure_student_keeps_its_little_cross_entropy(classes, gap):
    """log(1 + (C - 1) exp(-gap)), of which float64 PyTorch keeps nothing beyond a gap of 36.

    An exponent gap·log2(e)/T is off by half a unit of that factor in float32, so by gap·2^-24 at most.
    """
    target = torch.tensor([1, 0])
    rows = [F.one_hot(target, classes) * gap] * 2
    loss, *_ = call(rows, target, rows, weight=1.0, alpha=1.0, kd_weight=1.0, report="exact")
    assert abs(loss.item() / math.log1p((classes - 1) * math.exp(-gap)) - 1) <= TOLERANCE + gap * 2**-24


@pytest.mark.parametrize("classes", [5, 100, 1001, *slow(8999)])
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


CODES = [(40, 1, 0, 3), (40, 24, 8, 9), (40, 33, 33, 2), (300, 299, 16, 3), (1001, 513, 100, 2)]


@pytest.mark.parametrize(("classes", "dims", "wide", "batch"), CODES)
def test_subspace_rows_become_float16_logits(classes, dims, wide, batch):
    """Off by what float16 rounds: coefficients, directions that are exact, the mean's rest, and the result, which the
    product on a CPU may round once more."""
    (pairs,), truth = subspace(classes, dims, wide, batch)
    decoder, order = pairs.decoder, torch.arange(batch).flip(0)
    lean = decoder.lean
    for rows in (None, order):
        keys = pairs.dither_keys if rows is None else pairs.dither_keys[rows]
        found = unpack.subspace_logits(pairs.codes, rows, keys, lean, decoder.wide)[..., :classes].double() * lean.unit
        expected = truth if rows is None else truth[rows]
        steps = reference_steps(pairs)
        size = steps @ (decoder.basis.double() * decoder.scale.double()[:, None] * decoder.unit).abs()[:, :classes]
        bound = 2**-11 * (size + truth.abs().amax(2, keepdim=True) + 2 * expected.abs()) + 2**-24 * 64 * lean.unit
        assert ((found - expected).abs() <= 1.01 * bound.amax((0, 1))).all()


def reference_steps(pairs) -> torch.Tensor:
    """|q − β·u| f64 (B, 2, d) at most."""
    return torch.full((len(pairs.codes), 2, len(pairs.decoder.scale)), 136.0 if pairs.decoder.wide else 12.0).double()


@pytest.mark.parametrize(("classes", "dims", "wide", "batch"), CODES[1:4:2])
def test_the_loss_of_subspace_rows_is_that_of_their_logits(classes, dims, wide, batch):
    encoded, _ = subspace(classes, dims, wide, batch)
    decoder, order = encoded[0].decoder, torch.arange(batch).flip(0)
    logits = unpack.subspace_logits(encoded[0].codes, order, encoded[0].dither_keys[order], decoder.lean, wide)
    teacher = logits[..., :classes].double() * decoder.lean.unit
    target, weight = torch.arange(batch) % classes, torch.linspace(0.1, 2, batch)
    pairs = [replace(encoded[0], dither_keys=encoded[0].dither_keys[order], rows=order, weight=weight)]
    found = call(students(batch, classes), target, pairs)
    assert_close(found, exact(students(batch, classes), target, teacher.unbind(1), weight=weight), loss=1e-6)


@pytest.mark.parametrize("classes", [257, 8203])
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


@pytest.mark.parametrize("classes", [10, *slow(8201)])
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


# 16-bit students


@pytest.mark.parametrize("classes", [10, 1001, *slow(8201)])
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
    case = random_case(1000, 8, scale=2.0)
    logits = [row.half() for row in case["logits"]]
    scale = torch.tensor(2.0**14)
    rows = [row.requires_grad_() for row in logits[:2]]
    loss = ccd_loss(*rows, *logits[2:], case["target"], alpha=1.0, loss_scale=scale, impl="triton")
    (loss * scale).backward()
    true = exact(logits[:2], case["target"], logits[2:], alpha=1.0)[1]
    assert (true.half() == 0).float().mean() > 1e-3
    assert (rows[0].grad == 0).float().mean() < 1e-6
    assert rows[0].grad.dtype == torch.half
    torch.testing.assert_close(rows[0].grad.double() / 2**14, true, rtol=2e-3, atol=1e-9)
    again = [row.detach().requires_grad_() for row in logits[:2]]
    ccd_loss(*again, *logits[2:], case["target"], alpha=1.0, loss_scale=scale, impl="triton").backward()
    torch.testing.assert_close(again[0].grad, true.half(), rtol=2e-3, atol=1e-7)  # unscaled by backward


# Which pairs count


@pytest.mark.parametrize("classes", [10, *slow(8201)])
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


# Memory and autograd


def test_an_inplace_gradient_takes_the_logits_place():
    case = random_case(10, 3)
    base = torch.stack(case["logits"][:2]).requires_grad_()
    logits = base * 1.0
    kept = logits.detach().clone()
    loss = ccd_loss(logits[0], logits[1], *case["logits"][2:], case["target"], inplace=True, impl="triton")
    expected = exact(list(kept), case["target"], case["logits"][2:])
    torch.testing.assert_close(logits.detach().double(), torch.stack(expected[1:]), rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(3 * loss, base, retain_graph=True)
    torch.testing.assert_close(grad.double(), 3 * torch.stack(expected[1:]), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="expected one backward, got a second"):
        loss.backward()


def test_an_inplace_gradient_is_no_accident():
    teacher, target = torch.zeros(2, 3, 10), torch.zeros(3).long()
    leaf = torch.zeros(3, 10, requires_grad=True)
    other, half = leaf * 1, (leaf * 1).half()

    def refused(z_o, z_a, match, **options):
        with pytest.raises(ValueError, match=match):
            ccd_loss(z_o, z_a, *teacher, target, inplace=True, **{"impl": "triton"} | options)

    refused(leaf, other, "inplace: expected student_o to be computed")
    refused(other, (leaf.T * 1).T.expand(3, 10)[:, ::1].T.contiguous().T, "inplace: expected student_a contiguous")
    refused(other, half, "inplace: expected a loss_scale with the float16 student_a")
    refused(other, other, "inplace: expected students apart")
    refused(other, leaf * 1, "inplace: expected the kernel", impl="torch")
    logits = leaf * 1
    softmax = logits.square()  # needs its input for a backward of its own
    loss = ccd_loss(logits, leaf * 1, *teacher, target, inplace=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + softmax.sum()).backward()


def test_gradcheck_passes_in_float64():
    generator = torch.Generator().manual_seed(0)
    z_o, z_a, t_o, t_a = torch.randn(4, 3, 7, dtype=torch.float64, generator=generator)
    target = torch.tensor([0, 3, 6])

    def loss(o, a, **options):
        return ccd_loss(o, a, t_o, t_a, target, impl="triton", **options)

    inputs = (z_o.requires_grad_(), z_a.requires_grad_())
    for options in ({}, {"temperature": 3.0}, {"label_smoothing": 0.2, "weight": torch.rand(3).double()}):
        assert torch.autograd.gradcheck(lambda o, a, options=options: loss(o, a, **options), inputs, fast_mode=True)


def arguments(encoded, dtype=torch.float32) -> tuple:
    rows = [row.to(dtype, copy=True).requires_grad_() for row in students(3, 40)]
    target, weight, valid = torch.arange(3), torch.ones(3), torch.tensor([True, False, True])
    if encoded:
        (pairs,), _ = subspace(40, 24, 8, 3)
        lean = pairs.decoder.lean
        teacher = [pairs.codes, pairs.dither_keys, lean.table, lean.basis]
        task = autograd.Task(teacher, "subspace", target, weight=weight, hard=0.1, soft=0.2, unit=lean.unit, wide=8)
    else:
        task = autograd.Task(students(3, 40, 1), "dense", target, valid=valid, hard=0.1, soft=0.2, parts=True)
    return rows, *task.flat()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own inputs
@pytest.mark.parametrize("encoded", [False, True])
def test_opcheck_passes(encoded):
    torch.library.opcheck(autograd.distillation_loss, (*arguments(encoded), True))
    with torch.no_grad():
        torch.library.opcheck(
            autograd.distillation_loss,
            (*arguments(encoded, torch.bfloat16), False),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("kind", ["dense", "subspace"])
def test_the_loss_compiles_to_one_graph(kind):
    torch.manual_seed(0)
    teacher = subspace(40, 24, 8, 3)[0] if kind == "subspace" else students(3, 40, 1)
    options = {"weight": torch.rand(3), "impl": "triton", "label_smoothing": 0.1}
    head = torch.nn.Linear(6, 40)
    x = torch.randn(2, 3, 6)

    def loss(x):
        logits = head(x)
        value, parts = ccd_loss(logits[0], logits[1], *teacher, torch.arange(3), parts=True, **options)
        return value * 3, parts.kl_o

    value, kl = loss(x)
    value.backward()
    expected = head.weight.grad.clone()
    head.weight.grad = None
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again, kl_again = compiled(x)
    again.backward()
    torch.testing.assert_close((again, kl_again, head.weight.grad), (value, kl, expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("classes", "batch"), [(40, 3), (8200, 2), (100, 8192)])
def test_launches_are_few(monkeypatch, classes, batch):
    """One forward and one backward, for any batch; subspace rows take one and a product more. Counted, not run."""
    count = []

    class Work(TorchDispatchMode):
        """What PyTorch launches by itself: anything but views and empty tensors."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not (func.is_view or "empty" in func.name() or "detach" in func.name()):
                count.append(func.name())
            return func(*args, **kwargs or {})

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: count.append(self.name)

    names = {row: ["row_loss"], long: ["long_loss"], finish: ["total_of", "rescale"], unpack: ["unpack"]}
    for module in names:
        for name in names[module]:
            monkeypatch.setattr(module, name, Counted(name))
    encoded, _ = subspace(classes, 1, 0, batch)
    kernel = "row_loss" if classes <= 8192 else "long_loss"
    autograd.slots_of(CPU), encoded[0].decoder.lean
    target, weight = torch.zeros(batch, dtype=torch.int64), torch.ones(batch)
    for teacher, forward in ((students(batch, classes, 1), [kernel]), (encoded, ["unpack", "aten::mm", kernel])):
        rows = [row.requires_grad_() for row in students(batch, classes)]
        with Work():
            loss = ccd_loss(*rows, *teacher, target, weight=weight, impl="triton")
        assert count == forward
        loss.backward()
        assert count[len(forward) :] == ["rescale"]
        count.clear()


@pytest.mark.parametrize("classes", [40, 8201])
def test_gradients_of_rows_that_lie_apart_differently_are_scaled_alike(classes):
    """Each has its own distance; one for both wrote beyond the other's rows."""
    case = random_case(classes, 3)
    wide = F.pad(case["logits"][0], (0, 7)).requires_grad_()
    z_a = case["logits"][1].clone().requires_grad_()
    loss = ccd_loss(wide[:, :classes], z_a, *case["logits"][2:], case["target"], impl="triton")
    grads = torch.autograd.grad(3 * loss, (wide, z_a))
    expected = exact(case["logits"][:2], case["target"], case["logits"][2:])
    assert_close((loss.detach(), grads[0][:, :classes] / 3, grads[1] / 3), expected)
    assert not grads[0][:, classes:].any()


def test_a_step_that_is_not_logged_has_the_same_gradient():
    case = random_case(100, 3)
    args = case["logits"][:2], case["target"], case["logits"][2:]
    none, plain, exactly = (call(*args, report=report) for report in ("none", "plain", "exact"))
    assert none[0].isnan()
    for found in (none, exactly):
        torch.testing.assert_close(found[1:], plain[1:], rtol=0, atol=0)


def test_oracle_and_cases_are_those_of_the_other_file():
    case = random_case(10, 3)
    found = exact(case["logits"][:2], case["target"], case["logits"][2:])
    assert found[0] == oracle(case)["loss"]
