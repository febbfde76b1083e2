"""Weights in files that are not trusted: bytes -> a state dict that is whole, used and finite, and what was done to it.

Three lists of small functions, each tried in order: kinds of files that hold no weights but look like it, formats that
do, and wrappers around the names. No code in a file is run.
"""

import argparse
import hashlib
import json
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cache import UserError, outside
from cache.errors import did_you_mean
from pipeline.data.classes import Classes
from pipeline.system.files import write_atomically

State = Mapping[str, Tensor]

# The order is timm's, which takes the average. A run's own checkpoint has `average`; `model_state_dict` is PyTorch's
# tutorial's, and `net` that of many CIFAR scripts.
_AVERAGED = ("state_dict_ema", "model_ema", "average")
_RAW = ("state_dict", "model", "model_state_dict", "net")
# What torch.compile, FSDP and activation checkpointing put into names, at any depth.
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = ("n_averaged", "total_ops", "total_params")  # of torch's AveragedModel, and of thop
_WHOLE = "whole safetensors, or a whole file of torch.save"
_LARGEST = sys.float_info.max
_FILLED = "num_batches_tracked"  # which BatchNorm has had since 2018, and evaluation does not read


@dataclass(frozen=True)
class Weights:
    """What a file holds, before it meets a network."""

    path: Path
    state: State
    about: Mapping[str, str]
    """The metadata that `save` wrote; empty for all other files."""
    notes: tuple[str, ...] = ()
    """What was chosen, dropped or filled, for people."""


def read(text: str) -> Weights:
    """The state dict of FILE or FILE#WHICH; WHICH is `ema`, `raw`, or the key that it stands under.

    The content decides what a file is, its name does not. Raises UserError.
    """
    path, which = _place(text)
    state, about = _content(path)
    if not isinstance(state, dict):
        raise _no_state_dict(path, type(state).__name__)
    key, note = _chosen(state, which, path)
    state = state[key] if key else state
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise _no_state_dict(path, f"a dict of {_first([repr(name) for name in state]) or 'nothing'}")
    others = [repr(name) for name in state if str(name) not in tensors]
    notes = [note] if note else []
    if others:
        notes.append(f"left out {_first(others)}, no tensors")
    return Weights(path, tensors, about, tuple(notes))


def fit(found: Weights, network: State, name: str, wanted: Classes, head: tuple[str, ...], *, start: bool) -> Weights:
    """The weights under the names and in the shapes of a network's state dict, every one of them.

    `head`: prefixes of the classifier's names. With `start` a classifier of other classes, by number or by name, is
    left to the network; else it is refused, and so is all else that does not fit. Raises UserError.
    """
    strange = False
    try:
        wanted.require_same(class_list(found) or wanted, "the data set", f"weights {found.path}")
    except UserError:
        if not start:
            raise
        strange = True
    named = {key: tensor for key, tensor in found.state.items() if _last(key) not in _COUNTERS or key in network}
    dropped = [repr(key) for key in found.state if key not in named]
    notes = [f"left out the counters {_first(dropped)}"] if dropped else []
    theirs = min(_unwrapped(named), key=lambda state: len(state.keys() ^ network.keys()))

    filled = [key for key in network if key not in theirs and _last(key) == _FILLED]
    if filled:
        notes.append(f"filled {len(filled)} absent {_FILLED}")
        theirs = {**theirs, **{key: network[key] for key in filled}}
    missing = [key for key in network if key not in theirs]
    unexpected = [key for key in theirs if key not in network]
    shared = [key for key in network if key in theirs]
    reshaped = [key for key in shared if theirs[key].shape != network[key].shape]
    # Another number of classes shows in the classifier alone, and there in the first dimension alone.
    counts = {_classes(theirs[key], network[key], wanted.count) if key.startswith(head) else None for key in reshaped}
    if (strange or len(counts) == 1) and None not in counts and not missing and not unexpected:
        count = counts.pop() if counts else None
        if not start:
            raise other_classes(f"weights {found.path}", count, wanted.count)
        notes.append(new_classifier(wanted.count, count or "others"))
        theirs, reshaped = {**theirs, **{key: network[key] for key in network if key.startswith(head)}}, []
    faults = {
        "missing": [repr(key) for key in missing],
        "unexpected": [repr(key) for key in unexpected],
        "of another shape": [f"{key!r} {list(theirs[key].shape)} for {list(network[key].shape)}" for key in reshaped],
        "of another type": [f"{key!r} {theirs[key].dtype}" for key in shared if not _alike(theirs[key], network[key])],
    }
    if any(faults.values()):
        raise UserError(
            f"weights {found.path} are not those of {name}",
            found=", ".join(f"{kind}: {_first(keys)}" for kind, keys in faults.items() if keys),
            fix="name the network that the weights were trained as",
        )
    return Weights(found.path, theirs, found.about, (*found.notes, *notes))


