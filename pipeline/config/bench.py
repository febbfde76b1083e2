"""What `bench` takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.config.ranges import Count, Natural, Options, Range


@dataclass(frozen=True, kw_only=True)
class Bench(Options):
    """Time this package against its alternatives: interleaved, with medians and their spread."""

    suite: Annotated[
        Literal[
            "all",
            "loader",
            "views",
            "engine",
            "kernels",
            "store",
            "end-to-end",
            "plan",
            "gpu-acceptance",
            "codec-transfer",
            "claims",
        ],
        tyro.conf.Positional,
    ]
    """What to time. all: loader, store, kernels and end-to-end, with a page; views: several of one decode; engine: what
    the GPU loader's threads cost the host; plan: `pipeline plan` against runs;
    gpu-acceptance: what a GPU machine has to show, in three calls; codec-transfer trains small students on each label
    format, claims tries what the paper claims."""
    data: Path | None = None
    """Prepared data set; without it synthetic:512 (claims: Fashion-MNIST if Debian's package is installed, else the
    digits), prepared once and kept in WORK."""
    val: Path | None = None
    """claims, codec-transfer: prepared data set that students of a real teacher are judged by."""
    work: Path | None = None
    """Folder for what is made once; without it jda-distill/bench in the user's cache folder."""
    arms: str | None = None
    """Arms to run, separated by commas; without it all."""
    rounds: Annotated[int | None, Range(1)] = None
    """Timed rounds, by default 7; each runs every arm once. One more goes first and is not counted. all has a number
    for each suite."""
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
    """store: teacher logits as .npz to compare formats on; without them the simulated teacher's. kernels: logits to
    find out on what float16 labels add to the KL of a subspace code."""
    samples: Natural = 0
    """store: rows of the plane, by default as many as ImageNet-1k has; codec-transfer: pairs per view (40,000);
    claims: images that students learn from, of each class alike, by default 600 of Fashion-MNIST, 750
    photographs and all of others."""
    seeds: Count = 5
    """codec-transfer, claims: students per format or setting; claims: at most 3 away from the centre."""
    steps: Count = 1000
    """codec-transfer: optimiser steps per student."""
    temperature: Annotated[float, Range(0, 100, above=True)] = 4.0
    """codec-transfer: T at which students learn, peers' formats are stored and budgets hold."""
    teacher: str | None = None
    """claims: teacher as NAME@WEIGHTS; NAME is trained twice, without and with JDA. By default the demo's.
    claims, codec-transfer: lite0, lite1 or lite2 on DATA and VAL; codec-transfer by default the simulated teacher."""
    student: str | None = None
    """claims: student NAME, by default one that suits the data. codec-transfer with a real teacher: small, which sees
    pixels, or head, which sees features of the teacher's."""
    policy: str | None = None
    """claims: imagenet, cifar10, cifar100 or a YAML file, by default one that suits the data."""
    epochs: Annotated[int | None, Range(1, 10_000)] = None
    """claims: epochs of a student, each on views of its own; by default 16 on Fashion-MNIST and photographs
    and 8 on others."""
