"""The training loop that students and teachers share: one process or many, killed or not, the same batches."""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cache import UserError
from pipeline.config import Training
from pipeline.data import order
from pipeline.data.index import Index, matched, open_data
from pipeline.networks import models
from pipeline.networks.placed import Placed, placed
from pipeline.system import device as devices
from pipeline.system import ranks, signals
from pipeline.system.files import write_atomically
from pipeline.system.terminal import duration, progress, summary
from pipeline.training import batch_norm, checkpoint
from pipeline.training import record as run_record
from pipeline.training.evaluate import evaluate, shown
from pipeline.training.metrics import Log, Means, means
from pipeline.training.objectives import Objective, Seen, entropy
from pipeline.views import plan
from pipeline.views.batch import Batch
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy

_SETTLING = 8  # steps that a dry run does not time


@dataclass
class Trainee:
    """A network on its way: all that a checkpoint holds, but for where it is."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    average: AveragedModel | None

    def state(self) -> dict:
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
        }

    def restore(self, state: dict) -> None:
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])

    @property
    def best(self) -> torch.nn.Module:
        """What is evaluated and exported."""
        return self.average.module if self.average else self.module


@dataclass
class Clock:
    """Seconds of the phases of a step, where the device is waited for to know them."""

    device: torch.device
    on: bool
    times: dict[str, float] = field(default_factory=dict)
    _at: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        if self.on:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            self.times[name] = self.times.get(name, 0.0) + now - self._at
            self._at = now


@dataclass(frozen=True)
class Job:
    """What is trained on what."""

    config: Training
    index: Index
    policy: Policy
    network: models.Network
    objectives: Callable[[int], Iterator[Objective]]
    """First epoch -> one objective per epoch from there on."""
    seed_of_views: int
    views: int | None = None
    """Epoch e trains on view e mod `views`; None: on a view of its own."""
    decoder: str | None = None
    """Who decodes; None: as the device can."""
    pairs: bool = True
    """Whether there are augmented views."""
    labels: dict = field(default_factory=dict)
    """What stored labels are, JSON-safe."""
    about: dict = field(default_factory=dict)
    """Facts for the run's report."""


def fit(job: Job) -> dict:
    """Data in the order of (seed, epoch), a checkpoint to resume from, and at the end weights and a report.

    Returns the last log record, or with `dry_run` what was timed. Ends the process after SIGINT or SIGTERM, once the
    state is saved.
    """
    device = devices.pick(job.config)
    with ExitStack() as stack:
        stack.enter_context(ranks.group(device))
        asked = stack.enter_context(signals.requests())
        return _fit(job, device, asked, stack)


