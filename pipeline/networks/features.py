"""The pooled features of a network: what its classifier, one linear layer, is given; and a student that learns by them.

timm's networks are split by `forward_head(…, pre_logits=True)`, the CIFAR ones before their `fc`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cache import UserError


class Both(NamedTuple):
    """What a network answers from which features are learned."""

    logits: Tensor
    """(B, C)."""
    features: Tensor
    """(B, F)."""


class Chosen(nn.Module):
    """Some of a network's outputs, i64 (C,), in this order."""

    def __init__(self, module: nn.Module, outputs: np.ndarray):
        super().__init__()
        self.module = module
        self.outputs: Tensor
        self.register_buffer("outputs", torch.from_numpy(outputs), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)[:, self.outputs]


def _classifier(body: Any) -> Any:
    return body.get_classifier() if hasattr(body, "get_classifier") else getattr(body, "fc", None)


def _pooled(body: Any, images: Tensor) -> Tensor:
    if hasattr(body, "forward_head"):
        return body.forward_head(body.forward_features(images), pre_logits=True)
    classifier = _classifier(body)
    for part in body:
        images = images if part is classifier else part(images)
    return images


class Tapped(nn.Module):
    """A network that tells its features: images -> logits (B, C), of `outputs` alone if given, and features (B, F)."""

    def __init__(self, body: nn.Module, outputs: Tensor | None = None):
        super().__init__()
        self.body = body
        self.register_buffer("outputs", outputs, persistent=False)

    @property
    def classifier(self) -> nn.Linear:
        return _classifier(self.body)

    def forward(self, images: Tensor) -> Both:
        features = _pooled(self.body, images)
        logits = self.classifier(features)
        return Both(logits if self.outputs is None else logits[:, self.outputs], features)


@dataclass(frozen=True)
class Head:
    """A teacher's classifier."""

    weight: np.ndarray
    """f32 (C, F)."""
    bias: np.ndarray
    """f32 (C,); zeros if the layer has none."""


def tapped(whole: nn.Module, size: int, whose: str) -> Tapped:
    """The network with its features; its tensors are shared with it.

    `size`: pixels of an image to try it with; `whose`: what it is called in an error. Raises UserError if its
    logits are not those of one linear layer alone, or its features cannot be had.
    """
    module, outputs = whole, None
    if isinstance(module, Chosen):
        module, outputs = module.module, module.outputs
    known = hasattr(module, "forward_head") or (isinstance(module, nn.Sequential) and hasattr(module, "fc"))
    classifier = _classifier(module)
    if not known or not isinstance(classifier, nn.Linear):
        found = f"a classifier of type {type(classifier).__name__}" if known else "a callable"
        raise _no_features(whose, found)
    made, training = Tapped(module, outputs), module.training
    images = torch.linspace(-1, 1, 3 * size * size, device=classifier.weight.device).reshape(1, 3, size, size)
    try:
        with torch.inference_mode():
            said, (logits, features) = whole.eval()(images), made(images)
            same = features.shape == (1, classifier.in_features) and torch.allclose(logits, said, rtol=1e-3, atol=1e-4)
    except (RuntimeError, TypeError) as error:
        raise _no_features(whose, str(error).partition("\n")[0]) from None
    finally:
        module.train(training)
    if not same:
        raise _no_features(whose, "logits that are not those of its classifier alone")
    return made


def head(network: Tapped) -> Head:
    """Its classifier, the outputs that it answers with alone."""
    weight = network.classifier.weight.detach().float().cpu()
    bias = network.classifier.bias
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().float().cpu()
    if isinstance(outputs := network.outputs, Tensor):
        weight, bias = weight[outputs.cpu()], bias[outputs.cpu()]
    return Head(weight.numpy(), bias.numpy())


def _no_features(whose: str, found: str) -> UserError:
    return UserError(
        f"{whose} has no features to take",
        found=found,
        expected="a network of one linear classifier, cifar/NAME or most of timm's",
        fix="take another one, or leave the features out",
    )


class Learner(nn.Module):
    """A student with what a method trains beside it: while it trains, images -> `Both`, its logits and what `beside`
    makes of its features; afterwards its logits."""

    def __init__(self, body: nn.Module, beside: nn.Module):
        super().__init__()
        self.body, self.beside = body, beside

    def forward(self, images: Tensor) -> Both | Tensor:
        if not self.training:
            return self.body(images)
        features = _pooled(self.body, images)
        return Both(_classifier(self.body)(features), self.beside(features))

    @property
    def exported(self) -> nn.Module:
        """What is left once it has learned: the student."""
        return self.body


class Reusing(Learner):
    """A student whose features, projected, meet the teacher's classifier: SimKD's, projector and all.

    Its own classifier is not used, nor trained.
    """

    def __init__(self, body: nn.Module, width: int, hidden: int, head: Head):
        """`width`: features of the student; the projector has `hidden` and then as many as the head takes."""
        super().__init__(body, _projector(width, hidden, head.weight.shape[1]))
        for name, values in (("weight", head.weight), ("bias", head.bias)):
            self.register_buffer(name, torch.from_numpy(np.array(values, np.float32)))
        _classifier(body).requires_grad_(False)

    def forward(self, images: Tensor) -> Both | Tensor:
        projected = self.beside(_pooled(self.body, images))
        logits = nn.functional.linear(projected, self.weight, self.bias)  # pyright: ignore[reportArgumentType]
        return Both(logits, projected) if self.training else logits

    @property
    def exported(self) -> nn.Module:
        return self

    @classmethod
    def like(cls, body: nn.Module, state: Mapping[str, Tensor]) -> "Reusing | None":
        """A student in which weights of one fit; None if these are of no such student."""
        first, weight = state.get("beside.0.weight"), state.get("weight")
        if first is None or weight is None or first.ndim != 4 or weight.ndim != 2:
            return None
        empty = Head(np.zeros(weight.shape, np.float32), np.zeros(len(weight), np.float32))
        return cls(body, first.shape[1], first.shape[0], empty)


def _projector(width: int, hidden: int, out: int) -> nn.Sequential:
    return Pointwise(
        nn.Conv2d(width, hidden, 1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, 1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, out, 1),
    )


class Pointwise(nn.Sequential):
    """Layers of maps, on features (n, ·) as maps of one pixel: processes share the batch statistics of such layers."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features[:, :, None, None]).flatten(1)