def load(module: nn.Module, found: Weights) -> None:
    """Put fitted weights into the network. Raises UserError if they cannot be copied, or are not finite there."""
    try:
        module.load_state_dict(found.state)
    except RuntimeError:  # a tensor without data
        raise _damaged(found.path, "tensors that cannot be copied") from None
    require_finite(module.state_dict(), f"weights {found.path}")


def require_finite(state: State, whose: str) -> None:
    """Raise UserError naming the first tensor with a NaN or an infinity."""
    for name, tensor in state.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise UserError(
                f"{whose} are not finite",
                found=f"{bad:,} of {tensor.numel():,} values of {name!r} that are NaN or infinite",
                fix="take weights of a run that did not diverge, or an earlier checkpoint",
            )


def save(module: nn.Module, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write the weights as safetensors, usable as NAME@path; a kill leaves the old file or the new one, whole."""
    # Cloned, because safetensors takes neither channels-last tensors nor two that share memory.
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    write_atomically(path, _sorted(safetensors.torch.save(state, dict(about or {}) or None)))


def _sorted(data: bytes) -> bytes:
    """The file with its header's keys in order: safetensors leaves that of the metadata to a hash map, and equal
    weights are to be equal bytes. Spaces up to a multiple of 8 follow the header, as in its own files."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def numbers(found: Weights, key: str) -> tuple[float, ...] | None:
    """What the file's metadata says under `key`, three finite numbers; None if it does not. Raises UserError."""
    if key not in found.about:
        return None
    try:
        return outside.numbers(outside.parsed(found.about[key]), key, None, 3, -_LARGEST, _LARGEST)
    except ValueError:
        raise _damaged(found.path, f"{key} {found.about[key]!r:.40}", "three numbers") from None


def class_list(found: Weights) -> Classes | None:
    """What the outputs stand for; None if the file does not say. Raises UserError."""
    return Classes.from_json(found.about["classes"], f"weights {found.path}") if "classes" in found.about else None


def fingerprint(state: State) -> str:
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


def new_classifier(classes: int, theirs: object) -> str:
    """What is said where a start is for other classes."""
    return f"a new classifier for {classes} classes, as theirs is for {theirs}"


def other_classes(weights: str, found: object, expected: int) -> UserError:
    return UserError(
        f"{weights} are for another number of classes",
        found=found,
        expected=expected,
        fix="use weights trained for the classes of this data set",
    )


# --- files and formats


def _place(text: str) -> tuple[Path, str]:
    path, which = Path(text), ""
    if "#" in text and not path.exists():
        name, _, which = text.rpartition("#")
        path = Path(name)
    try:
        there = not text or path.is_file()
        found = "a folder" if path.is_dir() else "no regular file" if path.exists() else "No such file or directory"
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        raise UserError(f"cannot read weights {text!r:.80}", found=str(error), fix="check the path") from None
    if not there:
        close = did_you_mean(text, ["pretrained"]) if re.fullmatch(r"\w+", text) else ""
        fix = close if close.startswith("did") else "check the path"
        raise UserError(f"cannot read weights {path}", found=found, fix=fix)
    if not text:
        raise UserError("no weights behind the @", expected="NAME@FILE, or NAME@pretrained for timm's own")
    return path, which


def _content(path: Path) -> tuple[Any, Mapping[str, str]]:
    """What a file holds, on the CPU, and its metadata."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"cannot read weights {path}", found=error.strerror, fix="check the path") from None
    for recognised, kind, fix in _NO_WEIGHTS:
        if recognised(head, path):
            raise UserError(
                f"no weights in {path}", found=kind, expected="safetensors, or a file of torch.save", fix=fix
            )
    parse = _safetensors if _is_safetensors(head) else _torch
    try:
        return parse(path)
    except Exception as error:  # a damaged file ends in whatever its parser stumbles over, KeyError and OSError too
        if code := re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>", str(error)):
            raise UserError(
                f"weights {path} hold more than tensors, which was not run",
                found=code[1] or code[2],
                expected="a state dict",
                fix="save module.state_dict() instead",
            ) from None
        raise _damaged(path, f"{path.stat().st_size:,} bytes that do not parse") from None


def _is_page(head: bytes, _: Path) -> bool:
    return head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def _is_torchscript(head: bytes, path: Path) -> bool:
    if not head.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # damaged in one of many ways, which reading it will say
        return False


_AGAIN = "download it again, signed in where the site asks for it"
_NO_WEIGHTS: tuple[tuple[Callable[[bytes, Path], bool], str, str], ...] = (
    (lambda head, _: not head, "an empty file", "copy or save it again"),
    (lambda head, _: head.startswith(b"version https://git-lfs"), "a Git LFS pointer", "fetch the file: git lfs pull"),
    (_is_page, "an HTML page", _AGAIN),
    (lambda head, _: head.startswith(b"{"), "JSON text", "name the file that holds the tensors"),
    (
        lambda head, _: head.startswith(b"\x89HDF"),
        "an HDF5 file, as Keras writes",
        "convert it to a PyTorch state dict",
    ),
    (lambda head, _: head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")), "a compressed file", "unpack it first"),
    (_is_torchscript, "a TorchScript program", "load it with torch.jit.load and save its state_dict()"),
)


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of length, then a JSON object."""
    return head[8:9] == b"{"


def _safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _torch(path: Path) -> tuple[object, Mapping[str, str]]:
    # From an open file, as torch.load goes by the suffix of a path.
    with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(_ADMITTED):
        warnings.simplefilter("ignore")  # about pickle protocols of files that are then read or refused anyway
        return torch.load(file, weights_only=True, map_location="cpu"), {}


_scalar = np.float64(0).__reduce__()[0]
# The options of a training script as argparse has them, and NumPy's numbers under their old and new path.
_ADMITTED: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
]


