"""JDA policies as data: an op table, the probability of each op, and the base transform around it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import UserError
from cache.errors import did_you_mean
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
    config = _mapping(config, where, ("name", "probability", "ops", "base", "mean", "std", "layers", "mix", "erase"))
    for key in ("probability", "ops", "base"):
        if key not in config:
            raise UserError(f"{where}: missing key {key}", fix=f"add {key}")
    if isinstance(config["ops"], str):
        if config["ops"] not in TABLES:
            raise UserError(f"{where}: unknown op table", found=config["ops"], fix=did_you_mean(config["ops"], TABLES))
        table = TABLES[config["ops"]]
    else:
        table = tuple(_op(item, where) for item in _list(config["ops"], f"{where}: ops"))
    layers = config.get("layers", 0)
    if type(layers) is not int or not 0 <= layers <= MAX_OPS:
        raise UserError(f"{where}: layers", found=layers, expected=f"a whole number in [0, {MAX_OPS}]")
    table *= layers or 1
    try:
        compile_table(table)
    except ValueError as error:
        fix = "correct ops" + ", or take fewer layers: each has all of them" * (layers > 1)
        raise UserError(f"{where}: {error}", fix=fix) from None
    mean, std = (
        _numbers(config.get(key, list(default)), f"{where}: {key}", 3, 0.0, 1.0)
        for key, default in zip(("mean", "std"), IMAGENET_STATS, strict=True)
    )
    if min(std) <= 0:
        raise UserError(f"{where}: std", found=list(std), expected="positive numbers")
    return Policy(
        name=str(config.get("name", Path(where).stem)),
        probability=_numbers([config["probability"]], f"{where}: probability", 1, 0.0, 1.0)[0],
        table=table,
        base=_base(config["base"], f"{where}: base"),
        mean=mean,
        std=std,
        layers=layers,
        mix=_mix(config["mix"], f"{where}: mix") if "mix" in config else None,
        erase=_erase(config["erase"], f"{where}: erase") if "erase" in config else None,
    )


def _base(config: object, where: str) -> Base:
    config = _mapping(config, where, tuple(field.name for field in dataclasses.fields(Base)))
    if "size" not in config:
        raise UserError(f"{where}: missing key size", fix="add size")
    for key, low, high in (("size", 1, 4096), ("pad", -1, 4096)):
        value = config.get(key, low)
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"{where}: {key}", found=value, expected=f"a whole number in [{low}, {high}]")
    if not isinstance(config.get("flip", True), bool):
        raise UserError(f"{where}: flip", found=config["flip"], expected="true or false")
    config = config | _spans(config, where)
    if "centre" in config:
        config["centre"] = _numbers([config["centre"]], f"{where}: centre", 1, 0.001, 1.0)[0]
    return Base(**config)


def _spans(config: dict, where: str) -> dict[str, Any]:
    """`scale` and `ratio`, if they are there."""
    found: dict[str, Any] = {}
    for key, high in (("scale", 1.0), ("ratio", 10.0)):
        if key in config:
            found[key] = _numbers(config[key], f"{where}: {key}", 2, 0.001, high)
            if found[key][0] > found[key][1]:
                raise UserError(f"{where}: {key}", found=list(found[key]), expected="low before high")
    return found


def _mix(config: object, where: str) -> Mix:
    config = _mapping(config, where, tuple(field.name for field in dataclasses.fields(Mix)))
    highest = dict.fromkeys(config, 1.0) | dict.fromkeys(("mixup_alpha", "cutmix_alpha"), MAX_ALPHA)
    found = {key: _numbers([value], f"{where}: {key}", 1, 0.0, highest[key])[0] for key, value in config.items()}
    mix = Mix(**found)
    for key in ("mixup_alpha", "cutmix_alpha"):
        if 0 < getattr(mix, key) < MIN_ALPHA:
            raise UserError(f"{where}: {key}", found=getattr(mix, key), expected=f"0, or at least {MIN_ALPHA}")
    if not mix.mixup_alpha and not mix.cutmix_alpha:
        raise UserError(f"{where}: nothing to mix by", fix="give mixup_alpha or cutmix_alpha, or leave mix out")
    return mix


def _erase(config: object, where: str) -> Erase:
    config = _mapping(config, where, tuple(field.name for field in dataclasses.fields(Erase)))
    config = config | _spans(config, where)
    if "probability" in config:
        config["probability"] = _numbers([config["probability"]], f"{where}: probability", 1, 0.0, 1.0)[0]
    value = config.get("value", 0)
    if type(value) is not int or not 0 <= value <= 255:
        raise UserError(f"{where}: value", found=value, expected="a whole number in [0, 255]")
    return Erase(**config)


def _op(item: object, where: str) -> Op:
    if isinstance(item, str):
        item = [item]
    if not isinstance(item, list) or len(item) not in (1, 2) or not isinstance(item[0], str):
        raise UserError(f"{where}: op", found=item, expected="[name, magnitude]")
    if item[0] not in CODES:
        raise UserError(f"{where}: unknown op", found=item[0], fix=did_you_mean(item[0], CODES))
    return Op(item[0], _numbers(item[1:] or [0.0], f"{where}: magnitude of {item[0]}", 1, -1e6, 1e6)[0])


def _mapping(config: object, where: str, keys: tuple[str, ...]) -> dict:
    if not isinstance(config, dict):
        raise UserError(where, found=type(config).__name__, expected=f"a mapping with {', '.join(keys)}")
    for key in config:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key}", expected=", ".join(keys), fix=did_you_mean(str(key), keys))
    return config


def _list(value: object, where: str) -> list:
    if not isinstance(value, list):
        raise UserError(where, found=type(value).__name__, expected="a list")
    return value


def _numbers(value: object, where: str, count: int, low: float, high: float) -> tuple[float, ...]:
    values = _list(value, where)
    good = len(values) == count and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if not good or not all(low <= v <= high for v in values):
        raise UserError(where, found=value, expected=f"{count} number(s) in [{low}, {high}]")
    return tuple(float(v) for v in values)
