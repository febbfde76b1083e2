"""Two momenta, of the gradients of two losses, against the recurrence in NumPy."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from support.papers import pairs

from cache import UserError
from pipeline.config import TrainStudent
from pipeline.networks import models
from pipeline.networks.placed import placed
from pipeline.training import trainee as trainees
from pipeline.training.meter import Clock
from pipeline.training.methods import loss, make
from pipeline.views import policy as policies
from pipeline.views.batch import Batch

CPU = torch.device("cpu")
CONFIG = TrainStudent(data=None, out=None, store=None, student="x", lr=0.3, weight_decay=0.01, momentum=0.8)  # type: ignore[arg-type]
POLICY = policies.load("cifar10")
SMALL = dataclasses.replace(POLICY, base=dataclasses.replace(POLICY.base, size=4, pad=0))
B, C, T = 6, 3, 4.0


class Learned:
    """The method's loss of made-up labels, on all views."""

    def __init__(self, teacher, target):
        self.method, self.teacher, self.target = make("mjkd"), teacher, target

    def wants(self, batch):
        return np.ones((2, len(batch.rows)), bool)

    def begin(self, batch, chosen):
        pass

    def __call__(self, logits, seen):
        options = {"temperature": T, "alpha": 0.5, "kd_weight": 2.0, "count": seen.count / 2}
        rows = torch.from_numpy(seen.batch.rows)
        student = logits.unflatten(0, (2, -1))
        return loss(self.method, student, self.teacher[rows], self.target[rows], **options), {}


def setup(config):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, C))
    network = placed(models.Network(module, "test", C, None, None, ""), CPU, "fp32", SMALL)
    return network, *trainees.prepare(config, network, apart=make("mjkd").apart)


@pytest.mark.parametrize("changes", [{}, {"nesterov": True}, {"accumulate": 3}], ids=str)
def test_weights_move_by_two_momenta(changes):
    """CE and 16 · KL of a linear network, their gradients by hand; the weight decay goes with the hard one."""
    _, teacher, target, _ = pairs(B, C, seed=2)
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (2, B, 4, 4, 3), np.uint8))
    batch = Batch(np.arange(B), target, pixels, None)
    network, trainee, forward = setup(dataclasses.replace(CONFIG, **changes))
    x = network.normalise(pixels.flatten(0, 1)).flatten(1).double().numpy()
    weights = [value.detach().double().numpy().copy() for value in trainee.module.parameters()]
    p = softmax(teacher.swapaxes(0, 1).flatten(0, 1).numpy() / T, axis=1)
    hot = np.eye(C)[target.repeat(2).numpy()]
    hard_v, soft_v = ([np.zeros_like(value) for value in weights] for _ in range(2))
    objective = Learned(teacher.float(), target)
    for _ in range(5):
        trainee.pace(0.3)
        found = trainees.take_step(changed(changes), trainee, forward, objective, batch, True, Clock(CPU, False))
        z = x @ weights[0].T + weights[1]
        value = -(hot * log_softmax(z, axis=1)).sum(1).mean()
        value += 16 * (p * (np.log(p) - log_softmax(z / T, axis=1))).sum(1).mean()
        assert float(found[-1][1]["loss"]) == pytest.approx(value, rel=1e-4)
        hard, soft = (softmax(z, axis=1) - hot) / len(z), 16 / T * (softmax(z / T, axis=1) - p) / len(z)
        for at, gradients in enumerate(((hard.T @ x, soft.T @ x), (hard.sum(0), soft.sum(0)))):
            one = gradients[0] + 0.01 * weights[at]
            hard_v[at] = (0.8 - 0.075) * hard_v[at] + one
            soft_v[at] = (0.8 + 0.075) * soft_v[at] + gradients[1]
            if changes.get("nesterov"):
                moved = one + (0.8 - 0.075) * hard_v[at] + gradients[1] + (0.8 + 0.075) * soft_v[at]
            else:
                moved = hard_v[at] + soft_v[at]
            weights[at] = weights[at] - 0.3 * moved
        for ours, theirs in zip(trainee.module.parameters(), weights, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-3, atol=1e-4)


def changed(changes):
    return dataclasses.replace(CONFIG, **changes)


def test_the_second_momentum_is_in_checkpoints():
    _, one, _ = setup(CONFIG)
    one.momenta.velocity[1].fill_(3.0)
    _, other, _ = setup(CONFIG)
    other.restore(one.state())
    assert torch.equal(other.momenta.velocity[1], torch.full((C,), 3.0))
    assert not {"velocity", "beside"} & trainees.prepare(CONFIG, setup(CONFIG)[0])[0].state().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 0.05}, "--momentum does not suit two momenta; found 0.05, expected at least 0.075, below 0.925"),
        ({"momentum": 0.95}, "--momentum does not suit two momenta; found 0.95"),
        ({"precision": "fp16"}, "--precision fp16 does not go with two momenta"),
        ({"clip": 1.0}, "--clip does not go with two momenta"),
        ({"compile": True}, "--compile does not go with two momenta"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        setup(changed(changes))
