"""What may stand for KL, in Triton's interpreter, against float64; run like `interpreted_ccd.py`."""

import pytest
import torch
from interpreted import assert_close, exact, hardware_exp2, long_rows, needs_fma, students
from support.losses import random_case
from torch.nn import functional as F
from triton.runtime import interpreter

from kernels import ccd_loss, kd_loss, reference
from kernels.loss.terms import METHODS

OTHERS = METHODS[1:]


def pair(function, student, teacher, *arguments, dtype, **options):
    """Loss and gradient by the student."""
    z = student.to(dtype, copy=True).requires_grad_()
    loss = function(z, teacher.to(dtype), *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, z)[0].flatten(0, -2)


def compared(student, teacher, temperature=2.0, target=None, terms=0.0, loss=1e-6, **options):
    """Kernel and specification. `terms`: what cancels in the gradient, beside T·B rows of one."""
    options = {"alpha": 0.4 if target is not None else 0.0} | options
    found = pair(kd_loss, student, teacher, temperature, target, dtype=torch.float32, impl="triton", **options)
    options.pop("report", None)
    true = pair(reference.kd_loss, student, teacher, temperature, target, dtype=torch.float64, **options)
    assert_close(found, true, loss=loss, terms=terms)


@pytest.mark.parametrize("classes", [2, 10, 257, *long_rows(8201)])
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("report", ["plain", "exact"])
def test_a_method_meets_float64(method, classes, report):
    student, teacher = students(2, classes)
    target = torch.arange(2) * (classes - 1)
    # z-scores of two logits are ±1: the gradient cancels whole, and in the plain form a KL of 0 is good to 5e-7.
    bounds = {"terms": 2.0} if classes == 2 else {}
    if classes == 2 and method == "standardised" and report == "plain":
        bounds["loss"] = 4e-6  # of 0.14
    compared(student, teacher, 2.0, target, method=method, report=report, label_smoothing=0.1, **bounds)
    if method != "dkd" and classes == 10:
        compared(student, teacher, 3.0, method=method, report=report)


@pytest.mark.parametrize("classes", [100, *long_rows(8999)])
@pytest.mark.parametrize("method", OTHERS)
def test_a_method_of_a_pair_has_weight_parts_and_gaps(method, classes):
    """w, one pair without a label, parts; a float16 student with a scale of its loss."""
    case = random_case(classes, 3)
    logits, valid = case["logits"], torch.tensor([True, False, True])
    logits[1][2] = logits[3][2]  # agree
    weight = torch.tensor([0.3, torch.nan, 1.7])
    z_o, z_a = (torch.where(valid[:, None], row, torch.nan).half().requires_grad_() for row in logits[:2])
    scale = torch.tensor(256.0)
    options = {"method": method, "dkd": (2.0, 3.0), "temperature": 3.0, "valid": valid}
    loss, parts = ccd_loss(
        z_o, z_a, *logits[2:], case["target"], weight=weight, loss_scale=scale, parts=True, impl="triton", **options
    )
    grads = torch.autograd.grad(scale * loss, (z_o, z_a))
    halves = [row.detach().nan_to_num() for row in (z_o, z_a)]
    true = exact(halves, case["target"], logits[2:], weight=weight.nan_to_num(), **options)
    torch.testing.assert_close(loss.double(), true[0], rtol=1e-6, atol=0)
    for grad, expected in zip(grads, true[1:], strict=True):
        torch.testing.assert_close(grad.double(), 256 * expected, rtol=2**-10, atol=1e-5)
        assert not grad[1].any()
    rows = [row.double() for row in (*halves, *logits[2:])]
    expected = reference.ccd_parts(*rows, case["target"], weight=weight.double(), **options)
    for name, found, each in zip(parts._fields, parts, expected, strict=True):
        torch.testing.assert_close(found.double(), each, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("classes", [10, *long_rows(8201)])
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("name", ["all +1e4", "sure", "both sure", "one-hot", "near", "flat"])
def test_hard_rows_of_a_method_meet_float64(method, classes, name):
    needs_fma(name)
    student, teacher = students(2, classes)
    target = torch.arange(2)
    hot = F.one_hot(target, classes).float()
    rows = {
        "all +1e4": (student + 1e4, teacher + 1e4),
        "sure": (student + 40 * hot, teacher),
        "both sure": (student + 40 * hot, teacher + 30 * hot),
        "one-hot": (student, (30 if method == "reverse" else 300) * hot),
        "near": (teacher + 0.05 * student, teacher),
        "flat": (student, torch.full_like(teacher, 3.0)),
    }
    student, teacher = rows[name]
    # T·p of each row cancels in the gradient, of dkd eight times it.
    compared(student, teacher, 2.0, target, method=method, report="exact", alpha=0.1, terms=8.0)


@pytest.mark.parametrize("method", [name for name in OTHERS if name != "standardised"])  # which then have no mean
def test_a_teacher_that_rules_a_class_out(method):
    """A logit of −inf. The reverse divergence from it is infinite, which is NaN here."""
    student, teacher = students(2, 10)
    teacher[:, 3] = -torch.inf
    if method == "reverse":
        assert kd_loss(student, teacher, 2.0, method=method, impl="triton").isnan()
    else:
        compared(student, teacher, 2.0, torch.tensor([0, 5]), method=method)


@pytest.mark.parametrize("method", OTHERS)
def test_a_gpus_exponentials_do_a_method_no_harm(monkeypatch, method):
    """2^-22 of each exponential: of dkd eight times."""
    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_exp2", lambda self, arg: self.unary_op(arg, hardware_exp2))
    student, teacher = students(2, 100)
    compared(student, teacher, 2.0, torch.arange(2), method=method, terms=8.0, loss=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_not_logged_has_the_same_gradient(method):
    student, teacher = students(2, 40)
    options = {"method": method, "impl": "triton"}
    none, plain = (
        pair(kd_loss, student, teacher, 2.0, torch.arange(2), dtype=torch.float32, report=report, **options)
        for report in ("none", "plain")
    )
    assert none[0].isnan() and torch.equal(none[1], plain[1])
