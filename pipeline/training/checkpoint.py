"""A run folder and its checkpoint: what a killed run needs to go on as if nothing had happened."""

import dataclasses
import io
import json
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from cache import UserError, difference
from cache.outside import parsed
from pipeline.config import Training
from pipeline.system import ranks
from pipeline.system.files import write_atomically

# May differ between a run and its continuation: they do not decide the result on a given machine. What lies at the
# places that they name is compared itself.
_OPERATIONAL = {
    *("out", "resume", "threads", "device", "checkpoint_steps", "eval_epochs", "val", "log_steps", "tensorboard"),
    *(
        "wandb",
        "dry_run",
        "shard_cache",
        "shard_cache_gb",
        "class_map",
        "plane",
        "check_steps",
        "data",
        "store",
        "more_stores",
        "policy",
    ),
}


def open_run(config: Training, sources: dict) -> None:
    """Create the run folder with its resolved config, or check that the one to resume was made with the same.

    `sources`: what data set, policy and labels are, JSON-safe, wherever they lie. Raises UserError if the folder exists
    and `--resume` was not given, or if one of them or an option that decides the result differs.
    """
    path = config.out / "config.json"
    options = _as_json(dataclasses.asdict(config))
    if config.out.exists() and not config.resume and not ranks.restarted():
        raise UserError(
            f"output folder {config.out} exists", fix="pass --resume to continue it, or choose another --out"
        )
    if not path.exists():
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomically(config.out / "sources.json", json.dumps(sources, indent=1).encode())
        write_atomically(path, json.dumps(options, indent=1).encode())
        return
    before = _read(path)
    defaults = _as_json({field.name: field.default for field in dataclasses.fields(config)})
    for key in options.keys() - _OPERATIONAL:
        then = before.get(key, defaults[key])  # an option may be younger than the run
        if then != options[key]:
            raise UserError(
                f"cannot resume {config.out}: --{key.replace('_', '-')} differs",
                found=options[key],
                expected=then,
                fix="resume with the same options, or choose another --out",
            )

    made_of = config.out / "sources.json"
    if made_of.exists() and (differing := difference("", sources, _read(made_of))):
        name, found, expected = differing
        raise UserError(
            f"cannot resume {config.out}: another {name[1:]}",
            found=f"{found!s:.80}",
            expected=f"{expected!s:.80}",
            fix="give what the run was made of, or choose another --out",
        )


def _as_json(options: dict) -> dict:
    """As a file has them: paths are text, tuples are lists."""
    return json.loads(json.dumps(options, default=str))


def _read(path: Path) -> dict:
    try:
        found = parsed(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"damaged {path}", expected="a JSON object", fix="choose another --out")
    return found


class Saver:
    """Writes checkpoints in the background, one at a time; a kill leaves the old or the new one, whole."""

    def __init__(self, out: Path, every: int):
        """`every` so many steps one is due within an epoch."""
        self._out, self._every, self._writer = out, every, ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future | None = None

    def due(self, step: int, steps: int) -> bool:
        """After `step` of an epoch's `steps`; the epoch's end has a checkpoint of its own."""
        return step % self._every == 0 and step < steps

    def __call__(self, state: dict) -> None:
        """Save `state` (tensors, numbers, strings, containers) as it is now; training may go on at once.

        Raises UserError if this or the last one could not be written.
        """
        self.wait()
        self._last = self._writer.submit(_save, self._out, copied(state))

    def wait(self) -> None:
        """Until the last checkpoint is on disk. Raises UserError if it could not be written."""
        last, self._last = self._last, None
        if last:
            last.result()

    def close(self) -> None:
        self._writer.shutdown()


def copied(state):
    """A copy of the state on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value) for value in state)
    return state


def _save(out: Path, state: dict) -> None:
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into a RuntimeError without a cause
    torch.save(state, buffer)
    write_atomically(out / "checkpoint.pt", buffer.getbuffer())


def load(out: Path) -> dict | None:
    """The last state saved, on the CPU; None before the first. Never runs code from the file."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(
            f"damaged checkpoint {path}", found=str(error).splitlines()[0], fix="delete it to start again"
        ) from None
