"""What every command takes. The dataclasses are the schema: defaults < recipe YAML < flags."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
import yaml

from cache import UserError
from cache.errors import did_you_mean
from pipeline.ranges import Count, Natural, NotNegative, Part, Positive, Range, Seed, Share

Loss = Literal["ce", "kd", "ccd", "ccd-mean", "dkd", "dist", "standardised"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn a source of images into WebDataset shards and an index; every image is decoded once."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """imagefolder:PATH, cifar10:PATH, cifar100:PATH, webdataset:PATTERN, digits or synthetic:N. A pattern is a path, an
    s3:// or an https:// URL with {braces} and, but for https, wildcards."""
    out: Path
    """Folder to create. digits and cifar fill OUT/train and OUT/val."""
    classes: Annotated[int | None, Range(1, 2**31 - 1)] = None
    """Number of classes of a webdataset source; by default the largest label + 1."""
    shard_size: Count = 4096
    """Samples per shard."""
    seed: Seed = 0
    """Seed of synthetic images and of the digits split."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how fast; never part of a result's identity on one machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto takes a GPU if there is one."""
    threads: Natural = 0
    """Threads that decode and as many that augment; 0: one per core."""
    max_bad: Share = 0.001
    """Largest share of the samples that may turn out unreadable during a run; they are skipped and named."""
    shard_cache: Path | None = None
    """Folder that keeps samples of remote shards (s3://, https://); processes may share it."""
    shard_cache_gb: Positive = 50.0
    """Size that the folder may grow to."""


@dataclass(frozen=True, kw_only=True)
class Training(Machine):
    """Options that training a teacher and training a student share."""

    data: Path
    """Prepared data set to train on."""
    val: Path | None = None
    """Prepared data set to evaluate on."""
    out: Path
    """Run folder to create: config, metrics, checkpoint, weights."""
    resume: bool = False
    """Continue the run in OUT from its last checkpoint (or start it)."""
    epochs: Count = 200
    """Passes over the data."""
    batch_size: Count = 128
    """Images per step; with pairs the network sees twice as many views."""
    lr: NotNegative = 0.1
    """Peak learning rate of SGD."""
    schedule: Literal["step", "cosine"] = "step"
    """step: ×0.1 at each milestone; cosine: to zero."""
    milestones: Annotated[tuple[int, ...], Range(0)] = (60, 120, 180)
    """Epochs at which the step schedule drops."""
    warmup_epochs: NotNegative = 0.0
    """Linear warm-up from zero."""
    weight_decay: NotNegative = 1e-4
    momentum: Share = 0.9
    nesterov: bool = False
    clip: NotNegative = 0.0
    """Clip the gradient norm; 0: never."""
    label_smoothing: Share = 0.0
    accumulate: Count = 1
    """Parts that a step's images pass the network in, where memory does not hold them at once."""
    precision: Precision = "auto"
    """Arithmetic of the network; auto: bf16 on a GPU that has it, else fp32. Losses are always fp32; fp16 is scaled."""
    compile: bool = False
    """Compile the network with torch.compile."""
    ema: Share = 0.0
    """Keep an exponential moving average of the weights with this decay, evaluate and export it; 0: none."""
    sync_bn: bool = True
    """With several processes, batch statistics over all of them: results do not depend on their number."""
    few_shot: Part = 1.0
    """Share of the training samples to use, of each class alike (claim d of the paper)."""
    seed: Seed = 0
    """Seed of the initial weights, the order and (without a store) the views."""
    shuffle_window: Natural = 0
    """Shuffle within windows of so many shards, for storage that hates random reads; 0: the whole set."""
    checkpoint_steps: Count = 500
    """Steps between checkpoints; one is also written after each epoch."""
    eval_epochs: Natural = 1
    """Epochs between evaluations; the last epoch is always evaluated, with 0 it alone."""
    log_steps: Count = 50
    """Steps between records of loss, its parts, rate and waiting in metrics.jsonl; each waits for the GPU once."""
    tensorboard: bool = False
    """Also write TensorBoard events to OUT/tensorboard."""
    wandb: str | None = None
    """Also log to this project of Weights & Biases, if it is installed."""
    dry_run: bool = False
    """Check everything, time two steps, print what the run would take, and write nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(Training):
    """Train a teacher by cross-entropy."""

    teacher: str
    """Network NAME, or NAME@WEIGHTS to start from."""
    jda: bool = True
    """Train on the original and the augmented view; otherwise on the original alone."""
    policy: str = "imagenet"
    """imagenet, cifar10, cifar100 or a YAML file."""
    weight_decay: NotNegative = 5e-4


@dataclass(frozen=True, kw_only=True)
class PrecomputeTeacher(Machine):
    """Let the teacher look at every augmented view once and keep its soft labels. Rerun to resume."""

    data: Path
    """Prepared data set."""
    teacher: str
    """Network as NAME@WEIGHTS; NAME@pretrained takes timm's own weights."""
    store: str
    """Store to create, to complete, or to extend to more views or shards: a folder or an s3:// URL."""
    views: Count
    """Augmented views per sample; epoch e of a student uses view e mod VIEWS."""
    policy: str = "imagenet"
    """imagenet, cifar10, cifar100 or a YAML file."""
    codec: Literal["auto", "subspace", "int8", "fp16"] = "auto"
    """How a pair of logit vectors is kept; auto takes the smallest that is unbiased and within the budget."""
    kl_budget: Annotated[float | None, Range(0, above=True)] = None
    """Mean KL(T = 4) in nats that the code may add to a label; by default 0.05, or that of an existing store."""
    dry_run: bool = False
    """Measure codec, size and time on some pairs, print them and write nothing."""
    seed: Seed = 0
    """Seed of the views."""
    batch_size: Count = 128
    """Images per forward pass."""
    block_rows: Count = 8192
    """Rows per block: the unit of commit and resume."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the teacher."""
    decoder: Literal["auto", "cpu", "gpu", "gpu-hw"] = "auto"
    """Who decodes JPEG; part of the store's identity, because decoders differ in bytes. auto follows the device;
    gpu-hw takes nvJPEG's hardware engine."""