def _fit(job: Job, device: torch.device, asked: signals.Requests, stack: ExitStack) -> dict:
    config, index, policy = job.config, job.index, job.policy
    first, many = ranks.rank() == 0, ranks.world() > 1
    network = placed(job.network, device, devices.arithmetic(config.precision, device), policy)
    rows = order.few_shot(index.good, index.records["label"][index.good], config.few_shot)
    steps = order.steps_per_epoch(len(rows), config.batch_size)
    val = open_data(config, config.val, "val") if config.val else None
    if val:
        val = matched(val, config, index.class_list, "--val", "--data")
    if config.nesterov and not config.momentum:
        raise UserError("--nesterov without momentum", found="--momentum 0", fix="give a momentum or --no-nesterov")
    run_record.check(config)
    if not config.dry_run:
        if first:
            sources = {"dataset": index.fingerprint, "policy": policy.to_config(), "labels": job.labels}
            checkpoint.open_run(config, sources)
        ranks.after_first("run")

    trainee, forward = prepare(config, network)
    epoch, step, sums = 0, 0, Means()
    resume = config.resume or ranks.restarted()
    if resume and not config.dry_run and (state := checkpoint.load(config.out)):
        trainee.restore(state)
        epoch, step = state["epoch"], state["step"]
        sums = Means(state["means"] if first else None)  # they were of all processes
    log = Log(config.out, epoch, step, write=first and not config.dry_run)
    if not config.dry_run:
        facts = run_record.describe(device, job.network, job.about)
        writers = stack.enter_context(run_record.Writers(config, first, facts))
        saver = checkpoint.Saver(config.out)
        stack.callback(saver.close)

    def save(epoch: int, step: int) -> None:
        _expect_sound(trainee.module, f"at step {step} of epoch {epoch}")
        found = sums.total()
        if first:
            saver(trainee.state() | {"epoch": epoch, "step": step, "means": found})

    start = epoch, step  # the loader may ask for the plan when this function has moved on

    def parts() -> Iterator[plan.Part]:
        for at, part in order.steps(
            config.seed,
            rows,
            config.batch_size,
            config.epochs,
            start,
            shards=index.records["shard"][rows],
            window=config.shuffle_window,
            rank=ranks.rank(),
            world=ranks.world(),
        ):
            yield at % job.views if job.views else at, part

    loader = Loader(
        index,
        policy,
        threads=devices.threads(config),
        decoder=job.decoder or devices.decoder("auto", device),
        max_bad=config.max_bad,
    )
    batches = loader.batches(plan.requests(index, policy, job.seed_of_views, parts()), pairs=job.pairs)
    stack.callback(batches.close)
    started = time.perf_counter()
    recent, since, images, waits = Means(), started, 0, 0.0
    timed: list[float] = []
    with progress("train", config.epochs * steps, "steps", epoch * steps + step, show=first) as advance:
        for now, objective in zip(range(epoch, config.epochs), job.objectives(epoch), strict=False):
            trainee.module.train()
            while step < steps:
                # What chance a network has, dropout, is a function of the place in the run.
                torch.manual_seed(zlib.crc32(f"{config.seed} {now} {step} {ranks.rank()}".encode()))
                logged = (step + 1) % config.log_steps == 0 or step + 1 == steps
                clock = Clock(device, logged)
                begun = time.perf_counter()
                batch = next(batches)
                waits += time.perf_counter() - begun
                clock.lap("wait")
                step += 1
                rate = learning_rate(config, now + (step - 1) / steps)
                for group in trainee.optimizer.param_groups:
                    group["lr"] = rate
                if many or len(batch.rows):  # else all of it was skipped
                    found = _step(config, trainee, forward, objective, batch, logged, clock)
                    for means_of in (sums, recent):
                        for weight, values in found:
                            means_of.add(weight, values)
                images += len(batch.rows)
                timed.append(time.perf_counter() - begun)
                if config.dry_run:
                    if step + now * steps >= min(_SETTLING + 2, config.epochs * steps):
                        return _estimate(config, len(rows), steps, timed, device)
                    continue
                if logged:
                    split = {f"times.{name}": seconds for name, seconds in clock.times.items()}
                    sums.add(1.0, split)
                    elapsed = time.perf_counter() - since
                    recent.add(1.0, {"images_per_s": images * ranks.world() / elapsed, "wait_share": waits / elapsed})
                    sums.add(1.0, {"wait_share": waits / elapsed})
                    record = means(recent.total())
                    if not np.isfinite(record.get("loss", 0.0)):  # in float16 a step may overflow and be left out
                        _expect_sound(trainee.module, f"at step {step} of epoch {now}, a loss of {record['loss']}")
                    log.write({"epoch": now, "step": step, "steps": steps, "lr": rate, **record})
                    writers.step(now * steps + step, record | {"lr": rate})
                    advance(0, _line(record))
                    recent, since, images, waits = Means(), time.perf_counter(), 0, 0.0
                advance(1)
                signal = asked.now()
                if signal or (step % config.checkpoint_steps == 0 and step < steps):
                    save(now, step)
                if signal:
                    saver.wait()
                    signals.leave(signal, f"after step {step} of epoch {now}")
            if config.dry_run:
                step = 0
                continue
            record = {"epoch": now, "lr": trainee.optimizer.param_groups[0]["lr"], **_nested(means(sums.total()))}
            if val and (now + 1 == config.epochs or (config.eval_epochs and (now + 1) % config.eval_epochs == 0)):
                best = replace(network, module=trainee.best)
                record |= {"val": evaluate(best, val, policy, config.batch_size, config)}
            record["seconds"] = time.perf_counter() - started
            log.write(record)
            writers.epoch(now, (now + 1) * steps, record)
            step, sums = 0, Means()
            save(now + 1, 0)
            since, images, waits = time.perf_counter(), 0, 0.0
    saver.wait()
    last = log.records[-1]
    if first:
        replace(network, module=trainee.best).save(config.out / "model.safetensors")
        write_atomically(config.out / "summary.json", json.dumps(last, indent=1).encode())
        page = writers.close()
        summary(
            "training",
            {
                "run": config.out,
                "loss": f"{last['loss']:.4f}",
                **(shown(last["val"]) if "val" in last else {}),
                "skipped samples": len(loader.skipped.causes),
                "weights": "model.safetensors",
                "report": page,
            },
        )
    return last


