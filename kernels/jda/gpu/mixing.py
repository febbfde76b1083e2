"""What is done to augmented views after their crop, on the device: the twin of `kernels.jda.mixing`, byte for byte."""

import numpy as np
import torch
from torch import Tensor


def mix(own: Tensor, other: Tensor | None, records: np.ndarray) -> None:
    """Mix views u8 (B, S, S, 3) in place, and erase their boxes, on the current stream.

    `records` (B,) are of `pipeline.views.mixing.draw`; `other` u8 (P, S, S, 3) are the partners' views, of those that
    have one; None where none has.
    """
    if other is not None:
        mixed = np.flatnonzero(records["partner"] >= 0)
        at, share = _on(mixed, own), _on(records["share"][mixed], own)[:, None, None]
        share = torch.where(_inside(records["patch"][mixed], own), 0, share)[..., None]
        own[at] = (own[at] * share + other * (256 - share) + 128 >> 8).to(torch.uint8)
    erased = np.flatnonzero(records["erase"][:, 2])
    if len(erased):
        at, value = _on(erased, own), _on(records["value"][erased], own)[:, None, None, None]
        own[at] = torch.where(_inside(records["erase"][erased], own)[..., None], value, own[at])


def _inside(boxes: np.ndarray, images: Tensor) -> Tensor:
    """Bool (n, S, S): the pixels in boxes (n, 4) (top, left, height, width)."""
    places = torch.arange(images.shape[1], device=images.device)
    top, left, height, width = _on(boxes, images).unbind(1)
    rows = (places >= top[:, None]) & (places < (top + height)[:, None])
    columns = (places >= left[:, None]) & (places < (left + width)[:, None])
    return rows[:, :, None] & columns[:, None, :]


def _on(array: np.ndarray, images: Tensor) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(array))
    return (host.pin_memory() if images.is_cuda else host).to(images.device, non_blocking=True)
