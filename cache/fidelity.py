"""How well decoded labels say what the teacher said."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cache.codec import Codec

TEMPERATURES = (1.0, 2.0, 4.0)


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


def measure(codec: "Codec", logits: np.ndarray, stream: np.ndarray, rows: np.ndarray | None = None) -> Fidelity:
    """Of `codec` on logits f32 (n, 2, C) with dither keys u64 (n,); `rows`, if they are encoded already."""
    rows = codec.encode(logits, stream) if rows is None else rows
    true, decoded = _centred(logits), _centred(codec.decode(rows, stream))
    return Fidelity(
        kl={temperature: divergence(true, decoded, temperature) for temperature in TEMPERATURES},
        slope=float((true * decoded).sum() / max((true * true).sum(), np.finfo(np.float64).tiny)),
        agreement=float((true.argmax(-1) == decoded.argmax(-1)).mean()),
        bytes_per_vector=len(codec.pack(rows, stream)) / (2 * len(rows)),
        pairs=len(rows),
    )


def divergence(true: np.ndarray, decoded: np.ndarray, temperature: float) -> float:
    """Mean KL(softmax(true / T) || softmax(decoded / T)) of logits (..., C), nats, in float64."""
    log_p, log_q = (_log_softmax(np.asarray(x, np.float64) / temperature) for x in (true, decoded))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def _centred(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.mean(-1, keepdims=True)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
