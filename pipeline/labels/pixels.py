"""Pixels held against those that the teacher saw."""

import zlib

import numpy as np

from cache import Plane, UserError, pair_digest
from pipeline.data.index import Index
from pipeline.views.batch import Batch


class PixelCheck:
    """Does the student see what the teacher saw? Called with each batch of an epoch, it compares pixel digests.

    All of the first batch's (what changes every picture, such as another decoder, stops the run at once) and then
    those of a random `share` of the rows, drawn anew for each `seed`.
    """

    def __init__(self, plane: Plane, index: Index, seed: int, share: float):
        self.plane, self.index = plane, index
        self._chosen = np.random.default_rng(seed).random(len(plane.weight), np.float32) < share
        self._first = True

    def __call__(self, batch: Batch) -> None:
        """Raise UserError unless the chosen pixels have the digests that the teacher pass stored."""
        chosen = (self._chosen[batch.rows] | self._first) & ~np.isnan(self.plane.weight[batch.rows])
        self._first = False
        if not chosen.any():
            return
        rows, at = batch.rows[chosen], np.flatnonzero(chosen)
        pairs = batch.images[:, at].cpu().numpy().swapaxes(0, 1)
        found = np.array([[zlib.crc32(view) for view in pair] for pair in pairs], np.uint32).reshape(-1, 2)
        if len(differ := np.flatnonzero(pair_digest(found) != self.plane.digest[rows])):
            key = self.index.key(int(rows[differ[0]]))
            raise UserError(
                "the student would not see the pixels that the teacher saw",
                found=f"{len(differ)} of {len(found)} pairs of view {self.plane.view} differ, the first of key {key}",
                expected="the digests in the store",
                fix="decode with the DALI version and on the kind of device of the teacher pass, or run it again",
            )
