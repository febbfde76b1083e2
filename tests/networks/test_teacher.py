"""On a CPU a teacher looks at a batch by parts, whose activations memory holds, and says the same."""

import numpy as np
import pytest
import torch

from pipeline import demo
from pipeline.networks import models, teacher
from pipeline.views import policy as policies
from pipeline.views.batch import Batch

POLICY = policies.load(demo.POLICY)
SIZE = POLICY.base.size


@pytest.fixture
def batch() -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 11, SIZE, SIZE, 3), np.uint8)
    return Batch(np.arange(11), torch.zeros(11, dtype=torch.int64), torch.from_numpy(pixels), None)


@pytest.mark.parametrize(("size", "looks"), [(None, [4, 4, 3]), (2 * SIZE, [1] * 11)])
@pytest.mark.parametrize("features", [False, True])
def test_a_batch_is_looked_at_by_parts(monkeypatch, batch, size, looks, features):
    """Both views, with the features too; what counts are the pixels that the network sees."""

    def said(at_once: int) -> tuple[teacher.Said, list[int]]:
        monkeypatch.setattr(teacher, "_AT_ONCE", at_once)
        network, seen = models.create("cifar/resnet8", 10, seed=3), []
        network.module.conv1.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
        made = teacher.Teacher(network, POLICY, torch.device("cpu"), "fp32", size=size, features=features)
        seen.clear()  # of the probe
        return made.said(batch), seen

    whole, (first, second) = said(10**9)
    assert (first, second) == (11, 11)
    parts, seen = said(4 * SIZE**2)
    assert seen == 2 * looks
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
