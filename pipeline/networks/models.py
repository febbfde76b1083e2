"""Networks by name, with the weights that a spec names."""

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache import UserError
from cache.errors import did_you_mean
from pipeline.data import classes as class_lists
from pipeline.data.classes import Classes
from pipeline.networks import called, cifar, weights
from pipeline.networks.features import Both, Chosen, Reusing
from pipeline.system.terminal import note

FAMILIES = ("cifar", "timm")

fingerprint, save_weights = weights.fingerprint, weights.save


@dataclass(frozen=True)
class Network:
    """A network, created on the CPU, and what identifies it."""

    module: nn.Module
    """f32 (B, 3, H, W) -> logits (B, classes); train or eval mode is the caller's business."""
    name: str
    """FAMILY/NAME, without weights."""
    classes: int
    mean: tuple[float, ...] | None
    """Per channel, of input in [0, 1]: what the weights' file says, else timm; None: use the policy's."""
    std: tuple[float, ...] | None
    fingerprint: str
    """Of the weights as created; see `weights.fingerprint`."""
    class_list: Classes | None = None
    """What the outputs stand for, as far as it is known."""


def create(spec: str, classes: int | Classes, *, seed: int | None = None) -> Network:
    """The network of `spec`, NAME or NAME@WEIGHTS, with an output for each class.

    NAME is timm/ANY_TIMM_MODEL or cifar/NAME (see `cifar.build`). WEIGHTS is a file (see `weights.read`), or
    `pretrained` for timm's own. A seed makes the initial weights reproducible and leaves the global random number
    generators alone.

    Weights fit in every key and shape or are refused. One exception: given a seed, which says that there is something
    to initialise, weights for other classes get a new classifier. What was chosen, dropped or filled is printed.

    Raises UserError for an unknown name, and for weights that are absent, damaged, not finite, of another network or
    other classes, or more than tensors; no code in a file is run.
    """
    wanted = classes if isinstance(classes, Classes) else Classes(classes)
    name, at, where = spec.partition("@")
    family, slash, rest = name.partition("/")
    if not slash or family not in FAMILIES:
        raise UserError(
            f"unknown network {name}",
            found=f"family {family}" if slash else "no family",
            expected=" or ".join(f"{known}/NAME" for known in FAMILIES),
            fix=did_you_mean(family, FAMILIES) if slash else "put the family in front of the name",
        )
    pretrained, start = where == "pretrained", seed is not None
    found = weights.read(where) if at and not pretrained else None
    with torch.random.fork_rng(devices=[], enabled=start):
        if seed is not None:
            # torch.manual_seed would reseed the GPUs as well.
            torch.default_generator.manual_seed(seed)
        build = _timm if family == "timm" else _cifar
        module = build(rest, wanted.count, pretrained, start)
    config: Mapping[str, Any] = getattr(module, "pretrained_cfg", {})
    if found and not start:
        module = Reusing.like(module, found.state) or module
    mean, std = (tuple(config[key]) if key in config else None for key in ("mean", "std"))
    if found:
        fitted = weights.fit(found, module.state_dict(), name, wanted, _head(module), start=start)
        weights.load(module, fitted)
        for done in fitted.notes:
            note(f"weights {found.path}: {done}")
        mean, std = weights.numbers(found, "mean") or mean, weights.numbers(found, "std") or std
        wanted = wanted if wanted.names or start else weights.class_list(found) or wanted
    elif pretrained:
        weights.require_finite(module.state_dict(), f"pretrained weights of {name}")
    return Network(module, name, wanted.count, mean, std, fingerprint(module.state_dict()), wanted)


def trained(spec: str, classes: int | Classes) -> Network:
    """`create` for a network that is to answer, not to learn: NAME without WEIGHTS is a UserError.

    python:MODULE.FUNCTION is any callable, see `called`.
    """
    if spec.startswith(called.PREFIX):
        return of_callable(called.imported(spec), classes, name=spec)
    if "@" not in spec:
        create(spec, classes)  # a wrong name is said first
        raise UserError(f"network {spec} has no weights", expected=f"{spec}@WEIGHTS or {spec}@pretrained")
    return create(spec, classes)


def of_callable(function: Callable[[Tensor], Any], classes: int | Classes, *, name: str | None = None) -> Network:
    """Any callable from images f32 (B, 3, S, S) to logits (B, classes), as a network that answers.

    Its attributes `mean` and `std`, three numbers each, say which normalisation it wants; else it is the policy's.
    `name` is its own unless given. Raises UserError as `called.wrapped` does.
    """
    wanted = classes if isinstance(classes, Classes) else Classes(classes)
    module, identity = called.wrapped(function)
    said = (getattr(function, key, None) for key in ("mean", "std"))
    mean, std = (tuple(map(float, values)) if values is not None else None for values in said)
    name = name or f"{called.PREFIX}{getattr(function, '__qualname__', type(function).__name__)}"
    return Network(module, name, wanted.count, mean, std, identity, wanted)


