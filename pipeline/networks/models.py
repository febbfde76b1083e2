"""Networks by name, their weights from files that are not trusted, and the fingerprint of those weights."""

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cache import UserError
from cache.errors import did_you_mean
from pipeline.networks import cifar
from pipeline.system.files import write_atomically

FAMILIES = ("cifar", "timm")


@dataclass(frozen=True)
class Network:
    """A network, created on the CPU, and what identifies it."""

    module: nn.Module
    """f32 (B, 3, H, W) -> logits (B, classes); train or eval mode is the caller's business."""
    name: str
    """FAMILY/NAME, without weights."""
    classes: int
    mean: tuple[float, ...] | None
    """Per channel, of input in [0, 1], as timm's configuration of the network has it; None: use the policy's."""
    std: tuple[float, ...] | None
    fingerprint: str
    """Of the weights as created; see `fingerprint`."""


def create(spec: str, classes: int, *, seed: int | None = None) -> Network:
    """The network of `spec`, NAME or NAME@WEIGHTS, with `classes` outputs.

    NAME is timm/ANY_TIMM_MODEL or cifar/NAME (see `cifar_nets.build`). WEIGHTS is a .safetensors, .pt or .pth file
    with a state dict, or a dict that holds one under "model" or "state_dict"; or `pretrained` for timm's own weights.
    A seed makes the initial weights reproducible and leaves the global random number generators alone.

    Weights fit in every key and shape or are refused. One exception: given a seed, which says that there is
    something to initialise, `pretrained` weights for another number of classes get a new classifier.

    Raises UserError for an unknown name, and for weights that are absent, damaged, of another network or class
    count, or more than tensors; no code in a file is run.
    """
    name, at, weights = spec.partition("@")
    family, slash, rest = name.partition("/")
    if not slash or family not in FAMILIES:
        raise UserError(
            f"unknown network {name}",
            found=f"family {family}" if slash else "no family",
            expected=" or ".join(f"{known}/NAME" for known in FAMILIES),
            fix=did_you_mean(family, FAMILIES) if slash else "put the family in front of the name",
        )
    pretrained = weights == "pretrained"
    mean = std = None
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # torch.manual_seed would reseed the GPUs as well.
            torch.default_generator.manual_seed(seed)
        if family == "timm":
            module, mean, std = _timm(rest, classes, pretrained, new_classifier=seed is not None)
        else:
            module = _cifar(rest, classes, pretrained)
    if at and not pretrained:
        _load(module, Path(weights), name, classes)
    return Network(module, name, classes, mean, std, fingerprint(module.state_dict()))


def trained(spec: str, classes: int) -> Network:
    """`create` for a network that is to answer, not to learn: NAME without WEIGHTS is a UserError."""
    network = create(spec, classes)
    if "@" not in spec:
        raise UserError(f"network {spec} has no weights", expected=f"{spec}@WEIGHTS or {spec}@pretrained")
    return network


def probe(network: Network, size: int) -> None:
    """Raise UserError unless the network takes images of `size` × `size` pixels and answers with its classes.

    Weights, running statistics and mode stay as they are.
    """
    module, training = network.module, network.module.training
    images = torch.zeros(1, 3, size, size, device=next(module.parameters()).device)
    try:
        with torch.inference_mode():
            shape = tuple(module.eval()(images).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"network {network.name} does not take images of {size} x {size} pixels",
            found=_first_line(error),
            fix="choose another network, or a policy with the size it is made for",
        ) from None
    finally:
        module.train(training)
    if shape != (1, network.classes):
        raise UserError(f"network {network.name} is no classifier", found=shape, expected=(1, network.classes))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 hex over the names in sorted order, dtypes, shapes and bytes (row-major) of a state dict.

    The order of the dict, the device and the memory format of a tensor do not enter.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # As bytes, because numpy knows no bfloat16.
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the weights as safetensors, usable as NAME@path; a kill leaves the old file or the new one, whole."""
    # Cloned, because safetensors takes neither channels-last tensors nor two that share memory.
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    write_atomically(path, safetensors.torch.save(state))


def _cifar(name: str, classes: int, pretrained: bool) -> nn.Module:
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


def _timm(name: str, classes: int, pretrained: bool, new_classifier: bool) -> tuple[nn.Module, tuple, tuple]:
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
    config: Any = module.pretrained_cfg
    if pretrained and not new_classifier and config["num_classes"] != classes:
        raise _other_classes(f"pretrained weights of timm/{name}", config["num_classes"], classes)
    return module, tuple(config["mean"]), tuple(config["std"])


def _load(module: nn.Module, path: Path, name: str, classes: int) -> None:
    """Fill `module` with the weights in a file, all of them, or raise UserError."""
    theirs = _read(path)
    ours = module.state_dict()
    missing = [key for key in ours if key not in theirs]
    unexpected = [key for key in theirs if key not in ours]
    reshaped = [key for key in ours if key in theirs and theirs[key].shape != ours[key].shape]
    # Another number of classes shows in the classifier alone, and there in the first dimension alone.
    heads = {_classes(theirs[key], ours[key], classes) for key in reshaped}
    if len(heads) == 1 and None not in heads and not missing and not unexpected:
        raise _other_classes(f"weights {path}", heads.pop(), classes)
    faults = {
        "missing": [repr(key) for key in missing],
        "unexpected": [repr(key) for key in unexpected],
        "of another shape": [f"{key!r} {list(theirs[key].shape)} for {list(ours[key].shape)}" for key in reshaped],
    }
    if any(faults.values()):
        raise UserError(
            f"weights {path} are not those of {name}",
            found=", ".join(f"{kind}: {_first(keys)}" for kind, keys in faults.items() if keys),
            fix="name the network that the weights were trained as",
        )
    try:
        module.load_state_dict(theirs)
    except RuntimeError:  # a tensor without data, or of a layout that no network has
        raise _damaged(path, "tensors that cannot be copied") from None


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU, without the prefix `module.` that DataParallel leaves."""
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"unknown kind of weights {path}", expected="pretrained, or a .safetensors, .pt or .pth file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read weights {path}", found=error.strerror, fix="check the path") from None
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():  # about pickle protocols of files that are then read or refused anyway
                warnings.simplefilter("ignore")
                state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file ends in whatever its parser stumbles over, KeyError and OSError too
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"weights {path} hold more than tensors, which was not run",
                found=code[1],
                expected="a state dict",
                fix="save module.state_dict() instead",
            ) from None
        raise _damaged(path, f"{path.stat().st_size:,} bytes that do not parse") from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    found = (
        f"a dict of {_first([repr(key) for key in state]) or 'nothing'}"
        if isinstance(state, dict)
        else type(state).__name__
    )
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"no state dict in weights {path}",
            found=found,
            expected='name -> tensor, by itself or under "model" or "state_dict"',
        )
    if all(str(key).startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state


def _classes(theirs: Tensor, ours: Tensor, classes: int) -> int | None:
    """The classes of a classifier's tensor that differs from ours, of `classes`, in nothing else."""
    alike = theirs.ndim == ours.ndim and ours.shape == (classes, *theirs.shape[1:])
    return theirs.shape[0] if alike else None


def _damaged(path: Path, found: str) -> UserError:
    return UserError(
        f"damaged weights {path}", found=found, expected=f"a whole {path.suffix} file", fix="copy or save it again"
    )


def _other_classes(weights: str, found: object, expected: int) -> UserError:
    return UserError(
        f"{weights} are for another number of classes",
        found=found,
        expected=expected,
        fix="use weights trained for the classes of this data set",
    )


def _first(names: list[str], count: int = 3) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
