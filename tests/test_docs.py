"""README.md and docs/*.md: every command in them runs, every Python block holds, every name and link is there.

Commands are in blocks of the languages sh and console (lines with ``$ ``), or of none if their first line is a command.
A yaml block that begins with ``# NAME.yaml`` is written to that file. README.md runs in an empty folder, another page
in a copy of what it leaves. Commands run in this process, altered as below: pages speak of ImageNet.
"""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from moto.server import ThreadedMotoServer
from support.documents import FENCED, Block, blocks
from support.images import jpeg
from support.remote_servers import serve
from support.tars import tar_of
from torch.distributed.run import get_args_parser

from pipeline import cli
from pipeline.data.hub import __doc__ as hub_doc
from pipeline.data.remote import __doc__ as remote_doc
from pipeline.data.tokens import __doc__ as tokens_doc
from pipeline.networks import models
from pipeline.training import methods

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}

SUBSTITUTIONS = (  # in every word of a command, and in the recipes; {names} are those of `World`
    (r"timm/resnet34(\.tv_in1k)?@pretrained", "cifar/resnet8@{pretrained}"),  # no network here
    (r"timm/resnet(18|34)(\.tv_in1k)?", "cifar/resnet8"),
    (r"imagefolder:/data/(imagenet/)?(train|val)$", r"imagefolder:{source}/\2"),
    (r"s3://bucket\b", "{s3}"),
    (r"https://host/path\b", "{http}"),
    (r"\{000\.\.146\}", "{{000..001}}"),
)
VALUES: dict[str, Callable[[str], str]] = {  # of a flag, wherever it stands
    "--views": lambda text: str(max(int(text) // 10, 1)),
    "--nproc-per-node": lambda _: "2",
    "--nnodes": lambda _: "1",
    "--rdzv-endpoint": lambda _: "127.0.0.1:0",
}
_STEPS = ("--epochs", "1", "--batch-size", "8", "--few-shot", "0.1", "--policy", "{policy}", "--device", "cpu")
APPENDED = {  # flags that override those of the page; --views 1 only where the page leaves the number to a recipe
    "train-teacher": _STEPS,
    "train-student": _STEPS,
    "plan": ("--batch-size", "4", "--device", "cpu"),
    **dict.fromkeys(("precompute-teacher", "evaluate"), ("--policy", "{policy}", "--device", "cpu")),
    **dict.fromkeys(("verify", "inspect"), ("--device", "cpu")),
}
PARSED = {  # commands whose options are checked, but which are not run
    "demo": "three minutes of what the other commands do; test_recipes runs its recipe",
    "bench": "each suite has tests of its own, and takes minutes",
}
NOT_RUN = {  # programs of which no more is checked than this says
    "make": "installs 7 GB, or runs this suite: the target is there",
    "pip": "installs",
    "podman": "builds, see test_container",
    "docker": "builds or runs, see test_container",
    "sbatch": "needs a cluster; its script runs, see `run_script`",
}
FOREIGN = {
    *("--requeue", "--signal", "--array"),  # of sbatch
    *("--read-only", "--tmpfs", "--user", "--gpus", "--volume", "--cpus", "--entrypoint"),  # of docker and podman
}
SHELL = ("rm", "cp", "mv", "ls", "cat", "mkdir", "find", "du")
EMPTY = ("README.md", "docs/first-run.md")  # pages that begin in an empty folder
LANGUAGES = ("sh", "console")
ELSEWHERE = ("docs/own-loop.md",)  # whose Python test_own_loop.py runs


class Step(NamedTuple):
    line: str
    """A command, continuation lines joined."""
    output: list[str]
    """What the page says that it prints; empty where it says nothing."""


class World(NamedTuple):
    """What stands in for the reader's machine."""

    source: Path
    """train/ and val/: folders of JPEGs by class."""
    pretrained: Path
    """Weights of cifar/resnet8."""
    policy: Path
    """The one named imagenet, with images of 64 pixels: a twelfth of the time."""
    s3: str = "s3://none"
    http: str = "http://none"


# --- reading pages


def steps(block: Block) -> list[Step]:
    found: list[Step] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            found[-1].output.append(line)
        elif shlex.split(line, comments=True):
            found.append(Step(line.removeprefix("$ "), []))
    return found


def prose(page: str) -> list[str]:
    """The pieces in backquotes outside of blocks."""
    text = FENCED.sub("", PAGES[page].read_text())
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]


def names(output: str) -> list[str]:
    """The words of all tables' first columns, which do not hang on where lines are broken."""
    return " ".join(re.split("[│┃]", line)[1] for line in output.splitlines() if line[:1] in ("│", "┃")).split()


def titles(output: str) -> list[str]:
    """Lines outside of tables, up to their first number or mark."""
    lines = (line for line in output.splitlines() if line[:1] not in tuple("│┃┌├└┏┡┗"))
    return [" ".join(text.split()) for line in lines if (text := re.split(r"[\d:;,.]", line)[0].strip())]


def require_same(said: str, pasted: list[str]) -> None:
    """A page's copy of an output has its titles and the names of its fields; values may differ."""
    copy = "\n".join(pasted)
    assert names(said) == names(copy), f"stale: now it prints\n{said}"
    for title in titles(copy):
        assert title in " ".join(said.split()), f"stale: {title}; now it prints\n{said}"


# --- running them


@dataclasses.dataclass
class Page:
    name: str
    world: World
    torchrun: Callable[["Page", list[str]], None]
    recorded: list[list[str]] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        """Every block, in the current folder."""
        module = types.ModuleType(f"docs_{Path(self.name).stem.replace('-', '_')}")
        sys.modules[module.__name__] = module
        vars(module)["model"] = models.create("cifar/resnet8", 4).module  # the reader's
        try:
            for block in blocks(PAGES[self.name].read_text()):
                where = f"{self.name}:{block.line}"
                if block.language == "python" and self.name not in ELSEWHERE:
                    exec(compile("\n" * (block.line - 1) + block.text, str(PAGES[self.name]), "exec"), module.__dict__)
                elif block.language == "yaml":
                    yaml.safe_load(block.text)
                    if name := re.match(r"# (\S+\.yaml)\n", block.text):
                        Path(name[1]).write_text(self.replaced(block.text))
                elif block.language in LANGUAGES and block.text.startswith("#!"):
                    self.run_script(block.text)
                elif block.language in LANGUAGES:
                    for step in steps(block):
                        print(f"{where}: {step.line}")
                        self.step(step)
        finally:
            del sys.modules[module.__name__]

    def step(self, step: Step) -> None:
        words = shlex.split(step.line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # for one command; none of them decides anything here
            words.pop(0)
        program, *arguments = words
        if program == "pipeline":
            said = self.pipeline(arguments)
            if step.output and arguments[0] not in PARSED:
                require_same(said, step.output)
        elif program == "torchrun":
            self.torchrun(self, arguments)
        elif program == "export":
            said = f"{remote_doc} {hub_doc} {tokens_doc}"
            assert {word.split("=")[0] for word in arguments} <= set(re.findall(r"[A-Z]+_[A-Z_]+", said))
        elif program in SHELL:
            subprocess.run(step.line, shell=True, check=True)
        elif program == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in arguments if "=" not in word} <= set(targets), step.line
        else:
            assert program in NOT_RUN, f"no rule for {step.line}"

    def pipeline(self, arguments: list[str]) -> str:
        """One command in this process; what it printed."""
        command, *given = self.small(arguments)
        if command in PARSED:
            cli._parse(command, cli.COMMANDS[command][0], given)
            return ""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([command, *given])
        assert code == 0, f"pipeline {shlex.join([command, *given])} exits with {code}: {err.getvalue()}"
        return out.getvalue()

    def small(self, arguments: list[str]) -> list[str]:
        """The same for a small machine; of torchrun's arguments, or of those of `pipeline`."""
        words = [self.replaced(word) for word in arguments]
        for at, flag in enumerate(words[:-1]):
            if flag in VALUES:
                words[at + 1] = VALUES[flag](words[at + 1])
        command = next((word for word in words if word in cli.COMMANDS), "")
        if command == "precompute-teacher" and "--views" not in words:
            words += ["--views", "1"]
        return [*words, *(word.format_map(self.world._asdict()) for word in APPENDED.get(command, ()))]

    def replaced(self, text: str) -> str:
        for pattern, value in SUBSTITUTIONS:
            text = re.sub(pattern, value.format_map(self.world._asdict()), text)
        return text

    def run_script(self, text: str) -> None:
        """A batch script, where `srun` starts its command once; torchrun and pipeline only say what they were given."""
        for option in re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE):
            assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", word) for word in option.split()), option
        shims = Path("shims").absolute()
        shims.mkdir()
        for name, body in {
            "scontrol": "echo host0; echo host1",
            "srun": 'exec "$@"',
            **{name: f'printf "%s\\0" "$@" > {shims}/{name}.said' for name in ("torchrun", "pipeline")},
        }.items():
            (shims / name).write_text(f"#!/bin/bash\n{body}\n")
            (shims / name).chmod(0o755)
        slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "host[0-1]"}
        slurm |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "3"}
        environment = os.environ | slurm | {"PATH": f"{shims}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-eu", "-c", text], env=environment, check=True)
        (said,) = shims.glob("*.said")
        words = said.read_text().split("\0")[:-1]
        if said.stem == "torchrun":
            self.torchrun(self, words)
        else:
            self.pipeline(words)
        shutil.rmtree(shims)


