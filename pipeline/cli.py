"""Subcommand -> (schema, function). No logic: a wrong input ends in one line and exit code 2."""

import contextlib
import importlib.metadata
import io
import os
import re
import sys
from pathlib import Path

import tyro

from cache import UserError
from cache.errors import did_you_mean
from pipeline import config
from pipeline.system import interrupt

# The functions are named, not imported: `--help` need not wait for torch and DALI.
COMMANDS = {
    "prepare": (config.Prepare, "pipeline.data.prepare"),
    "train-teacher": (config.TrainTeacher, "pipeline.training.train_teacher"),
    "precompute-teacher": (config.PrecomputeTeacher, "pipeline.labels.precompute"),
    "train-student": (config.TrainStudent, "pipeline.training.train_student"),
    "evaluate": (config.Evaluate, "pipeline.training.evaluate"),
    "verify": (config.Verify, "pipeline.labels.verify"),
    "inspect": (config.Inspect, "pipeline.labels.inspect"),
    "store": (config.Store, "pipeline.labels.store"),
    "plan": (config.Plan, "pipeline.planning.plan"),
    "demo": (config.Demo, "pipeline.demo"),
    "bench": (config.Bench, "bench"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"pipeline {importlib.metadata.version('jda-distill')}")
        return 0
    try:
        command, *rest = arguments
        if command not in COMMANDS:
            raise UserError(f"unknown command {command}", fix=did_you_mean(command, COMMANDS))
        schema, module = COMMANDS[command]
        options = _parse(command, schema, rest)
        if (path := getattr(options, "json", None)) and not path.absolute().parent.is_dir():
            raise UserError(f"no folder for {path}", fix="create it")  # now, and not after an hour
        importlib.import_module(module).run(options)
    except ModuleNotFoundError as error:
        if error.name != "bench":
            raise
        return _fail(UserError("benchmarks are not in the package", fix="run them in a checkout of the repository"))
    except UserError as error:
        return _fail(error)
    except BrokenPipeError:  # the reader left, as `| head` does: nothing to say, and no flush at exit that fails
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Permissions, a full disk, a path that is a folder: the system's own words, and which file.
        what, where = error.strerror or str(error), error.filename or "no file name"
        return _fail(UserError(what, found=where, fix="check path and space"))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # PyTorch's
            raise
        found = str(error).partition("\n")[0] or None
        fix = "take a smaller --batch-size, --accumulate, or --precision bf16"
        return _fail(UserError("memory does not hold a step", found=found, fix=fix))
    except KeyboardInterrupt:
        return interrupt.CODE
    return 0


def _fail(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _parse(command: str, schema: type, arguments: list[str]):
    if "more_stores" in schema.__dataclass_fields__:
        arguments = _stores(arguments)
    flags: list[str] = []
    while "--config" in arguments or any(a.startswith("--config=") for a in arguments):
        at = next(i for i, a in enumerate(arguments) if a.split("=")[0] == "--config")
        _, _, value = arguments.pop(at).partition("=")
        if not value:
            if at == len(arguments):
                raise UserError("--config needs a recipe", expected="--config recipe.yaml")
            value = arguments.pop(at)
        flags += config.recipe_flags(Path(value), command, schema, tuple(COMMANDS))
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(
                schema,
                args=flags + arguments,
                prog=f"pipeline {command}",
                description=f"{schema.__doc__} --config recipe.yaml sets options that flags override.",
            )
    except SystemExit as stop:
        if isinstance(stop.__context__, UserError):  # of the record itself: tyro took it for a value it cannot read
            raise stop.__context__ from None
        if stop.code:
            # tyro draws a box of several lines; errors here are one line.
            text = " ".join(re.sub(r"[─│╭╮╰╯]|-{5,}|\x1b\[[0-9;]*m", " ", output.getvalue()).split())
            raise UserError(_naming(text, flags + arguments), fix=f"see pipeline {command} --help") from None
        raise


def _stores(arguments: list[str]) -> list[str]:
    """`--store A --store B` as `--store A --more-stores B`: of an option that is given twice only the last counts."""
    kept, found, words = [], [], iter(arguments)
    for word in words:
        inline = word.startswith("--store=")
        value = word.removeprefix("--store=") if inline else next(words, None) if word == "--store" else None
        if value is None:
            kept.append(word)
        else:
            found.append(value)
    if len(found) < 2:
        return arguments
    if any(word.split("=")[0] == "--more-stores" for word in kept):
        raise UserError("--store is given twice, and --more-stores too", fix="give the other stores one way")
    return [*kept, "--store", found[0], "--more-stores", *found[1:]]


def _naming(text: str, arguments: list[str]) -> str:
    """tyro's words without its help, and the option before a word that belongs to none."""
    text = re.split(r"Argument helptext:|For full helptext|Perhaps you meant:", text)[0].strip()
    stray = re.search(r"[Uu]nrecognized options?: (\S+)", text)
    if stray and not stray[1].startswith("-") and stray[1] in arguments[1:]:
        text += f" after {arguments[arguments.index(stray[1], 1) - 1]}"
    return text


def _usage() -> str:
    lines = [f"  {name:20s}{schema.__doc__.splitlines()[0]}" for name, (schema, _) in COMMANDS.items()]
    return "\n".join(["usage: pipeline COMMAND [--config recipe.yaml] [options], or pipeline --version", "", *lines])
