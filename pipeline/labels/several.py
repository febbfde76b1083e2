"""Labels of several teachers on the same views, taken together as one teacher's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import cache
from cache import Store, UserError
from kernels import EncodedPairs
from pipeline.labels.epochs import Labels, require_whole
from pipeline.system import device as devices

Together = Literal["probabilities", "logits", "confidence"]

_SAME = ("dataset", "samples", "classes", "policy", "base", "size", "seed", "decoder")
"""What decides pixels, and whose labels these are."""


def require_same_views(first: Store, others: Sequence[Store], views: int) -> None:
    """Raise UserError, naming the store, unless the others' teachers labelled the first `views` views of the first."""
    paths = [str(first.path)]
    for other in others:
        if str(other.path) in paths:
            raise UserError("a store is given twice", found=other.path, fix="give stores of different teachers")
        paths.append(str(other.path))
        expected = {name: getattr(first.manifest, name) for name in _SAME}
        fix = f"let its teacher label the views of {first.path}: its data, policy and seed for precompute-teacher"
        try:
            cache.check(other.manifest, **expected)
            same = (first.key_hash == other.key_hash).all() and (first.status == other.status).all()
        except UserError as error:
            raise UserError(
                f"store {other.path} is not of the same views: {str(error).split('; fix')[0]}", fix=fix
            ) from None
        names = [(store.manifest.class_list or {}).get("names") for store in (first, other)]
        if not same or (None not in names and names[0] != names[1]):
            what = "keys or status of samples" if not same else "names or order of classes"
            raise UserError(f"store {other.path} is not of the same views", found=f"other {what}", fix=fix)
        if other.manifest.views < views:
            fix = f"run precompute-teacher --views {views}, it goes on, or give --student-views {other.manifest.views}"
            found = f"{other.manifest.views} in {other.path}"
            raise UserError("a store has too few views", found=found, expected=f"{views}", fix=fix)
        require_whole(other, views)


@dataclass(frozen=True, eq=False)
class Several(Labels):
    """One view's labels of several teachers, as one teacher's. `plane` has the first's rows and the mean of all w."""

    each: tuple[Labels, ...]
    """By teacher."""
    target: np.ndarray
    """Class labels i64 (N,)."""
    shares: tuple[float, ...]
    """Of each teacher; their sum is 1."""
    together: Together
    temperature: float

    in_codes = False

    @classmethod
    def of(
        cls,
        each: Sequence[Labels],
        target: np.ndarray,
        weights: Sequence[float],
        together: Together,
        temperature: float,
    ) -> "Several":
        """`weights`: positive, of each teacher; none: all alike. Raises UserError if the teachers saw other pixels."""
        first, weights = each[0], weights or [1.0] * len(each)
        shares = tuple(weight / sum(weights) for weight in weights)
        w = sum(share * labels.plane.weight for share, labels in zip(shares, each, strict=True))
        known = first.plane.good & ~np.isnan(w)
        for other in each[1:]:
            differ = (first.plane.digest != other.plane.digest) & known
            if differ.any():
                found = f"{differ.sum():,} of {known.sum():,} views, the first at row {differ.argmax()}"
                what = f"the teachers of {first.store.path} and {other.store.path} saw different pixels"
                raise UserError(what, found=found, fix="run both teacher passes with the same decoder and versions")
        plane = replace(first.plane, weight=np.asarray(w, np.float32), energy=None)
        return cls(first.store, plane, first.device, first.codes, tuple(each), target, shares, together, temperature)

    def logits(self, rows: np.ndarray) -> Tensor:
        """Logits f32 (B, 2, C) that say at T what the teachers together do, up to a shift.

        probabilities: the mean of softmax at T, as Hinton et al. 2015 and You et al. 2017 take ensembles. logits: their
        mean. confidence: the mean of probabilities where teacher s of S weighs (1 − softmax_s of all S
        cross-entropies with the label) / (S − 1), per view: *Confidence-Aware Multi-Teacher Knowledge Distillation*
        (Zhang et al., ICASSP 2022). Shares multiply those.
        """
        said = torch.stack([labels.logits(rows) for labels in self.each])  # (S, B, 2, C)
        shares = torch.tensor(self.shares, device=said.device)[:, None, None]
        if self.together == "logits":
            return (shares[..., None] * (said - said.mean(3, keepdim=True))).sum(0)
        if self.together == "confidence":
            target = devices.put(self.target[rows], said.device)[None, :, None].expand(said.shape[:3])
            hard = F.cross_entropy(said.flatten(0, 2), target.flatten(), reduction="none").reshape(said.shape[:3])
            shares = shares * (1 - hard.softmax(0))
            shares = shares / shares.sum(0, keepdim=True)
        p = (shares[..., None] * (said / self.temperature).softmax(3)).sum(0)
        return self.temperature * p.clamp(min=torch.finfo(p.dtype).tiny).log()

    def pairs(self, rows: np.ndarray) -> EncodedPairs:
        raise NotImplementedError("labels of several teachers have no codes of their own")