def narrowed(network: Network, classes: Classes, class_map: Path | None) -> Network:
    """A network of other classes, of whose outputs those answer alone that `classes` lead to, see `classes.outputs`.

    Softmax is then over these: the teacher says which of the wanted classes it is, were it one of them.
    """
    names = class_lists.read_map(class_map) if class_map else {}
    outputs = class_lists.outputs(classes, network.class_list or Classes(network.classes), names)
    identity = hashlib.sha256(network.fingerprint.encode() + outputs.astype("<i8").tobytes()).hexdigest()
    module = Chosen(network.module, outputs)
    return Network(module, network.name, classes.count, network.mean, network.std, identity, classes)


def probe(network: Network, size: int, option: str = "") -> None:
    """Raise UserError unless the network takes images of `size` × `size` pixels and answers with its classes.

    `option` is the command's that shows it images of another size, if there is one. Weights, running statistics and
    mode stay as they are.
    """
    module, training = network.module, network.module.training
    images = torch.zeros(1, 3, size, size, device=next(module.parameters()).device)
    try:
        with torch.inference_mode():
            logits = module.eval()(images)
            shape = tuple(logits.shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        _, height, width = getattr(module, "pretrained_cfg", {}).get("input_size", (3, size, size))
        which = height if height != size else "it is made for"
        raise UserError(
            f"network {network.name} does not take images of {size} x {size} pixels",
            found=_first_line(error),
            expected=f"{height} x {width}" if height != size else None,
            fix=f"give {f'{option} {which}, or ' if option else ''}a policy of base size {which}, or another network",
        ) from None
    finally:
        module.train(training)
    if shape != (1, network.classes):
        raise UserError(f"network {network.name} is no classifier", found=shape, expected=(1, network.classes))
    if not logits.isfinite().all():
        raise UserError(
            f"network {network.name} answers a black image with NaN or infinity", fix="check where its weights are from"
        )


def least_views(network: Network, size: int) -> int:
    """Views that a training step needs at the least: 2 if BatchNorm meets a single value per channel in one, else 1.

    Weights, running statistics, mode and random number generators stay as they are. Raises UserError for a network that
    answers with more than its logits while it trains.
    """
    module, training = network.module, network.module.training
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = module.train()(torch.zeros(1, 3, size, size, device=next(module.parameters()).device))
        if not isinstance(logits, torch.Tensor | Both):
            raise UserError(
                f"network {network.name} has several heads in training", fix="choose one with a single head"
            )
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return 2
    finally:
        module.train(training)
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])
    return 1


def _cifar(name: str, classes: int, pretrained: bool, start: bool) -> nn.Module:
    module = cifar.build(name, classes)
    if module is None:
        raise UserError(
            f"unknown network cifar/{name}",
            expected="resnet{6n+2}, resnet{6n+2}x{k} or wrn_{6n+4}_{k}",
            fix=did_you_mean(f"cifar/{name}", [f"cifar/{known}" for known in cifar.NAMES]),
        )
    if pretrained:
        raise UserError(f"cifar/{name} has no weights of its own", fix=f"pass a file, cifar/{name}@WEIGHTS")
    return module


def _timm(name: str, classes: int, pretrained: bool, start: bool) -> nn.Module:
    import timm  # here, because a cifar network need not wait for it

    if not timm.is_model(name):
        close = [f"timm/{known}" for known in difflib.get_close_matches(name, timm.list_models())]
        fix = did_you_mean(f"timm/{name}", close) if close else "choose from timm.list_models()"
        raise UserError(f"unknown network timm/{name}", fix=fix)
    try:
        module = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    except Exception as error:  # an unknown tag, no such weights, or any of the ways in which a download fails
        raise UserError(
            f"cannot create timm/{name}" + (" with pretrained weights" if pretrained else ""),
            found=_first_line(error),
            fix="check the network connection, or pass a file, NAME@WEIGHTS" if pretrained else None,
        ) from None
    theirs = module.pretrained_cfg["num_classes"]  # pyright: ignore
    if pretrained and theirs != classes:
        if not start:
            raise weights.other_classes(f"pretrained weights of timm/{name}", theirs, classes)
        note(f"pretrained weights of timm/{name}: {weights.new_classifier(classes, theirs)}")
    return module


def _head(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's parameters: timm says them, the CIFAR networks have `fc`."""
    names = getattr(module, "pretrained_cfg", {"classifier": "fc"}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
