"""What training and evaluation take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipeline.config.machine import Machine, Precision
from pipeline.config.ranges import Count, Natural, NotNegative, Part, Positive, Range, Seed, Share

Loss = Literal[
    "ce", "kd", "ccd", "ccd-mean", "dkd", "dist", "standardised", "energy", "dytkd", "triplet", "ida", "calibrated",
    "mjkd", "bss", "tald", "fitnet", "simkd", "crd", "vid", "ft",
]  # fmt: skip


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
    """Steps between records of loss, its parts, rate and waiting in metrics.jsonl; each waits for the GPU once. Of the
    steps between them only the gradient is computed: a record's loss is that of its own step."""
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
class TrainStudent(Training):
    """Train a student on stored soft labels."""

    store: str | None = None
    """Store of soft labels, a folder or an s3:// URL; it also says which views there are. Without it views are drawn
    from the seed, for ce and for a live teacher. Given again, a store of another teacher on the same views: see
    MORE_STORES."""
    more_stores: tuple[str, ...] = ()
    """Stores of other teachers on the views of STORE, whose labels count together with its own."""
    together: Literal["probabilities", "logits", "confidence"] = "probabilities"
    """What of several stores is averaged: probabilities at the temperature, logits, or probabilities weighted for each
    view by how well each teacher knows its label."""
    store_weights: Annotated[tuple[float, ...], Range(0, above=True)] = ()
    """A weight of each store, in their order, by default all alike."""
    student: str
    """Network NAME, or NAME@WEIGHTS to start from."""
    loss: Loss = "ccd"
    """ce: labels only; kd: w ≡ 1; ccd: augmented views weighted by the teacher's agreement with itself; ccd-mean: all
    weighted by the mean of that, its fair control; fitnet, simkd, crd, vid, ft: by features, of a store that was made
    with --features; all others: see docs/methods.md."""
    loss_option: tuple[str, ...] = ()
    """Options of the loss as NAME=VALUE, several behind each other; its file in pipeline/training/methods has them with
    their defaults, the authors'."""
    live_teacher: str | None = None
    """Teacher NAME@WEIGHTS that answers in the loop instead of the stored labels, on the store's views; the paper's
    online way."""
    teacher_size: Annotated[int | None, Range(1, 4096)] = None
    """Side in pixels that a live teacher sees each view resized to; without a live teacher, refuse the store unless its
    teacher saw views of this size."""
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
    student_views: Annotated[int | None, Range(1)] = None
    """Take only the first so many of the store's views, by default all: epoch e takes view e mod this."""
    repeat: Annotated[int, Range(1, 64)] = 1
    """Steps in a row that a batch of samples is read and decoded for, each with other views and their labels; so many
    epochs share an order and hold their labels at once."""
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
