"""Knowledge distillation with joint data augmentation from precomputed soft labels."""

import os
from importlib import import_module

from pipeline.system import memory

memory.keep_freed()

# Before torch loads OpenMP and NumPy loads OpenBLAS. Threads of both spin when they have nothing to do, and starve
# others that share their cores: the loader's (an epoch on 2 cores beside one busy process took 54 s, without spinning
# 3.7 s, and 3.3 s undisturbed), and those of the backward pass, after the small product that decodes labels (5 % of a
# ResNet-18 step, without spinning nothing).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles instead of 2^26

_PUBLIC = {"Replay": "pipeline.replay", "UserError": "cache.errors", "precompute": "pipeline.labels.precompute"}


def __getattr__(name: str):
    # On first use: `import pipeline` waits for neither torch nor DALI.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
