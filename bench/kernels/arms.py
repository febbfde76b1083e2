"""What computes the loss and its gradient, or shows what that could cost: the arms of `bench.kernels.suite`."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.kernels.counts import pair_bytes
from cache import codec as codecs
from kernels import EncodedPairs, ccd_loss, reference
from pipeline.labels.epochs import decoder_of

OPTIONS: dict[str, Any] = {"temperature": 4.0, "alpha": 0.5, "kd_weight": 2.0}
DIRECTIONS = 512
"""Of the subspace code of made-up logits."""

Step = Callable[[], Any]


@dataclass(frozen=True)
class Arm:
    step: Step
    """Loss and gradient by students in bf16, once."""
    moved: int
    """Bytes that a step has to move through device memory, at the least."""


class Batch:
    """Made-up logits of pairs on a device, in every format that an arm takes."""

    def __init__(self, batch: int, classes: int, device: str):
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> Tensor:
            return torch.randn(2, batch, classes, generator=generator, device=device) * scale

        self.students = tuple(row.bfloat16().requires_grad_() for row in draw(2.0))
        self.logits = draw(3.0)
        self.teacher = tuple(row.bfloat16() for row in self.logits)
        self.target = torch.randint(classes, (batch,), generator=generator, device=device)
        self.weight = torch.rand(batch, generator=generator, device=device) * 2
        self.dither_keys = torch.arange(batch, device=device)

    def encoded(self) -> dict[str, EncodedPairs]:
        """By codec; a subspace code where it takes seconds to fit."""
        batch, classes = self.students[0].shape
        device = self.dither_keys.device
        pairs = self.logits.cpu().numpy().swapaxes(0, 1).copy()
        dither_keys = np.arange(batch, dtype=np.uint64)
        coded = {"int8": (codecs.make("int8", classes=classes), pairs)}
        if DIRECTIONS < classes <= 4096:
            rng = np.random.default_rng(0)
            basis = np.linalg.qr(rng.normal(size=(classes, DIRECTIONS)))[0].T
            fitted = (rng.normal(size=(1024, 2, DIRECTIONS)) @ basis * 3).astype(np.float32)
            coded["subspace"] = codecs.fit("subspace", fitted, kl=0.05), np.resize(fitted, (batch, 2, classes))
        return {
            name: EncodedPairs(
                torch.from_numpy(codec.encode(logits, dither_keys)).to(device),
                self.dither_keys,
                decoder_of(codec, device),
                self.weight,
            )
            for name, (codec, logits) in coded.items()
        }

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.students)


def arms(data: Batch, compiler: Callable[..., Any] = torch.compile) -> dict[str, Arm]:
    """By name. `compiler` stands for torch.compile, which compiles when it is first called."""
    batch, classes = data.students[0].shape

    def plain(o: Tensor, a: Tensor, t_o: Tensor, t_a: Tensor) -> Tensor:
        o, a, t_o, t_a = o.float(), a.float(), t_o.float(), t_a.float()
        return reference.ccd_loss(o, a, t_o, t_a, data.target, weight=data.weight, **OPTIONS)

    def decoded(o: Tensor, a: Tensor, codes: Tensor) -> Tensor:
        scale, offset = codes[:, :16].flatten().view(torch.float32).view(batch, 2, 2, 1).unbind(1)
        rows = codes[:, 16:].contiguous().view(torch.int8).view(batch, 2, classes) * scale + offset
        return plain(o, a, rows[:, 0], rows[:, 1])

    def arm(loss: Callable[..., Tensor], *teacher: Any, form: str = "bf16") -> Arm:
        def step():
            return data.gradients(loss(*data.students, *teacher))

        return Arm(step, batch * pair_bytes(classes, "bf16", form))

    def ours(o: Tensor, a: Tensor, *teacher: Any) -> Tensor:
        return ccd_loss(o, a, *teacher, target=data.target, weight=data.weight, **OPTIONS)

    encoded = data.encoded()
    kernels, graphs = "max-autotune-no-cudagraphs", "max-autotune"
    found = {
        "ours dense": arm(ours, *data.teacher),
        **{f"ours {name}": arm(ours, labels, form=name) for name, labels in encoded.items()},
        "eager": arm(plain, *data.teacher),
        "compile": arm(compiler(plain, mode=kernels, dynamic=False), *data.teacher),
        "compile, CUDA graphs": arm(compiler(plain, mode=graphs, dynamic=False), *data.teacher),
        "compile int8": arm(
            compiler(decoded, mode=kernels, dynamic=False), encoded["int8"].codes, form="int8"
        ),
    }  # fmt: skip
    if importlib.util.find_spec("liger_kernel"):
        found["liger"] = arm(liger_loss(data), *data.teacher)
    found["softmax"] = Arm(
        lambda: [torch.softmax(row.detach(), 1) for row in data.students], 2 * 2 * 2 * batch * classes
    )
    return found


def liger_loss(data: Batch) -> Callable[..., Tensor]:
    """log_softmax, then Liger's KL and cross-entropy: the parts that it has."""
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div  # pyright: ignore

    temperature = OPTIONS["temperature"]

    def loss(o: Tensor, a: Tensor, t_o: Tensor, t_a: Tensor) -> Tensor:
        hard = soft = o.new_zeros((), dtype=torch.float32)
        for z, t, w in ((o, t_o, 1.0), (a, t_a, data.weight)):
            p, log_q = (t.float() / temperature).softmax(1), (z.float() / temperature).log_softmax(1)
            soft = soft + (w * liger_kl_div(log_q, p, reduction="none").sum(1)).mean() / 2
            hard = hard + liger_cross_entropy(z.float(), data.target) / 2
        hard_factor, soft_factor = reference.coefficients(**OPTIONS)
        return hard_factor * hard + soft_factor * soft

    return loss
