"""Where a command runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.ranges import Natural, Options, Positive, Share

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Machine(Options):
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
    class_map: Path | None = None
    """File of `name: name` lines that the class names of data sets are read through before they are compared; a data
    set that numbers the same names otherwise is then renumbered."""
