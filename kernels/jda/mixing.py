"""What is done to an augmented view after its crop: Mixup, CutMix and random erasing, in place."""

import numpy as np

from kernels.jda.enhance import jit


def mix(own: np.ndarray, other: np.ndarray | None, record: np.void) -> None:
    """Mix `own` u8 (S, S, 3), C-contiguous, with the `other` view u8 (S, S, 3), if there is one, and erase its box.

    `record` is one of `pipeline.views.mixing.draw`. A pixel is (share · own + (256 − share) · other + 128) >> 8,
    within the patch it is the other's. Releases the GIL.
    """
    if other is not None:
        top, left, height, width = record["patch"].tolist()
        if height:
            own[top : top + height, left : left + width] = other[top : top + height, left : left + width]
        else:
            _blend(own.reshape(-1), other.reshape(-1), np.int32(record["share"]))
    top, left, height, width = record["erase"].tolist()
    own[top : top + height, left : left + width] = record["value"]


@jit
def _blend(own, other, share):
    for i in range(own.size):
        own[i] = (own[i] * share + other[i] * (np.int32(256) - share) + np.int32(128)) >> np.int32(8)
