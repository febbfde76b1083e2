"""Teachers that are any callable from images to logits: an ensemble, a CLIP head, a network of another framework."""

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache import UserError
from pipeline.networks import weights

PREFIX = "python:"


class Called(nn.Module):
    """A callable that takes f32 (B, 3, S, S) on any device and returns (B, classes), a tensor or an array."""

    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        self.function = function
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # modules are asked where they are by one

    def forward(self, images: Tensor) -> Tensor:
        answer = self.function(images)
        return (answer if isinstance(answer, Tensor) else torch.from_numpy(np.asarray(answer))).to(images.device)


def wrapped(function: Callable[[Tensor], Any]) -> tuple[nn.Module, str]:
    """The callable as a module, and what identifies its answers.

    A module is known by its weights, any other callable by its attribute `fingerprint`, a string that its author
    changes with the answers, or else by the source file that it comes from. Raises UserError if there is none of these.
    """
    if isinstance(function, nn.Module):
        return function, weights.fingerprint(function.state_dict())
    said = getattr(function, "fingerprint", None)
    if isinstance(said, str):
        return Called(function), hashlib.sha256(said.encode()).hexdigest()
    try:
        source = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").read_bytes()
    except (OSError, TypeError):
        raise UserError(
            "nothing identifies a teacher's answers", found=f"{function!r:.80}", fix="give it an attribute fingerprint"
        ) from None
    return Called(function), hashlib.sha256(source).hexdigest()


def imported(spec: str) -> Callable[[Tensor], Any]:
    """What python:MODULE.NAME names, the current folder included. Raises UserError if there is no such callable."""
    place, _, name = spec.removeprefix(PREFIX).rpartition(".")
    if not place or not name.isidentifier():
        raise UserError("unknown teacher", found=spec, expected="python:MODULE.FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(place), name, None)
    except Exception as error:  # the module's own code may raise anything
        raise UserError(f"cannot import {place}", found=f"{type(error).__name__}: {error}", fix="import it") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise UserError(f"no callable {name} in {place}", found=type(found).__name__, expected="images -> logits")
    return found
