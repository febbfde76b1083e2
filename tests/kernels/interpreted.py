"""Calls of the loss kernels in Triton's interpreter, and what they are held against."""

import numpy as np
import pytest
import torch
from support.losses import DEFAULTS
from support.subspace import coded, reference_decode, streams
from triton.runtime import interpreter

from kernels import EncodedPairs, ccd_loss, reference
from pipeline.labels.epochs import decoder_of

CPU = torch.device("cpu")
TOLERANCE = 5e-7


def students(batch: int, classes: int, seed: int = 0, scale: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, batch, classes, generator=generator) * scale)


def long_rows(*classes: int) -> list:
    """Sizes of which a program takes seconds here."""
    return [pytest.param(count, marks=pytest.mark.slow) for count in classes]


def needs_fma(name: str) -> None:
    """Skip a case of logits that all lie far from zero where the interpreter rounds a multiply-add twice, as Triton
    3.6's does: a GPU rounds it once."""
    if name.startswith("all") and not hasattr(interpreter._interpreter, "fma_fp32"):
        pytest.skip("this Triton's interpreter rounds a multiply-add twice")


def call(logits, target, teacher, **options):
    """Loss and gradients: `teacher` are two tensors, or one `EncodedPairs`."""
    rows = [row.detach().requires_grad_() for row in logits]
    loss = ccd_loss(*rows, *teacher, target, impl="triton", **options)
    return loss.detach(), *torch.autograd.grad(loss, rows)


def exact(logits, target, teacher, **options):
    """float64 autograd of the specification."""
    rows = [row.detach().double().requires_grad_() for row in logits]
    weight = options.get("weight")
    if isinstance(weight, torch.Tensor):
        options["weight"] = weight.double()
    options.pop("report", None)
    loss = reference.ccd_loss(*rows, *(row.double() for row in teacher), target, **DEFAULTS | options)
    return loss.detach(), *torch.autograd.grad(loss, rows)


def assert_close(found, expected, loss=TOLERANCE, terms=0.0):
    """`terms`: the size of what cancels in a gradient."""
    assert abs(found[0].double() - expected[0]) <= loss * abs(expected[0])
    for actual, true in zip(found[1:], expected[1:], strict=True):
        assert (actual.double() - true).abs().max() <= 1e-7 + 1e-6 * true.abs().max() + 2**-22 * terms
        assert (actual.double().sum(1).abs() <= 1e-6 * true.abs().sum(1).clamp(min=1) + 2**-22 * terms).all()


def subspace(classes: int, dims: int, wide: int, batch: int, seed: int = 0, version: int = 3):
    """[EncodedPairs], and the float64 logits that they mean."""
    scale = np.geomspace([1, 0.4], [0.05, 0.02], dims).T / 127
    codec = coded(classes, dims, wide, seed, version=version, scale=scale)
    rng = np.random.default_rng(seed)
    stream = streams(batch, seed)
    rows = codec.encode((rng.normal(size=(batch, 2, classes)) * 4).astype(np.float32), stream)
    truth, _ = reference_decode(codec, rows, stream)
    keys = torch.from_numpy(stream.view(np.int64))
    return [EncodedPairs(torch.from_numpy(rows), keys, decoder_of(codec, CPU))], torch.from_numpy(truth)


def hardware_exp2(x: np.ndarray) -> np.ndarray:
    """As a GPU's: off by up to 2^-22, either way, exact for whole numbers, and 0 below the smallest normal number."""
    exact_ = np.exp2(x)
    side = np.where(np.frexp(x * np.float32(977.0))[0] * 64 % 1 < 0.5, -1, 1)  # as good as random
    found = np.where(x == np.rint(x), exact_, exact_ * (1 + side * 2.0**-22)).astype(x.dtype)
    return np.where(found < 2.0**-126, 0, found).astype(x.dtype)
