"""Memory, autograd and launches of the loss kernels in Triton's interpreter; run like `interpreted_ccd.py`."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from interpreted import CPU, assert_close, call, exact, students, subspace
from support.losses import random_case
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import ccd_loss
from kernels.loss import autograd, decode, finish, long, row, unpack


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
    z_o, z_a, t_o, t_a = torch.randn(4, 2, 7, dtype=torch.float64, generator=generator)
    target = torch.tensor([0, 6])

    def loss(o, a, **options):
        return ccd_loss(o, a, t_o, t_a, target, impl="triton", **options)

    inputs = (z_o.requires_grad_(), z_a.requires_grad_())
    for options in ({}, {"temperature": 3.0, "label_smoothing": 0.2, "weight": torch.rand(2).double()}):
        assert torch.autograd.gradcheck(lambda o, a, options=options: loss(o, a, **options), inputs, fast_mode=True)


def arguments(encoded, dtype=torch.float32) -> tuple:
    rows = [row.to(dtype, copy=True).requires_grad_() for row in students(1, 16)]
    target, weight, valid = torch.arange(1), torch.ones(1), torch.tensor([True])
    if encoded:
        (pairs,), _ = subspace(16, 12, 8, 1)
        lean = pairs.decoder.lean
        teacher = [pairs.codes, pairs.dither_keys, lean.table, lean.basis]
        task = autograd.Task(teacher, "subspace", target, weight=weight, hard=0.1, soft=0.2, unit=lean.unit, wide=8)
    else:
        task = autograd.Task(students(1, 16, 1), "dense", target, valid=valid, hard=0.1, soft=0.2, parts=True)
    return rows, *task.flat()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own inputs
@pytest.mark.parametrize("encoded", [False, pytest.param(True, marks=pytest.mark.slow)])  # one registration
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
    (one,), _ = subspace(classes, 1, 0, 1)
    encoded = [replace(one, codes=one.codes.repeat(batch, 1), dither_keys=one.dither_keys.repeat(batch))]
    kernel = "row_loss" if classes <= 8192 else "long_loss"
    autograd.slots_of(CPU), encoded[0].decoder.lean
    target, weight, valid = torch.zeros(batch, dtype=torch.int64), torch.ones(batch), torch.ones(batch).bool()
    for teacher, forward in ((students(batch, classes, 1), [kernel]), (encoded, ["unpack", "aten::mm", kernel])):
        rows = [row.requires_grad_() for row in students(batch, classes)]
        with Work():
            loss = ccd_loss(*rows, *teacher, target, weight=weight, valid=valid, impl="triton")
        assert count == forward
        loss.backward()
        assert count[len(forward) :] == ["rescale"]
        count.clear()


def test_a_batch_of_more_labels_than_fit_goes_by_parts():
    """Of 16 pairs; each has its own rows, keys, weights and gradients, and parts are those of the whole."""
    batch = 18
    (pairs,), _ = subspace(20, 12, 4, batch)
    pairs = replace(pairs, rows=torch.arange(batch).flip(0), weight=torch.linspace(0.1, 2, batch))
    valid = torch.arange(batch) % 5 != 0
    found = []
    for temporaries in (1000, 1 << 20):
        rows = [row.requires_grad_() for row in students(batch, 20)]
        options = {"valid": valid, "parts": True, "temporaries": temporaries, "impl": "triton"}
        loss, parts = ccd_loss(*rows, pairs, torch.arange(batch), **options)
        found.append((loss.detach(), parts, torch.autograd.grad(loss, rows)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-7, atol=0)
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=0, atol=0)


def test_labels_are_decoded_beside_the_students_pass(monkeypatch):
    """On streams that only note what is asked of them: nothing runs beside anything on a CPU."""
    (pairs,), _ = subspace(40, 24, 8, 3)
    assert pairs.beside() is pairs
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"what {self.name} has done"

    @contextmanager
    def on(stream):
        said.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(unpack, "_side", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(stream.name))
    monkeypatch.setattr(decode, "has_streams", lambda tensor: True)
    begun = pairs.beside()
    assert begun.beside() is begun and pairs.beside(temporaries=100) is pairs
    assert said == ["side waits for main", "on side"] and kept == ["side", "side", "main"]
    args = students(3, 40), torch.arange(3)
    found = call(*args, [begun], weight=torch.ones(3))
    assert said[2:] == ["main waits for what side has done"]
    torch.testing.assert_close(found, call(*args, [pairs], weight=torch.ones(3)), rtol=0, atol=0)


@pytest.mark.parametrize("classes", [41, 8201])
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


def test_a_label_that_is_no_class_makes_the_gradient_nan():
    """So that a step whose loss nobody asked for does not pass silently; pairs that do not count may have any label."""
    case = random_case(10, 3)
    target, valid = torch.tensor([1, 10, -1]), torch.tensor([True, True, False])
    _, grad, _ = call(case["logits"][:2], target, case["logits"][2:], valid=valid, report="none")
    assert grad.isnan().all(1).tolist() == [False, True, False]
