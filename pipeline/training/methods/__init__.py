"""Methods of distillation, a file each. A new one is one more file, one more line here, and its name in `Loss` of
`pipeline.config.training`."""

import dataclasses
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from cache.errors import UserError, did_you_mean
from pipeline.training.methods import (
    bss,
    calibrated,
    ce,
    crd,
    dist,
    dkd,
    dytkd,
    energy,
    fitnet,
    ft,
    ida,
    kd,
    mjkd,
    simkd,
    standardised,
    tald,
    triplet,
    vid,
)
from pipeline.training.methods.base import Method, View
from pipeline.training.methods.combined import loss

__all__ = ["METHODS", "Method", "View", "loss", "make"]

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        ce.CrossEntropy,
        kd.KnowledgeDistillation,
        kd.CosineConfidence,
        kd.MeanConfidence,
        dkd.Decoupled,
        dist.Dist,
        standardised.Standardised,
        energy.Energy,
        dytkd.MovingTemperature,
        triplet.Triplet,
        ida.Isotonic,
        calibrated.Calibrated,
        mjkd.GradientControl,
        bss.BoundarySamples,
        tald.AdversarialLocal,
        fitnet.FitNet,
        simkd.SimKD,
        crd.Contrastive,
        vid.Variational,
        ft.FactorTransfer,
    )
}
"""By --loss."""


def make(name: str, options: Iterable[str] = ()) -> Method:
    """The method of --loss, its options as `name=value`. Raises UserError for any that it has not or cannot take."""
    kind, found = METHODS[name], {}
    hints = get_type_hints(kind)
    known = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(kind)}
    for text in options:
        key, _, value = text.partition("=")
        key = key.strip().replace("_", "-")
        if key not in known:
            fix = did_you_mean(key, known) if known else "leave --loss-option out"
            raise UserError(f"--loss {name} has no option {key or 'without a name'}", found=f"{text:.40}", fix=fix)
        if known[key] in found:
            raise UserError(f"--loss-option {key} is given twice", found=f"{text:.40}", fix="keep one of them")
        found[known[key]] = _read(key, value, hints[known[key]])
    return kind(**found)


def _read(key: str, value: str, hint: Any) -> Any:
    """A value of the kind that a method's field has."""
    if choices := get_args(hint):
        if value not in choices:
            raise UserError(f"--loss-option {key}", found=f"{value:.40}", expected=" or ".join(choices))
        return value
    try:
        return hint(value)
    except ValueError:
        expected = "a whole number" if hint is int else "a number"
        raise UserError(f"--loss-option {key}", found=f"{value:.40}", expected=expected) from None
