"""JDA policies as data: an op table, the probability of each op, and the base transform around it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from cache import UserError
from cache.errors import did_you_mean
from cache.outside import listed, mapping, numbers, require, shown, whole
from kernels.jda.ops import CODES, MAX_OPS, TABLES, Op, compile_table
from pipeline.config import yaml_file

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR_STATS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
MIN_ALPHA, MAX_ALPHA = 0.01, 10.0


@dataclass(frozen=True)
class Base:
    """The base transform: the random crop and flip, drawn independently for the two views."""

    size: int
    """Side of the output in pixels."""
    pad: int = -1
    """≥ 0: pad black by so many pixels and crop without resizing; -1: RandomResizedCrop."""
    scale: tuple[float, float] = (0.08, 1.0)
    """RandomResizedCrop: share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: width over height, log-uniform."""
    flip: bool = True
    """Mirror with probability ½."""
    centre: float = 224 / 256
    """RandomResizedCrop: share of the shorter side that the evaluation crop keeps."""

    def resized(self, size: int) -> "Base":
        return dataclasses.replace(self, size=size)


@dataclass(frozen=True)
class Mix:
    """Mixup and CutMix of augmented views; what is not said here is as in `timm.data.Mixup` with mode `elem`."""

    mixup_alpha: float = 0.0
    """λ, the image's own share, is of Beta(alpha, alpha): Zhang et al., ICLR 2018. 0: no Mixup."""
    cutmix_alpha: float = 0.0
    """1 − λ is the share of the area that a box takes before it is cut at the edge: Yun et al., ICCV 2019. 0: no
    CutMix."""
    probability: float = 1.0
    """Of a view to be mixed; timm's `prob`."""
    switch_probability: float = 0.5
    """Of CutMix instead of Mixup where both have an alpha; timm's `switch_prob`."""


