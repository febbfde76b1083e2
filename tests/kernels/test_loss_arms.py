"""The arms of `pipeline bench kernels` say the same; on a CPU, with stand-ins for what runs on a GPU only."""

import importlib.util
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from bench.kernels import arms as made


@pytest.fixture
def liger(monkeypatch):
    """PyTorch's own losses under Liger's names."""
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[2]].liger_cross_entropy = F.cross_entropy
    modules[names[2]].liger_kl_div = F.kl_div
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_arms_have_one_gradient(liger):
    asked = []

    def compiler(function, **options):
        asked.append(options["mode"])
        return function

    data = made.Batch(6, 20, "cpu")
    found = made.arms(data, compiler)
    assert list(found) == [
        *("ours dense", "ours int8", "eager", "compile", "compile, CUDA graphs", "compile int8", "liger", "softmax"),
    ]
    assert asked == ["max-autotune-no-cudagraphs", "max-autotune", "max-autotune-no-cudagraphs"]
    grads = {name: torch.stack(arm.step()).float() for name, arm in found.items()}
    little = 2**-8 * float(grads["eager"].abs().max())  # a leaf of bf16 that two terms add their gradients to
    for name in ("ours dense", "compile", "compile, CUDA graphs", "liger"):
        torch.testing.assert_close(grads[name], grads["eager"], rtol=2**-7, atol=little)
    torch.testing.assert_close(grads["ours int8"], grads["compile int8"], rtol=2**-7, atol=little)
    torch.testing.assert_close(grads["softmax"].sum(2), torch.ones(2, 6), rtol=2**-6, atol=0)
    assert found["eager"].moved == 6 * 20 * 2 * (2 + 2 + 2)  # a pair of views: student, teacher, gradient in bf16
    assert found["softmax"].moved == 6 * 20 * 2 * (2 + 2)


def test_without_liger_its_arm_is_left_out():
    if not importlib.util.find_spec("liger_kernel"):
        assert "liger" not in made.arms(made.Batch(2, 10, "cpu"), lambda function, **_: function)