def _step(
    config: Training,
    trainee: Trainee,
    forward: Placed,
    objective: Objective,
    batch: Batch,
    logged: bool,
    clock: Clock,
) -> list[tuple[float, dict[str, Any]]]:
    """One optimiser step; (weight, values) for the means over the run."""
    device, scaler = forward.device, trainee.scaler
    chosen = objective.wants(batch)
    views_here = int(chosen.sum())
    count: Tensor | float = float(views_here)
    if ranks.world() > 1:
        count = ranks.total(torch.tensor(float(views_here), device=device)) / ranks.world()
    trainee.optimizer.zero_grad()
    loss_sum: Tensor | float = 0.0
    found: list[tuple[float, dict[str, Any]]] = []
    parts = np.array_split(np.arange(len(batch.rows)), config.accumulate)
    for number, part in enumerate(parts):
        piece = batch if len(parts) == 1 else batch.part(part)
        mine = chosen[:, part]
        images = piece.images.flatten(0, 1)
        if not mine.all():
            images = images[torch.from_numpy(mine.reshape(-1)).to(images.device)]
        module, last = forward.module, number + 1 == len(parts)
        with nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync():
            logits = forward(images)
            clock.lap("forward")
            seen = Seen(piece, mine, count, _scale(scaler), parts=logged)
            loss, terms = objective(logits, seen)
            clock.lap("loss")
            scaler.scale(loss).backward()
            clock.lap("backward")
        loss_sum = loss_sum + loss.detach()
        if logged and len(logits):
            found.append((float(mine.sum()), terms | {"student_entropy": entropy(logits)}))
    if config.clip:
        scaler.unscale_(trainee.optimizer)
        torch.nn.utils.clip_grad_norm_(trainee.module.parameters(), config.clip)
    scaler.step(trainee.optimizer)
    scaler.update()
    if trainee.average:
        trainee.average.update_parameters(trainee.module)
    clock.lap("optimiser")
    if views_here:  # the loss is the sum over them divided by `count`
        found.append((float(views_here), {"loss": loss_sum * (count / views_here)}))
    return found


def _expect_sound(module: torch.nn.Module, where: str) -> None:
    """Raise UserError unless weights and statistics are finite: they will not be again, and are not to be saved."""
    if not torch.stack([weights.isfinite().all() for weights in module.state_dict().values()]).all():
        raise UserError(
            "training diverged: weights are not finite",
            found=where,
            fix="start anew with a lower --lr, or with --warmup-epochs or --clip; the checkpoint in OUT is older",
        )


def _scale(scaler) -> Tensor | None:
    return scaler._scale if scaler.is_enabled() else None


def prepare(config: Training, network: Placed) -> tuple[Trainee, Placed]:
    """The network with its optimiser, and what to call with images."""
    module, device = network.module, network.device
    many = ranks.world() > 1
    if many and config.sync_bn:
        module = batch_norm.synchronise(module, device)
    optimizer = torch.optim.SGD(
        module.parameters(),
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
    return Trainee(module, optimizer, scaler, average), replace(network, module=wrapped)


def learning_rate(config: Training, epoch: float) -> float:
    """The rate at a point of the run, in epochs; a pure function, so that resuming needs no scheduler state."""
    warm = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    if config.schedule == "cosine":
        return config.lr * warm * 0.5 * (1 + float(np.cos(np.pi * epoch / config.epochs)))
    return config.lr * warm * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)


def _nested(found: dict[str, float]) -> dict:
    times = {name.removeprefix("times."): value for name, value in found.items() if name.startswith("times.")}
    return {name: value for name, value in found.items() if not name.startswith("times.")} | {"times": times}


def _line(record: dict[str, float]) -> str:
    """What stands below the bar."""
    shown = {"loss": ".3f", "ce": ".3f", "kl_o": ".3f", "kl_a": ".3f", "w": ".2f", "agreement": ".0%"}
    parts = [f"{name} {record[name]:{form}}" for name, form in shown.items() if name in record]
    return " ".join([*parts, f"{record['images_per_s']:,.0f} img/s", f"wait {record['wait_share']:.0%}"])


def _estimate(config: Training, samples: int, steps: int, timed: list[float], device: torch.device) -> dict:
    seconds = float(np.median(timed[_SETTLING:] or timed))
    training = seconds * steps * config.epochs
    summary(
        "dry run: nothing was written",
        {
            "samples, steps per epoch, epochs": f"{samples:,}, {steps:,}, {config.epochs}",
            "step": f"{1e3 * seconds:.1f} ms on {device}, {ranks.world()} process(es)",
            "training": f"{duration(training)} without evaluation",
        },
    )
    return {"step_s": seconds, "hours": training / 3600}