@dataclass(frozen=True, kw_only=True)
class TrainStudent(Training):
    """Train a student on stored soft labels."""

    store: str | None = None
    """Store of soft labels, a folder or an s3:// URL; it also says which views there are. Without it views are drawn
    from the seed, for ce and for a live teacher."""
    student: str
    """Network NAME, or NAME@WEIGHTS to start from."""
    loss: Loss = "ccd"
    """ce: labels only; kd: w ≡ 1; ccd: augmented views weighted by the teacher's agreement with itself; ccd-mean: all
    weighted by the mean of that, its fair control; dkd, dist, standardised: see pipeline/training/losses.py."""
    live_teacher: str | None = None
    """Teacher NAME@WEIGHTS that answers in the loop instead of the stored labels, on the store's views; the paper's
    online way."""
    check_teacher: str | None = None
    """Teacher NAME@WEIGHTS to compare the stored labels with, every so often."""
    check_steps: Count = 1000
    """Steps between these comparisons."""
    augmented_fraction: Share = 0.5
    """Share of augmented views among those that the network sees (claim c of the paper)."""
    temperature: Positive = 4.0
    alpha: Share = 0.5
    """Share of the hard loss."""
    kd_weight: NotNegative = 2.0
    """Factor on the whole loss."""
    kd_warmup_epochs: Natural = 0
    """Epochs over which the teacher's term fades in: epoch n, from 1, has n / this of it. DKD's authors take 20 on
    CIFAR, 1 on ImageNet."""
    plane: Literal["auto", "gpu", "pinned", "mmap"] = "auto"
    """Where an epoch's labels lie: GPU memory, page-locked memory, or a file in OUT that the system pages; auto takes
    the first that they fit."""
    check_share: Share = 0.001
    """Share of each epoch's samples whose pixels are compared with what the teacher saw."""
    policy: str | None = None
    """Refuse the store unless it was made with this policy; without a store, the policy (imagenet)."""
    teacher: str | None = None
    """Refuse the store unless this teacher, NAME[@WEIGHTS], made it."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Machine):
    """Top-1 and top-5 accuracy of a network on a prepared data set."""

    data: Path
    """Prepared data set."""
    model: str
    """Network as NAME@WEIGHTS."""
    policy: str = "imagenet"
    """Whose base transform decides size, crop and normalisation."""
    batch_size: Count = 128
    precision: Precision = "fp32"


@dataclass(frozen=True, kw_only=True)
class Verify(Machine):
    """Make a random share of a store's rows again, name whatever differs and its cause; exits 1 if anything does."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to verify."""
    data: Path
    """Prepared data set that it was made for."""
    teacher: str | None = None
    """Teacher as NAME@WEIGHTS; without it pixels and integrity are verified, but not what the teacher said."""
    fraction: Part = 0.001
    """Share of the rows of every view; at least 64 rows in all."""
    seed: Seed = 0
    """Which rows."""
    batch_size: Count = 128
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the teacher; take that of the teacher pass."""


@dataclass(frozen=True, kw_only=True)
class Inspect(Machine):
    """One HTML page about a store: sizes, view pairs with their top classes, histograms, what the code loses."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to look at."""
    data: Path
    """Prepared data set that it was made for."""
    out: Path = Path("report.html")
    """File to write."""
    teacher: str | None = None
    """Teacher as NAME@WEIGHTS: pictures then also show its top classes before coding."""
    samples: Annotated[int, Range(0, 1000)] = 12
    """View pairs to show."""


