"""What the children of `processes` are forked with, so that they start at once.

An optimizer imports torch._dynamo, which takes as long as torch itself. What makes images of photographs or digits
imports scikit-learn; the first image imports DALI, the first pixels most of numba, the first page Jinja2.
"""

import gc
from pathlib import Path

import jinja2  # noqa: F401
import numba
import PIL.Image
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401
from support import undrawn  # noqa: F401

import pipeline.labels.precompute
import pipeline.training.train_student  # noqa: F401

if not Path("/dev/nvidiactl").exists():  # a driver that was woken before a fork is of no use after it
    import nvidia.dali.fn  # noqa: F401

numba.njit(lambda: None)()
PIL.Image.init()
gc.freeze()  # for good: children neither look through it nor copy its pages
