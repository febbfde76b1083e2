"""Label formats by name, ours and others', and what ours keep beside the labels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from bench.labels import peers
from cache import codec
from cache.codec import fitting
from cache.codec.fidelity import TEMPERATURE
from cache.store import beside

REFERENCE = "exact"
BUDGETS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.1, 0.2, 0.21, 0.4, 1.0)
"""Nats."""
CORRECTED = (0.05, 0.2)
"""Budgets at which `Corrected` is tried."""
PRUNED = 0.1
"""Share of the labels that `lpqld-int4` keeps."""
_CRC_BYTES = 4  # of each chunk of w and of digests


class Coder(Protocol):
    """What an arm needs of a codec."""

    @property
    def row_bytes(self) -> int: ...
    @property
    def config(self) -> dict: ...
    def encode(self, given: np.ndarray, dither_keys: np.ndarray, /) -> np.ndarray: ...
    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray: ...
    def pack(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> bytes: ...


@dataclass(frozen=True)
class Corrected:
    """Subspace labels without the bias that noise gives their softmax, to second order in the noise.

    E[softmax((z + e) / T)]_c is softmax(z / T)_c times 1 + (s_c - 2 s_c p_c + …) / 2T², with s_c the variance of e_c
    and … the same for all classes; errors of different classes are taken for uncorrelated. So s_c (p_c - 1/2) / T is
    added to each logit, with p from the noisy logits themselves.
    """

    code: codec.Subspace
    temperature: float

    @property
    def row_bytes(self) -> int:
        return self.code.row_bytes

    @property
    def config(self) -> dict:
        return self.code.config | {"corrected": self.temperature}

    @property
    def variance(self) -> np.ndarray:
        """s f64 (C,)."""
        noise = fitting.noise(self.code) * self.code.of_both("scale").astype(np.float64) ** 2
        return noise.sum(axis=0) @ self.code.array("basis").astype(np.float64) ** 2

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        return self.code.encode(logits, dither_keys)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        logits = self.code.decode(codes, dither_keys)
        p = np.exp((logits - logits.max(axis=2, keepdims=True)) / self.temperature)
        p /= p.sum(axis=2, keepdims=True)
        return (logits + self.variance / self.temperature * (p - 0.5)).astype(np.float32)

    def pack(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> bytes:
        return self.code.pack(codes, dither_keys)


Make = Callable[[np.ndarray], Coder | None]
"""Of logits to fit to, f32 (n, 2, C): the codec, or None for labels as they are."""


def _corrected(kl: float, temperature: float, logits: np.ndarray) -> Corrected:
    code = codec.fit("subspace", logits, kl=kl, temperature=temperature)
    assert isinstance(code, codec.Subspace)
    return Corrected(code, temperature)


def arms(temperature: float = TEMPERATURE) -> dict[str, Make]:
    """By name, each as suits a student at `temperature`.

    -renorm: the kept mass scaled to 1 rather than the rest spread evenly (-uniform: the other way round); -t1: stored
    at T = 1, as most peers do, whatever the student learns at; -t4: made for T = 4. rskd-12 takes as many draws as
    SampledKD.
    """

    def of(make: Callable[..., Coder], *values, **options) -> Make:
        return lambda logits: make(logits.shape[2], *values, **options)

    found: dict[str, Make] = {
        REFERENCE: lambda logits: None,
        "fp16": of(peers.Dense),
        "int8": lambda logits: codec.make("int8", classes=logits.shape[2]),
        "int6": of(peers.PerRow, 6),
        "int4": of(peers.PerRow, 4),
        "lpqld-int4": of(peers.PerRow, 4, PRUNED),
    }
    for name, make in (
        ("tinyvit-100", partial(peers.tinyvit, k=100)),
        ("tinyvit-10", partial(peers.tinyvit, k=10)),
        ("apple-10", peers.apple),
        ("fkd-5", peers.fkd),
    ):
        at = partial(make, temperature=temperature)
        found |= {name: of(at), f"{name}-renorm": of(at, tail="zero"), f"{name}-t1": of(make, temperature=1.0)}
    curve = partial(peers.DistillKit, temperature=temperature)
    found |= {"distillkit-50": of(curve), "distillkit-50-uniform": of(curve, tail="uniform")}
    found |= {f"rskd-{draws}": of(peers.Sampled, draws, temperature=temperature) for draws in (12, 100, 400)}
    for kl in CORRECTED:
        found[f"subspace-{kl}-corrected"] = partial(_corrected, kl, temperature)
    found[f"subspace-{codec.DEFAULT_BUDGET}-t4"] = partial(codec.fit, "subspace", kl=codec.DEFAULT_BUDGET)
    return found | {f"subspace-{kl}": partial(codec.fit, "subspace", kl=kl, temperature=temperature) for kl in BUDGETS}


ARMS = arms()


def beside_bytes(name: str, logits: np.ndarray) -> float:
    """Per vector of a chunk of pairs f32 (n, 2, C): w, digest and their checksums, which a store of ours keeps.

    Other formats make their views again from what their codes hold, and keep neither.
    """
    if not (name == "int8" or name.startswith("subspace")):
        return 0.0
    squeezed = beside.squeezed(beside.rounded(weights(logits).astype(np.float32), beside.WEIGHT_STEP).tobytes())
    return (len(squeezed) + 4 * len(logits) + 2 * _CRC_BYTES) / (2 * len(logits))


def weights(logits: np.ndarray) -> np.ndarray:
    """w = 1 + cos of pairs f32 (n, 2, C): f64 (n,)."""
    o, a = logits.astype(np.float64).swapaxes(0, 1)
    return 1 + (o * a).sum(-1) / np.sqrt((o * o).sum(-1) * (a * a).sum(-1))
