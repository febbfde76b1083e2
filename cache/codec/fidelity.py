"""How well decoded labels say what the teacher said."""

import math
from dataclasses import asdict, dataclass

import numpy as np

from cache.codec.base import Code

TEMPERATURE = 4.0
"""Of the KL divergence that budgets are given in, unless another is asked for: the method's."""
TEMPERATURES = (1.0, 2.0, TEMPERATURE)
"""At which the loss of every code is measured, besides its own."""
MAX_BIAS = 0.02
"""How far the slope of decoded on true logits may be from 1."""


@dataclass(frozen=True)
class Fidelity:
    """Means over vectors."""

    kl: dict[float, float]
    """Temperature -> KL(true || decoded), nats."""
    slope: float
    """Of the regression of decoded on true centred logits: 1 if the code is unbiased."""
    agreement: float
    """Share of the vectors whose largest logit stays the largest."""
    bytes_per_vector: float
    """On disk, after `pack`."""
    pairs: int
    """How many pairs it was measured on."""

    def to_json(self) -> dict:
        """JSON-safe."""
        return asdict(self) | {"kl": {f"{temperature:g}": value for temperature, value in self.kl.items()}}


def measure(
    codec: Code,
    logits: np.ndarray,
    dither_keys: np.ndarray,
    codes: np.ndarray | None = None,
    temperature: float = TEMPERATURE,
) -> Fidelity:
    """Of `codec` on logits f32 (n, 2, C) with `dither_keys` u64 (n,); `codes`, if they are encoded already.

    KL is measured at `TEMPERATURES` and at `temperature`.
    """
    codes = codec.encode(logits, dither_keys) if codes is None else codes
    true, decoded = _centred(logits), _centred(codec.decode(codes, dither_keys))
    return Fidelity(
        kl={t: divergence(true, decoded, t) for t in sorted({*TEMPERATURES, temperature})},
        slope=_slope(true, decoded),
        agreement=float((true.argmax(-1) == decoded.argmax(-1)).mean()),
        bytes_per_vector=len(codec.pack(codes, dither_keys)) / (2 * len(codes)),
        pairs=len(codes),
    )


@dataclass(frozen=True)
class Drift:
    """Of one block's labels, on a sample of them. NaN: nothing was measured."""

    kl: float = math.nan
    """Mean KL at `temperature`, nats."""
    slope: float = math.nan
    kl_error: float = math.nan
    """Standard error of `kl`."""
    slope_error: float = math.nan
    temperature: float = TEMPERATURE

    def beyond(self, budget: float | None) -> str | None:
        """What is wrong, if the slope is off 1 by more than `MAX_BIAS` or the KL above the budget, beyond chance."""
        if abs(self.slope - 1) - 3 * self.slope_error > MAX_BIAS:
            return f"slope {self.slope:.3f}, expected 1 ± {MAX_BIAS}"
        if budget is not None and self.kl - 3 * self.kl_error > budget:
            return f"KL(T = {self.temperature:g}) {self.kl:.4g} nats, expected at most {budget:g}"
        return None


def drift(
    codec: Code, logits: np.ndarray, codes: np.ndarray, dither_keys: np.ndarray, temperature: float = TEMPERATURE
) -> Drift:
    """How far codes u8 (n, row_bytes) are from the logits f32 (n, 2, C) that they say."""
    true, decoded = _centred(logits), _centred(codec.decode(codes, dither_keys))
    kl = divergences(true, decoded, temperature).mean(axis=1)  # of pairs, whose views have noise in common
    slope = _slope(true, decoded)
    off = (true * (decoded - slope * true)).sum((1, 2))
    slope_error = float(np.linalg.norm(off) / max((true * true).sum(), np.finfo(np.float64).tiny))
    return Drift(float(kl.mean()), slope, float(kl.std() / math.sqrt(kl.size)), slope_error, temperature)


def divergence(true: np.ndarray, decoded: np.ndarray, temperature: float) -> float:
    """Mean of `divergences`."""
    return float(divergences(true, decoded, temperature).mean())


def divergences(true: np.ndarray, decoded: np.ndarray, temperature: float) -> np.ndarray:
    """KL(softmax(true / T) || softmax(decoded / T)) of logits (..., C): f64 (...), nats."""
    log_p, log_q = (_log_softmax(np.asarray(x, np.float64) / temperature) for x in (true, decoded))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def _slope(true: np.ndarray, decoded: np.ndarray) -> float:
    energy = (true * true).sum()
    return float((true * decoded).sum() / energy) if energy else 1.0


def _centred(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.mean(-1, keepdims=True)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