def one_process(page: Page, arguments: list[str]) -> None:
    """torchrun's own parser takes its options; what it would start runs once, in this process."""
    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module and parsed.training_script == "pipeline", arguments
    page.pipeline(parsed.training_script_args)


def record(page: Page, arguments: list[str]) -> None:
    page.recorded.append(page.small(arguments))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            path = folder / "source" / split / f"class{number % 4}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(rng, 120, 90))
    models.save_weights(models.create("cifar/resnet8", 4, seed=1).module, folder / "pretrained.safetensors")
    (folder / "policy.yaml").write_text("{name: imagenet, probability: 0.2, ops: imagenet, base: {size: 64}}")
    return World(folder / "source", folder / "pretrained.safetensors", folder / "policy.yaml")


@contextlib.contextmanager
def inside(folder: Path, page: Page) -> Iterator[Path]:
    """In a folder that also has the recipes, with small networks in them."""
    recipes = folder / "pipeline" / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "pipeline" / "recipes").glob("*.yaml"):
        (recipes / path.name).write_text(page.replaced(path.read_text()))
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "METHODS", dict(methods.METHODS))  # a page may add to it
        yield folder


@pytest.fixture(scope="module")
def job(world, tmp_path_factory) -> Path:
    """What README.md leaves."""
    page = Page("README.md", world, one_process)
    with inside(tmp_path_factory.mktemp("readme"), page) as folder:
        page.run()
    return folder


