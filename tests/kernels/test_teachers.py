"""What a loss takes as its teacher: the stored labels of a batch as one object, or any logits without hard labels."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import kernels
from cache import codec as codecs
from kernels.loss.ccd import ccd_loss
from kernels.loss.decode import Decoder


def test_one_object_may_carry_the_stored_labels_of_a_batch():
    """Rows of a plane, w and all; pairs without a label, whose w is NaN, are left out by `valid`."""
    codec = codecs.make("int8", classes=10)
    keys = np.arange(5, dtype=np.uint64)
    plane = codec.encode(np.random.default_rng(0).normal(size=(5, 2, 10)).astype(np.float32), keys)
    rows, weight = torch.tensor([4, 0, 2]), torch.tensor([1.5, torch.nan, 0.5])
    decoder = Decoder("int8", 10)
    pairs = kernels.EncodedPairs(torch.from_numpy(plane), torch.zeros(3).long(), decoder, weight, rows)
    expected = torch.from_numpy(codec.decode(plane, keys))[rows]
    torch.testing.assert_close(pairs.logits(), expected)
    students, target = torch.randn(6, 10), torch.arange(3)
    loss = ccd_loss(*students.chunk(2), pairs, target, valid=~weight.isnan())
    there = torch.tensor([0, 2])
    dense = [row[there] for row in (*students.chunk(2), *expected.unbind(1))]
    torch.testing.assert_close(loss, ccd_loss(*dense, target[there], weight=weight[there]))
    with pytest.raises(ValueError, match="expected teacher_o, teacher_a and target, or EncodedPairs and target"):
        ccd_loss(*students.chunk(2), pairs)
    with pytest.raises(ValueError, match="decoder: expected 9 classes, got 10"):
        ccd_loss(*students[:, :9].chunk(2), pairs, target)


def test_the_lines_of_the_readme_are_pytorchs_own_loss():
    """As printed, on a student and stored labels at hand."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(from kernels import kd_loss\n.*?)```", readme, re.DOTALL)
    assert len(lines.split("\n\n")) == 2 and len(lines.split()) < 20
    keys = torch.arange(4)
    codec = codecs.make("fp16", classes=10)
    plane = codec.encode(np.random.default_rng(0).normal(size=(4, 2, 10)).astype(np.float32), keys.numpy().view("u8"))
    teacher = kernels.EncodedPairs(torch.from_numpy(plane), keys, Decoder("fp16", 10))
    student = torch.randn(4, 10, requires_grad=True)
    names = {"student_o": student, "batch": SimpleNamespace(teacher=teacher)}
    exec(lines, names)
    log_q, p = (student / 4).log_softmax(1), (teacher.logits()[:, 0] / 4).softmax(1)
    expected = 16 * nn.KLDivLoss(reduction="batchmean")(log_q, p)
    torch.testing.assert_close(names["loss"], expected)
    torch.testing.assert_close(student.grad, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("views", [(), (2,)])
def test_kd_is_pytorchs_own_loss(views):
    student, teacher = torch.randn(2, *views, 6, 30, dtype=torch.float64)
    target = torch.randint(30, (*views, 6))
    student.requires_grad_()

    def gradient(loss):
        return loss.detach(), *torch.autograd.grad(loss, student)

    own = nn.KLDivLoss(reduction="batchmean")
    log_q, p = (student / 3).log_softmax(-1).flatten(0, -2), (teacher / 3).softmax(-1).flatten(0, -2)
    expected = 9 * own(log_q, p)
    torch.testing.assert_close(gradient(kernels.kd_loss(student, teacher, 3.0)), gradient(expected))
    log_q = (student / 3).log_softmax(-1).flatten(0, -2)
    hard = nn.CrossEntropyLoss(label_smoothing=0.1)(student.flatten(0, -2), target.flatten())
    found = kernels.kd_loss(student, teacher, 3.0, target, alpha=0.3, label_smoothing=0.1)
    torch.testing.assert_close(gradient(found), gradient(0.3 * hard + 0.7 * 9 * own(log_q, p)))
    with pytest.raises(ValueError, match=r"kd_loss: expected alpha.* got weight"):
        kernels.kd_loss(student, teacher, weight=1.0)