@dataclass(frozen=True, kw_only=True)
class Plan(Machine):
    """Hours, bytes and GPU-hours of teacher pass and students on 1 to 64 GPUs, from rates measured on this machine."""

    teacher: str
    """Network NAME or NAME@WEIGHTS; weights do not matter to the time."""
    student: str
    """Network NAME."""
    views: Count
    """Augmented views per sample that the teacher is to look at."""
    epochs: Count
    """Passes of a student over the data."""
    images: Annotated[int | None, Range(1, 10**12)] = None
    """Training images; by default those of DATA."""
    classes: Annotated[int | None, Range(1)] = None
    """By default those of DATA, or 1000."""
    students: Count = 1
    """Students to train on the same labels."""
    policy: str = "imagenet"
    """imagenet, cifar10, cifar100 or a YAML file."""
    batch_size: Annotated[int, Range(1, 2**16)] = 128
    """Pairs per step of each GPU."""
    precision: Precision = "auto"
    """Arithmetic of both networks; auto: bf16 on a GPU that has it, else fp32."""
    data: Path | None = None
    """Prepared data set to measure on; without it a few synthetic photographs of ImageNet's size."""
    rates: Path | None = None
    """File that an earlier --json wrote, on the machine that is planned for; nothing is measured then."""
    read_mb_s: Annotated[float | None, Range(0, above=True)] = None
    """Megabytes (10⁶ B) per second that storage reads for all GPUs together; by default no limit."""
    json: Path | None = None
    """File to write the rates and the plan to."""


@dataclass(frozen=True, kw_only=True)
class Demo(Machine):
    """The whole job on scikit-learn's handwritten digits, ending in a table. Rerun to resume."""

    out: Path = Path("demo")
    """Folder for data, store, runs and report."""
    seeds: Count = 3
    """Students per loss."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time this package against its alternatives: interleaved, with medians and their spread."""

    suite: Annotated[
        Literal[
            "all", "loader", "kernels", "store", "end-to-end", "plan", "gpu-acceptance", "codec-transfer", "claims"
        ],
        tyro.conf.Positional,
    ]
    """What to time. all: loader, store, kernels and end-to-end, with a page; plan: `pipeline plan` against runs;
    gpu-acceptance: what a GPU machine has to show, in nine minutes; codec-transfer trains small students on each label
    format, claims tries what the paper claims."""
    data: Path | None = None
    """Prepared data set; without it synthetic:512 (claims: the digits), prepared once and kept in WORK."""
    work: Path | None = None
    """Folder for what is made once; without it jda-distill/bench in the user's cache folder."""
    arms: str | None = None
    """Arms to run, separated by commas; without it all."""
    rounds: Count = 7
    """Timed rounds; each runs every arm once. One more goes first and is not counted."""
    pairs: Count = 1024
    """Pairs per arm and round, rounded up to whole batches of every worker."""
    batch_size: Annotated[int, Range(1, 2**20)] = 64
    """Pairs per batch."""
    threads: Natural = 0
    """Threads that decode and as many that augment, or DataLoader workers; 0: one per core."""
    json: Path | None = None
    """File to write every figure to."""
    out: Path | None = None
    """Folder for plots."""
    logits: tuple[Path, ...] = ()
    """store: teacher logits as .npz to compare formats on; without them the simulated teacher's."""
    samples: Natural = 0
    """store: rows of the plane, by default as many as ImageNet-1k has; codec-transfer: pairs per view (40,000)."""
    seeds: Count = 5
    """codec-transfer, claims: students per format or setting."""
    steps: Count = 1000
    """codec-transfer: optimiser steps per student."""
    teacher: str | None = None
    """claims: teacher as NAME@WEIGHTS; NAME is trained twice, without and with JDA. By default the demo's."""
    student: str | None = None
    """claims: student NAME, by default the demo's."""
    policy: str | None = None
    """claims: imagenet, cifar10, cifar100 or a YAML file, by default the demo's."""
    epochs: Annotated[int, Range(1, 10_000)] = 8
    """claims: epochs of a student, each on views of its own."""


def recipe_flags(path: Path, command: str, schema: type, commands: tuple[str, ...]) -> list[str]:
    """A recipe's options for `command` as flags, to stand before the user's own.

    A recipe is a mapping of option to value. A key that is a command's name holds that command's options, so that one
    recipe can describe a whole job. Raises UserError for an unknown key.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read recipe {path}", found=error.strerror, fix="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot parse recipe {path}", found=" ".join(str(error).split()), expected="YAML") from None
    options = {key: value for key, value in _mapping(recipe, path).items() if key not in commands}
    options |= _mapping(recipe.get(command, {}), path)
    known = [field.name for field in dataclasses.fields(schema) if tyro.conf.Positional not in get_args(field.type)]
    flags = []
    for key, value in options.items():
        if key == "policy" and isinstance(value, str) and (path.parent / value).is_file():
            value = path.parent / value  # a file beside the recipe, wherever it is read from
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"unknown recipe key {key} in {path}", fix=did_you_mean(name, known))
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _mapping(value: object, path: Path) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"recipe {path}", found=type(value).__name__, expected="a mapping of option to value")
    return value
