"""A network that learns: with its optimiser, by one step at a time."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.config import Training
from pipeline.networks.features import Both
from pipeline.networks.placed import Placed
from pipeline.system import device as devices
from pipeline.system import ranks
from pipeline.training import batch_norm
from pipeline.training.meter import Clock
from pipeline.training.momenta import Momenta
from pipeline.training.objectives import Objective, Seen, entropy
from pipeline.views.batch import Batch


@dataclass
class Trainee:
    """A network on its way: all that a checkpoint holds, but for where it is."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    average: AveragedModel | None
    beside: torch.nn.Module | None = None
    """What the method keeps beside the network."""
    momenta: Momenta | None = None
    """For a method that takes two gradients apart."""

    def state(self) -> dict:
        beside = {"beside": self.beside.state_dict()} if self.beside else {}
        beside |= {"velocity": self.momenta.velocity} if self.momenta else {}
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            **beside,
        }

    def restore(self, state: dict) -> None:
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
        if self.beside:
            self.beside.load_state_dict(state["beside"])
        if self.momenta:
            for velocity, saved in zip(self.momenta.velocity, state["velocity"], strict=True):
                velocity.copy_(saved)

    def pace(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def best(self) -> torch.nn.Module:
        """What is evaluated and exported."""
        return self.average.module if self.average else self.module


def prepare(
    config: Training, network: Placed, beside: torch.nn.Module | None = None, apart: float = 0.0
) -> tuple[Trainee, Placed]:
    """The network, and what learns beside it, with their optimiser, and what to call with images."""
    module, device = network.module, network.device
    many = ranks.world() > 1
    if many and config.sync_bn:
        module = batch_norm.synchronise(module, device)
    beside = beside.to(device) if beside else None
    optimizer = torch.optim.SGD(
        [*module.parameters(), *(beside.parameters() if beside else ())],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=network.precision == "fp16")  # pyright: ignore
    average = None
    if config.ema:
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    wrapped: Any = module
    if many:
        wrapped = DistributedDataParallel(
            module, [device.index] if device.type == "cuda" else None, broadcast_buffers=not config.sync_bn
        )
    if config.compile:
        wrapped = torch.compile(wrapped)
    momenta = Momenta(module, optimizer, config, apart) if apart else None
    return Trainee(module, optimizer, scaler, average, beside, momenta), replace(network, module=wrapped)


def learning_rate(config: Training, epoch: float) -> float:
    """The rate at a point of the run, in epochs; a pure function, so that resuming needs no scheduler state."""
    warm = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    if config.schedule == "cosine":
        return config.lr * warm * 0.5 * (1 + float(np.cos(np.pi * epoch / config.epochs)))
    return config.lr * warm * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)


def take_step(
    config: Training,
    trainee: Trainee,
    forward: Placed,
    objective: Objective,
    batch: Batch,
    logged: bool,
    clock: Clock,
) -> list[tuple[float, dict[str, Any]]]:
    """One optimiser step; if it is `logged` (weight, values) for the means over the run, else its gradient alone."""
    device, scaler = forward.device, trainee.scaler
    chosen = objective.wants(batch)
    views_here = int(chosen.sum())
    count: Tensor | float = float(views_here)
    if ranks.world() > 1:
        count = ranks.total(torch.full((), float(views_here), device=device)) / ranks.world()
    trainee.optimizer.zero_grad()
    loss_sum: Tensor | float = 0.0
    found: list[tuple[float, dict[str, Any]]] = []
    many = config.accumulate
    if many > 1:  # BatchNorm needs two views in a part; from the mean of all processes, as they have to agree
        many = max(min(many, int(count) // 4), 1)
    parts = np.array_split(np.arange(len(batch.rows)), many)
    for number, part in enumerate(parts):
        piece = batch if len(parts) == 1 else batch.part(part)
        mine = chosen[:, part]
        images = piece.images.flatten(0, 1)
        if not mine.all():
            images = images[devices.put(np.flatnonzero(mine), images.device)]
        module, last = forward.module, number + 1 == len(parts)
        with nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync():
            if (more := objective.begin(piece, mine)) is not None:
                images = torch.cat([devices.put(images, more.device), more])
            answer = forward(images)
            logits, features = answer if isinstance(answer, Both) else (answer, None)
            clock.lap("forward")
            seen = Seen(piece, mine, count, _scale(scaler), logged, features)
            loss, terms = objective(logits, seen)
            clock.lap("loss")
            if trainee.momenta and loss.ndim:  # a rank without views has a scalar, 0
                trainee.momenta.backward(loss)
                loss = loss.sum()
            else:
                scaler.scale(loss).backward()
            clock.lap("backward")
        loss_sum = loss_sum + loss.detach()
        if logged and len(logits):
            found.append((float(mine.sum()), terms | {"student_entropy": entropy(logits)}))
    if trainee.beside and ranks.world() > 1:  # DDP sees to the network's alone
        for weights in trainee.beside.parameters():
            own = torch.zeros_like(weights) if weights.grad is None else weights.grad
            weights.grad = ranks.total(own) / ranks.world()
    if config.clip:
        scaler.unscale_(trainee.optimizer)
        torch.nn.utils.clip_grad_norm_(trainee.module.parameters(), config.clip)
    scaler.step(trainee.optimizer)
    scaler.update()
    if trainee.momenta:
        trainee.momenta.step(trainee.optimizer.param_groups[0]["lr"])
    if trainee.average:
        trainee.average.update_parameters(trainee.module)
    clock.lap("optimiser")
    if logged and views_here:  # the loss is the sum over them divided by `count`
        found.append((float(views_here), {"loss": loss_sum * (count / views_here)}))
    return found


def sound(module: torch.nn.Module) -> bool:
    """Whether weights and statistics are finite."""
    return bool(torch.stack([weights.isfinite().all() for weights in module.state_dict().values()]).all())


def _scale(scaler) -> Tensor | None:
    return scaler._scale if scaler.is_enabled() else None