def copied(job: Path, folder: Path) -> Path:
    return Path(shutil.copytree(job, folder / "job"))


def test_the_commands_of_the_readme(job):
    for name in ("data/train", "data/val", "teacher/model.safetensors", "labels.zarr", "run/model.safetensors"):
        assert (job / name).exists(), name


SLOW = ("docs/first-run.md", "docs/plan.md")  # README.md once more at full size, and small jobs timed: minutes


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PAGES if name != "README.md"],
)
def test_the_page_runs(name, job, world, tmp_path):
    with contextlib.ExitStack() as stack:
        if re.search(r"s3://bucket|https://host", PAGES[name].read_text()):
            world = stack.enter_context(served(world, tmp_path))
        page = Page(name, world, one_process)
        stack.enter_context(inside(tmp_path / "empty" if name in EMPTY else copied(job, tmp_path), page))
        page.run()


@contextlib.contextmanager
def served(world: World, folder: Path) -> Iterator[World]:
    """The same images as tars behind S3 and HTTP."""
    shards: dict[str, dict[str, bytes]] = {"train-000.tar": {}, "train-001.tar": {}}
    for number, path in enumerate(sorted((world.source / "train").rglob("*.jpg"))):
        members = shards[f"train-00{number % 2}.tar"]
        members |= {f"{number}.jpg": path.read_bytes(), f"{number}.cls": path.parent.name[-1].encode()}
    (folder / "served").mkdir()
    for name, members in shards.items():
        tar_of(folder / "served" / name, members)
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)  # it has the bucket of `serve`, and takes writes
    moto.start()
    try:
        with serve(folder / "served") as remote, pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*moto.get_host_and_port()))
            yield world._replace(s3=remote.s3, http=remote.http)
    finally:
        moto.stop()