# --- containers and names


def _chosen(content: dict, which: str, path: Path) -> tuple[str, str]:
    """The key of the state dict, "" for the content itself, and a note where there was a choice."""
    there = [key for key in (*_AVERAGED, *_RAW) if _holds_tensors(content.get(key))]
    wanted = {"ema": _AVERAGED, "raw": _RAW, "": (*_AVERAGED, *_RAW)}.get(which, (which,))
    found = [key for key in wanted if _holds_tensors(content.get(key))]
    if not found:
        if not which or (which == "raw" and not there):
            return "", ""
        raise UserError(
            f"no weights {which} in {path}",
            found=f"keys {_first([repr(key) for key in content], 8)}",
            fix="name one that holds tensors",
        )
    others = [key for key in there if key != found[0]]
    if which or not others:
        return found[0], ""
    kind = " (the average)" if found[0] in _AVERAGED else ""
    return found[0], f"took {found[0]}{kind}; {path.name}#{others[0]} takes {others[0]}"


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())


def _unwrapped(state: State) -> Iterator[State]:
    """The state dict as it is, and with one wrapper after the other taken off its names."""
    yield state
    while state:
        inner = {_INSIDE.sub("", key): tensor for key, tensor in state.items()}
        if len(inner) < len(state):
            return  # two tensors under one name
        yield (state := inner)
        if len({key.partition(".")[0] if "." in key else None for key in state} | {None}) != 2:
            return
        yield (state := {key.partition(".")[2]: tensor for key, tensor in state.items()})


def _classes(theirs: Tensor, ours: Tensor, classes: int) -> int | None:
    """The classes of a classifier's tensor that differs from ours, of `classes`, in nothing else."""
    alike = theirs.ndim == ours.ndim and ours.shape == (classes, *theirs.shape[1:])
    return theirs.shape[0] if alike else None


def _alike(theirs: Tensor, ours: Tensor) -> bool:
    """Whether copying keeps the values; counts may be of any type."""
    if theirs.layout != torch.strided or theirs.is_quantized or theirs.is_meta:
        return False
    return not ours.is_floating_point() or theirs.is_floating_point()


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _no_state_dict(path: Path, found: str) -> UserError:
    keys = " or ".join(f'"{key}"' for key in _RAW[:2])
    return UserError(
        f"no state dict in weights {path}", found=found, expected=f"name -> tensor, by itself or under {keys}"
    )


def _damaged(path: Path, found: str, expected: str = _WHOLE) -> UserError:
    return UserError(f"damaged weights {path}", found=found, expected=expected, fix="copy or save it again")


def _first(names: list[str], count: int = 3) -> str:
    more = len(names) - count
    return ", ".join(f"{name:.60}" for name in names[:count]) + (f" and {more} more" if more > 0 else "")
