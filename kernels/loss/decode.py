"""Decoding stored labels in plain PyTorch, on any device: the specification of the kernels that decode in registers.

A `Decoder` is what a codec knows, as tensors; kernels know neither stores nor codecs. `cache.codec`,
`cache.codec.subspace` and `cache.codec.entropy` describe the codes, `cache.codec.base` the order of axes.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kernels.loss.unpack import Lean

_LOW = 0xFFFFFFFF


def has_streams(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


@dataclass(frozen=True, eq=False)
class Decoder:
    kind: str
    """fp16, int8, subspace, or features: a subspace code of features, decoded here alone, with the head."""
    classes: int
    wide: int = 0
    """subspace: coefficients of a whole byte."""
    beta: torch.Tensor | None = None
    """subspace: f32 like `scale`, share of the dither that is subtracted."""
    basis: torch.Tensor | None = None
    """subspace: i8 (d, P), directions, with C padded by zeros to a multiple of 16 so that rows are aligned."""
    scale: torch.Tensor | None = None
    """subspace: f32, a step along a direction is basis · scale · unit: (d,); or (2, d), of segments that are not the
    views but half their sum and half their difference."""
    unit: float = 1.0
    """subspace: a power of two that lets every coefficient be a float16."""
    mean: torch.Tensor | None = None
    """subspace: f32 (C,)."""
    head: tuple[torch.Tensor, torch.Tensor] | None = None
    """features: weight f32 (C, F) and bias f32 (C,); F then stands for C above."""

    @cached_property
    def lean(self) -> "Lean":
        """What the kernels take of a subspace code."""
        from kernels.loss import unpack  # Triton, which decoding here does without

        assert self.basis is not None and self.scale is not None and self.beta is not None and self.mean is not None
        return unpack.lean(self.basis, self.scale, self.beta, self.mean, self.unit)


@dataclass(frozen=True, eq=False)
class EncodedPairs:
    """Stored labels of a batch of pairs, both views together: what `kernels.ccd_loss` takes as its teacher."""

    codes: torch.Tensor
    """u8 (B, row_bytes), or a whole plane (N, row_bytes) that `rows` chooses from; on the student's device."""
    dither_keys: torch.Tensor
    """i64 (B,), the bits of a u64."""
    decoder: Decoder
    weight: torch.Tensor | None = None
    """w f32 (B,), as stored: NaN where there is no label."""
    rows: torch.Tensor | None = None
    """i64 (B,): pair i's label is codes[rows[i]]; None: codes[i]."""
    made: torch.Tensor | None = None
    """f16 (B, 2, P), logits over `decoder.lean.unit`, where `beside` has begun to make them."""
    ready: Any = None
    """The event after which `made` may be read."""

    def gathered(self) -> torch.Tensor:
        """The batch's codes u8 (B, row_bytes)."""
        return (self.codes if self.rows is None else self.codes[self.rows]).contiguous()

    def beside(self, temporaries: int = 64 << 20) -> "EncodedPairs":
        """The same labels, decoded on a CUDA stream of their own: call it before the student's forward pass.

        As they are where nothing is to be gained: on a CPU, of int8 and fp16, which the loss decodes in registers, and
        of what would take more than `temporaries` bytes, which the loss decodes by parts.
        """
        if self.decoder.kind != "subspace" or not has_streams(self.codes) or self.made is not None:
            return self
        from kernels.loss import unpack  # Triton, which decoding here does without

        if len(self.dither_keys) * unpack.bytes_of_pair(self.decoder.lean) > temporaries:
            return self
        made, ready = unpack.beside(self.codes, self.rows, self.dither_keys, self.decoder.lean, self.decoder.wide)
        return replace(self, made=made, ready=ready)

    def logits(self) -> torch.Tensor:
        """The teacher's logits f32 (B, 2, C)."""
        return decode(self.gathered(), self.dither_keys, self.decoder)

    def features(self) -> torch.Tensor:
        """The teacher's features f32 (B, 2, F). Raises ValueError if the store keeps none."""
        if self.decoder.head is None:
            raise ValueError(f"expected labels with features, got {self.decoder.kind}")
        return _along(self.gathered(), self.dither_keys, self.decoder)


def decode(codes: torch.Tensor, dither_keys: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    """Codes u8 (B, row_bytes) and their dither keys i64 (B,) (the bits of a u64) -> logits f32 (B, 2, C)."""
    batch = len(codes)
    if decoder.kind == "fp16":
        return codes.contiguous().view(torch.float16).float().view(batch, 2, decoder.classes)
    if decoder.kind == "int8":
        # Flat, as the header of a single pair keeps the codes' stride, which may be no multiple of 4.
        scale, offset = codes[:, :16].flatten().view(torch.float32).view(batch, 2, 2, 1).unbind(1)
        return codes[:, 16:].contiguous().view(torch.int8).view(batch, 2, decoder.classes) * scale + offset
    vectors = _along(codes, dither_keys, decoder)
    if decoder.head is None:
        return vectors
    weight, bias = decoder.head
    return vectors @ weight.T + bias


def _along(codes: torch.Tensor, dither_keys: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    """The vectors f32 (B, 2, C), or features (B, 2, F), of a subspace code."""
    batch = len(codes)
    assert decoder.beta is not None
    assert decoder.basis is not None and decoder.scale is not None and decoder.mean is not None
    dims, wide = len(decoder.basis), decoder.wide
    half = (dims - wide + 1) // 2
    segments = codes[:, 16:].reshape(batch, 2, -1)  # behind the dither key, which the caller has
    nibbles = segments[..., wide : wide + half]
    narrow = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)[..., : dims - wide].to(torch.int8)
    q = torch.cat([segments[..., :wide].contiguous().view(torch.int8), (narrow ^ 8) - 8], dim=-1).float()
    along = (q - decoder.beta * dither(dither_keys, dims)) * (decoder.scale * decoder.unit)
    if decoder.scale.ndim == 2:
        along = torch.stack([along[:, 0] + along[:, 1], along[:, 0] - along[:, 1]], dim=1)
    return along @ decoder.basis[:, : len(decoder.mean)].float() + decoder.mean


def dither(dither_keys: torch.Tensor, dims: int) -> torch.Tensor:
    """u in (-1/2, 1/2) of both views' coefficients: f32 (B, 2, d) for keys i64 (B,); see `codec.entropy.dither`."""
    calls = -(-dims // 16)
    counter = torch.arange(calls, device=dither_keys.device)
    view = torch.arange(2, device=dither_keys.device)[:, None]
    zero = torch.zeros((len(dither_keys), 2, calls), dtype=torch.int64, device=dither_keys.device)
    c0, c1, c2, c3 = counter + zero, view + zero, zero, zero
    k0, k1 = (dither_keys & _LOW)[:, None, None], (dither_keys >> 32 & _LOW)[:, None, None]
    for _ in range(10):  # int64 products wrap, which leaves all 64 bits right; shifts are arithmetic, hence the masks
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    words = torch.stack([c0, c1, c2, c3], dim=2)  # (B, 2, 4, calls)
    shifts = torch.arange(0, 32, 8, device=dither_keys.device)[:, None]
    bytes_ = (words[:, :, :, None] >> shifts & 255).flatten(2)[..., :dims]
    return (2 * bytes_.float() - 255) / 512