@pytest.mark.slow
def test_the_commands_of_torchrun_with_two_processes(job, world, tmp_path):
    """Those of all pages that go on from README.md, as torchrun starts them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pages = [Page(name, world, record) for name in PAGES if name not in EMPTY]
    for page in pages:
        for block in blocks(PAGES[page.name].read_text()):
            for step in steps(block) if block.language in LANGUAGES and not block.text.startswith("#!") else ():
                if step.line.startswith("torchrun "):
                    page.step(step)
    commands = [command for page in pages for command in page.recorded]
    assert len(commands) >= 3
    folder = copied(job, tmp_path)
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *command],
            cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr[-2000:]}"


# --- what pages name


@pytest.mark.parametrize("name", PAGES)
def test_links_and_images_are_there(name):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGES[name].read_text()):
        assert "://" in target or (PAGES[name].parent / target).exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_files_commands_and_flags_in_the_text_are_there(name):
    torchrun = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    fields = {field.name for schema, _ in cli.COMMANDS.values() for field in dataclasses.fields(schema)}
    flags = {f"--{no}{field.replace('_', '-')}" for field in fields for no in ("", "no-")}
    for span in prose(name):
        if re.fullmatch(r"(pipeline|cache|kernels|bench|tests|docs)/[\w/.-]+\.\w+", span):
            assert (ROOT / span).exists(), span
        if command := re.match(r"pipeline ([a-z-]+)", span):
            assert command[1] in cli.COMMANDS, span
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span):
            assert flag in flags | torchrun | FOREIGN | {"--config", "--help"}, span


def test_a_broken_page_fails(job, world, tmp_path):
    """An unknown flag, a renamed option, a missing file, a stale output and a program without a rule."""
    page = Page("docs/none.md", world, one_process)
    good = Step("pipeline evaluate --data data/val --model timm/resnet18@run/model.safetensors", [])
    with inside(copied(job, tmp_path), page):
        page.step(good)
        for line in (
            good.line + " --fast",
            good.line.replace("--model", "--network"),
            good.line.replace("run/", "nowhere/"),
            "torchrun --nproc-per-gpu 8 -m pipeline train-student",
            "make everything",
            "pipeline bench everything",
            "curl example.org",
        ):
            with pytest.raises((AssertionError, SystemExit, cli.UserError)):
                page.step(Step(line, []))
        said = page.pipeline(shlex.split(good.line)[1:])
        page.step(Step(good.line, said.replace("0", "9").splitlines()))
        for old, new in (("top-1", "accuracy"), ("evaluation", "judgement")):
            with pytest.raises(AssertionError, match="stale"):
                page.step(Step(good.line, said.replace(old, new).splitlines()))