@dataclass(frozen=True)
class Erase:
    """Random erasing of augmented views, after they are mixed: Zhong et al., AAAI 2020.

    Defaults and the choice of the box are those of torchvision's and timm's RandomErasing.
    """

    probability: float = 0.25
    """Of a view to lose a box."""
    scale: tuple[float, float] = (0.02, 1 / 3)
    """Share of the view's area."""
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Height over width, log-uniform."""
    value: int = 128
    """Of all three channels of an erased pixel."""


@dataclass(frozen=True)
class Policy:
    """A JDA policy with every number it uses; what it says is what the store's manifest keeps."""

    name: str
    probability: float
    """Each op fires independently with this probability, always in list order; with `layers` each that was drawn."""
    table: tuple[Op, ...]
    """With `layers` the ops that are drawn from, so many times over."""
    base: Base
    mean: tuple[float, ...]
    """Per channel, for input in [0, 1]."""
    std: tuple[float, ...]
    layers: int = 0
    """n > 0: RandAugment (Cubuk et al., NeurIPS 2020): n ops are drawn one after the other, uniformly and with
    replacement. 0: every op is asked."""
    mix: Mix | None = None
    """None: no view has anything of another sample."""
    erase: Erase | None = None

    @property
    def alters(self) -> bool:
        """Whether anything happens to augmented views after their crop."""
        return bool(self.mix or self.erase)

    def to_config(self) -> dict:
        """JSON-safe, complete: `from_config` gives an equal policy."""
        config = dataclasses.asdict(self)
        config["ops"] = [[op.name, op.magnitude] for op in self.table[: len(self.table) // (self.layers or 1)]]
        del config["table"]
        for name in ("layers", "mix", "erase"):
            if not config[name]:
                del config[name]  # as in stores from before there was any
        return json.loads(json.dumps(config))  # lists for tuples


POLICIES = {
    "imagenet": Policy("imagenet", 0.2, TABLES["imagenet"], Base(224), *IMAGENET_STATS),
    "cifar10": Policy("cifar10", 0.5, TABLES["cifar10"], Base(32, pad=4), *CIFAR_STATS),
    "cifar100": Policy("cifar100", 0.3, TABLES["cifar100"], Base(32, pad=4), *CIFAR_STATS),
}


def load(name_or_path: str) -> Policy:
    """A published policy by name, or a custom one from a YAML file (`from_config` says what it may hold)."""
    if name_or_path in POLICIES:
        return POLICIES[name_or_path]
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"unknown policy {name_or_path}",
            expected=f"{', '.join(POLICIES)} or a YAML file",
            fix=did_you_mean(name_or_path, POLICIES),
        )
    return from_config(yaml_file.read(path, "policy"), str(path))


def from_config(config: object, where: str = "policy") -> Policy:
    """A policy from plain data, every value checked.

    Keys: `name`, `probability`, `ops` (a published name, or a list of `[op, magnitude]`), `base` (fields of `Base`),
    `mean`, `std`, `layers`, `mix` (fields of `Mix`), `erase` (fields of `Erase`). Raises UserError naming the key.
    """
    found = mapping(config, where, None, _POLICY, ("probability", "ops", "base"))
    layers, std = found.get("layers", 0), found.get("std", IMAGENET_STATS[1])
    table = found["ops"] * (layers or 1)
    try:
        compile_table(table)
    except ValueError as error:
        fix = "correct ops" + ", or take fewer layers: each has all of them" * (layers > 1)
        raise UserError(f"{where}: {error}", fix=fix) from None
    require(min(std) > 0, list(std), f"{where}: std", None, "positive numbers")
    del found["ops"]
    return Policy(**{"name": Path(where).stem, "mean": IMAGENET_STATS[0], **found, "table": table, "std": std})


def _text(value: object, where: str, fix: str | None) -> str:
    """Of any value, 7 and no as well."""
    try:
        return str(value)
    except ValueError:  # a number of thousands of digits
        raise UserError(where, found=shown(value), expected="a text") from None


def _one(value: object, where: str, fix: str | None, low: float, high: float) -> float:
    """A number, which errors show as a list of one."""
    return numbers([value], where, fix, 1, low, high)[0]


def _span(value: object, where: str, fix: str | None, high: float) -> tuple[float, ...]:
    found = numbers(value, where, fix, 2, 0.001, high)
    return require(found[0] <= found[1], found, where, fix, "low before high")


def _flag(value: object, where: str, fix: str | None) -> bool:
    return require(isinstance(value, bool), value, where, fix, "true or false")


def _ops(value: object, where: str, fix: str | None) -> tuple[Op, ...]:
    if not isinstance(value, str):
        return tuple(_op(each, where) for each in listed(value, where, fix))
    if value not in TABLES:
        raise UserError(f"{where}: unknown op table", found=value, fix=did_you_mean(value, TABLES))
    return TABLES[value]


def _op(value: object, where: str) -> Op:
    item = [value] if isinstance(value, str) else value
    good = isinstance(item, list) and len(item) in (1, 2) and isinstance(item[0], str)
    name, *magnitude = require(good, item, where, None, "[name, magnitude]")
    if name not in CODES:
        raise UserError(f"{where}: unknown op", found=name, fix=did_you_mean(name, CODES))
    return Op(name, *numbers(magnitude or [0.0], f"{where}: magnitude of {name}", None, 1, -1e6, 1e6))


def _base(value: object, where: str, fix: str | None) -> Base:
    return Base(**mapping(value, where, fix, _BASE, ("size",)))


def _mix(value: object, where: str, fix: str | None) -> Mix:
    mix = Mix(**mapping(value, where, fix, _MIX))
    for key in ("mixup_alpha", "cutmix_alpha"):
        alpha = getattr(mix, key)
        require(not 0 < alpha < MIN_ALPHA, alpha, f"{where}: {key}", fix, f"0, or at least {MIN_ALPHA}")
    if not mix.mixup_alpha and not mix.cutmix_alpha:
        raise UserError(f"{where}: nothing to mix by", fix="give mixup_alpha or cutmix_alpha, or leave mix out")
    return mix


def _erase(value: object, where: str, fix: str | None) -> Erase:
    return Erase(**mapping(value, where, fix, _ERASE))


_SPANS = {"scale": (_span, 1.0), "ratio": (_span, 10.0)}
_BASE = {"size": (whole, 1, 4096), "pad": (whole, -1, 4096), **_SPANS, "flip": (_flag,), "centre": (_one, 0.001, 1.0)}
_MIX = {
    **dict.fromkeys(("mixup_alpha", "cutmix_alpha"), (_one, 0.0, MAX_ALPHA)),
    **dict.fromkeys(("probability", "switch_probability"), (_one, 0.0, 1.0)),
}
_ERASE = {"probability": (_one, 0.0, 1.0), **_SPANS, "value": (whole, 0, 255)}
_POLICY = {
    "name": (_text,),
    "probability": (_one, 0.0, 1.0),
    "ops": (_ops,),
    "base": (_base,),
    **dict.fromkeys(("mean", "std"), (numbers, 3, 0.0, 1.0)),
    "layers": (whole, 0, MAX_OPS),
    "mix": (_mix,),
    "erase": (_erase,),
}
