"""What the teacher pass takes, and what looks into a store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.config.machine import Machine
from pipeline.config.ranges import Count, Options, Part, Range, Seed


@dataclass(frozen=True, kw_only=True)
class PrecomputeTeacher(Machine):
    """Let the teacher look at every augmented view once and keep its soft labels. Rerun to resume."""

    data: Path
    """Prepared data set."""
    teacher: str
    """Network as NAME@WEIGHTS; NAME@pretrained takes timm's own weights. python:MODULE.FUNCTION is any callable from
    normalised images f32 (B, 3, S, S) to logits (B, classes)."""
    teacher_classes: Annotated[int | None, Range(1, 2**31 - 1)] = None
    """Number of classes of a teacher of other classes than the data's, 21843 of ImageNet-21k: of its outputs those that
    the data's names lead to are kept. CLASS_MAP then leads names, or numbers where there are none, to the teacher's
    names, or to the numbers of its outputs."""
    store: str
    """Store to create, to complete, or to extend to more views or shards: a folder or an s3:// URL."""
    views: Count
    """Augmented views per sample; epoch e of a student uses view e mod VIEWS."""
    teacher_size: Annotated[int | None, Range(1, 4096)] = None
    """Side in pixels that the teacher sees each view resized to, for networks that take one size only; the student's
    views stay as they are. Part of the store's identity."""
    policy: str = "imagenet"
    """imagenet, cifar10, cifar100 or a YAML file."""
    codec: Literal["auto", "subspace", "int8", "fp16"] = "auto"
    """How a pair of logit vectors is kept; auto takes the smallest that is unbiased and within the budget."""
    features: bool = False
    """Keep the teacher's pooled features, which its last linear layer makes the logits of, in the place of these: for
    fitnet, simkd, crd, vid and ft, and for every other loss as well. Takes two to three times the bytes."""
    kl_budget: Annotated[float | None, Range(0, above=True)] = None
    """Mean KL in nats at TEMPERATURE that the code may add to a label; by default 0.05, or an existing store's."""
    temperature: Annotated[float | None, Range(0, above=True)] = None
    """The lowest temperature that students will distil at: the code is fitted for it; by default 4, or that of an
    existing store."""
    energy: bool = False
    """Also keep the energy of each view, −logsumexp of its raw logits, which a student's --loss energy needs."""
    dry_run: bool = False
    """Measure codec, size and time on some pairs, print them and write nothing."""
    seed: Seed = 0
    """Seed of the views."""
    batch_size: Count = 128
    """Images per forward pass."""
    block_rows: Count = 8192
    """Rows per block: the unit of commit and resume."""
    array: str | None = None
    """I/N: this is job I, from 0, of N that fill one store without knowing of each other; it takes its own blocks
    first, then whatever the others have not done."""
    views_per_decode: Annotated[int, Range(1, 64)] = 1
    """Views made of a sample while it is decoded; the labels are the same, and so many times the memory is taken."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the teacher; auto: bf16 on a GPU that has it, else fp32."""
    compile: bool = False
    """Compile the teacher with torch.compile."""
    decoder: Literal["auto", "cpu", "gpu", "gpu-hw", "gpu-both"] = "auto"
    """Who decodes JPEG; part of the store's identity, because decoders differ in bytes. gpu takes nvJPEG's kernels,
    whose host threads read the Huffman codes of images below a megapixel, gpu-hw its hardware engine, gpu-both each for
    a part of the samples. auto: gpu-hw on a GPU that has the engine, gpu on others, cpu without a GPU."""


@dataclass(frozen=True, kw_only=True)
class Verify(Machine):
    """Make a random share of a store's rows again, name whatever differs and its cause; exits 1 if anything does."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to verify."""
    data: Path
    """Prepared data set that it was made for."""
    teacher: str | None = None
    """Teacher as NAME@WEIGHTS; without it pixels and integrity are verified, but not what the teacher said."""
    teacher_classes: Annotated[int | None, Range(1, 2**31 - 1)] = None
    """As given to precompute-teacher, and CLASS_MAP with it."""
    fraction: Part = 0.001
    """Share of the rows of every view; at least 64 rows in all."""
    seed: Seed = 0
    """Which rows."""
    batch_size: Count = 128
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the teacher; auto: that of the teacher pass."""


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
    teacher_classes: Annotated[int | None, Range(1, 2**31 - 1)] = None
    """As given to precompute-teacher, and CLASS_MAP with it."""
    samples: Annotated[int, Range(0, 1000)] = 12
    """View pairs to show."""


@dataclass(frozen=True, kw_only=True)
class Store(Options):
    """What a store holds (info), the same without its last views (prune), or elsewhere (copy)."""

    action: Annotated[Literal["info", "prune", "copy"], tyro.conf.Positional]
    """info: print it; prune: keep the first VIEWS views; copy: copy it to TO, checked, and resumed if run again."""
    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """A folder or an s3://, gs:// or az:// URL."""
    to: str | None = None
    """copy: a folder or URL."""
    views: Annotated[int | None, Range(1, 2**16)] = None
    """prune: how many views to keep."""
