"""The training loop that students and teachers share: one process or many, killed or not, the same batches."""

import json
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from cache import UserError
from pipeline.config import Training
from pipeline.data.index import Index, matched, open_data, require_labels
from pipeline.labels.epochs import Labels, labels_of
from pipeline.networks import models
from pipeline.networks.placed import Placed, placed
from pipeline.replay import Replay
from pipeline.system import device as devices
from pipeline.system import ranks, signals
from pipeline.system.files import write_atomically
from pipeline.system.terminal import progress, summary
from pipeline.training import checkpoint, dry_run
from pipeline.training import record as run_record
from pipeline.training.evaluate import evaluate, shown
from pipeline.training.meter import Clock, Meter
from pipeline.training.metrics import Log
from pipeline.training.objectives import Objective
from pipeline.training.trainee import learning_rate, prepare, sound, take_step


@dataclass(frozen=True)
class Job:
    """What is trained on what."""

    config: Training
    replay: Replay
    network: models.Network
    objective: Callable[[int, Labels | None], Objective]
    """What is minimised in an epoch, given its labels."""
    beside: torch.nn.Module | None = None
    """What that has of its own from epoch to epoch."""
    apart: float = 0.0
    """Of the momenta of two losses, if it takes them apart."""
    about: dict = field(default_factory=dict)
    """Facts for the run's report."""


def fit(job: Job) -> dict:
    """Data in the order of (seed, epoch), a checkpoint to resume from, and at the end weights and a report.

    Returns the last log record, or with `dry_run` what was timed. Ends the process after SIGINT or SIGTERM, once the
    state is saved.
    """
    config, replay = job.config, job.replay
    device = devices.pick(config)
    with ExitStack() as stack:
        stack.enter_context(ranks.group(device))
        network = placed(job.network, device, devices.arithmetic(config.precision, device), replay.policy)
        val = _checked(config, replay.index)
        replay.least = _least(config, network, replay)
        stack.enter_context(replay)
        if config.dry_run:
            return dry_run.run(config, replay, job.objective, *prepare(config, network, job.beside, job.apart))
        run = _Run(job, network, stack)
        with (
            progress("train", config.epochs * run.steps, "steps", run.done, show=run.first) as advance,
            signals.requests() as asked,  # from here on there is a state to save
        ):
            for epoch in range(run.epoch, config.epochs):
                run.trainee.module.train()
                for step in range(run.step, run.steps):
                    advance(0, run.take(epoch, step))
                    advance(1)
                    signal = asked.now()
                    if signal or run.saver.due(step + 1, run.steps):
                        run.save(epoch, step + 1)
                    if signal:
                        run.saver.wait()
                        signals.leave(signal, f"after step {step + 1} of epoch {epoch}")
                run.close_epoch(epoch, val)
                if signal := asked.now(agree=True):
                    run.saver.wait()
                    signals.leave(signal, f"after epoch {epoch}")
        return run.finish()


def _checked(config: Training, index: Index) -> Index | None:
    """The validation set. Raises UserError if something does not fit, before the run's folder is made."""
    val = open_data(config, config.val, "val") if config.val else None
    if val:
        require_labels(val, "--val")
        val = matched(val, config, index.class_list, "--val", "--data")
    if config.nesterov and not config.momentum:
        raise UserError("--nesterov without momentum", found="--momentum 0", fix="give a momentum or --no-nesterov")
    run_record.check(config)
    return val


def _least(config: Training, network: Placed, replay: Replay) -> int:
    """Samples that a step has at the least. Raises UserError if one cannot have them.

    BatchNorm has no variance of a single value, so a step needs two views where it meets one value of each; where
    processes do not share their statistics, each of them does.
    """
    size = replay.policy.base.size
    views = 2 if replay.pairs and getattr(config, "augmented_fraction", 0.5) == 0.5 else 1
    least = -(-models.least_views(network.network, size) // views) * (1 if config.sync_bn else ranks.world())
    have = min(config.batch_size, len(replay.rows))
    if have < least:
        whose = "--batch-size" if have == config.batch_size else "the data set"
        raise UserError(
            f"{whose} is too small for the BatchNorm of {network.network.name} at {size} x {size} pixels",
            found=f"{have} {'image' if have == 1 else 'images'} a step",
            expected=f"at least {least}",
            fix="take more images, or a network that does not shrink them to one pixel",
        )
    return least


class _Run:
    """A run under way: what it trains, and everything that it leaves behind."""

    def __init__(self, job: Job, network: Placed, stack: ExitStack):
        """Opens the run's folder, or goes on from its last checkpoint."""
        config, replay = job.config, job.replay
        self.job, self.config, self.replay, self.network = job, config, replay, network
        self.first, self.steps = ranks.rank() == 0, replay.steps_per_epoch
        if self.first:
            sources = {
                "dataset": replay.index.fingerprint,
                "policy": replay.policy.to_config(),
                "labels": labels_of(replay.store),
                **({"others": [labels_of(store) for store in replay.others]} if replay.others else {}),
            }
            checkpoint.open_run(config, sources)
        ranks.after_first("run")
        self.trainee, self.forward = prepare(config, network, job.beside, job.apart)
        self.epoch, self.step, sums = 0, 0, None
        if (config.resume or ranks.restarted()) and (state := checkpoint.load(config.out)):
            self.trainee.restore(state)
            self.epoch, self.step = state["epoch"], state["step"]
            sums = state["means"] if self.first else None  # they were of all processes
        replay.position = self.epoch, self.step
        self.log = Log(config.out, self.epoch, self.step, write=self.first)
        facts = run_record.describe(network, job.about)
        self.writers = stack.enter_context(run_record.Writers(config, self.first, facts, self.log.records))
        self.saver = checkpoint.Saver(config.out, config.checkpoint_steps)
        stack.callback(self.saver.close)
        self.meter, self.started = Meter(sums), time.perf_counter()
        self._objectives: dict[int, Objective] = {}

    @property
    def done(self) -> int:
        """Steps taken before."""
        return self.epoch * self.steps + self.step

    def take(self, epoch: int, step: int) -> str:
        """One step; what to show below the bar, if it is recorded."""
        config = self.config
        seed_chance(config, epoch, step)
        logged = (step + 1) % config.log_steps == 0 or step + 1 == self.steps
        clock = Clock(self.network.device, logged)
        batch = self.replay.next()
        waited = clock.lap("wait")
        objective = self._objective(epoch, batch.stored)
        rate = learning_rate(config, epoch + step / self.steps)
        found = []
        if ranks.world() > 1 or len(batch):  # else all of it was skipped
            self.trainee.pace(rate)
            found = take_step(config, self.trainee, self.forward, objective, batch.made, logged, clock)
        self.meter.add(found, len(batch), waited)
        return self._record(epoch, step + 1, rate, clock) if logged else ""

    def _objective(self, epoch: int, stored: Labels | None) -> Objective:
        """What is minimised with these labels; with --repeat several take turns within an epoch."""
        if id(stored) not in self._objectives:
            self._objectives[id(stored)] = self.job.objective(epoch, stored)
        return self._objectives[id(stored)]

    def _record(self, epoch: int, step: int, rate: float, clock: Clock) -> str:
        record = self.meter.record(clock.times)
        if not np.isfinite(record.get("loss", 0.0)):  # in float16 a step may overflow and be left out
            self._expect_sound(f"at step {step} of epoch {epoch}, a loss of {record['loss']}")
        self.log.write({"epoch": epoch, "step": step, "steps": self.steps, "lr": rate, **record})
        self.writers.step(epoch * self.steps + step, record | {"lr": rate})
        return _line(record)

    def _expect_sound(self, where: str) -> None:
        """Weights that are not finite will not be again, and are not to be saved."""
        if not sound(self.trainee.module):
            self.saver.wait()
            left = self.config.out / "checkpoint.pt"
            goes_on = f"NAME@{left} starts from its last checkpoint" if left.exists() else "nothing was saved yet"
            raise UserError(
                "training diverged: weights are not finite",
                found=where,
                fix=f"start anew in another --out, with a lower --lr, or --warmup-epochs or --clip; {goes_on}",
            )

    def save(self, epoch: int, step: int) -> None:
        self._expect_sound(f"at step {step} of epoch {epoch}")
        found = self.meter.sums()
        if self.first:
            self.saver(self.trainee.state() | {"epoch": epoch, "step": step, "means": found})

    def close_epoch(self, epoch: int, val: Index | None) -> None:
        config = self.config
        record = {"epoch": epoch, "lr": self.trainee.optimizer.param_groups[0]["lr"], **self.meter.close_epoch()}
        if val and (epoch + 1 == config.epochs or (config.eval_epochs and (epoch + 1) % config.eval_epochs == 0)):
            best = replace(self.network, module=self.trainee.best)
            record |= {"val": evaluate(best, val, self.replay.policy, config.batch_size, config)}
        record["seconds"] = time.perf_counter() - self.started
        self.log.write(record)
        self.writers.epoch(epoch, (epoch + 1) * self.steps, record)
        self.step, self._objectives = 0, {}
        self.save(epoch + 1, 0)

    def finish(self) -> dict:
        """Weights and report; the last record."""
        self.saver.wait()
        last, out = self.log.records[-1], self.config.out
        if self.first:
            replace(self.network, module=self.trainee.best).save(out / "model.safetensors")
            write_atomically(out / "summary.json", json.dumps(last, indent=1).encode())
            rows = {"run": out, "loss": f"{last['loss']:.4f}", **(shown(last["val"]) if "val" in last else {})}
            rows |= {"skipped samples": len(self.replay.loader.skipped.causes), "weights": "model.safetensors"}
            summary("training", rows | {"report": self.writers.close()})
        return last


def seed_chance(config: Training, epoch: int, step: int) -> None:
    """What chance a network has, dropout, is a function of the place in the run."""
    torch.manual_seed(zlib.crc32(f"{config.seed} {epoch} {step} {ranks.rank()}".encode()))


def _line(record: dict[str, float]) -> str:
    """What stands below the bar."""
    shown = {"loss": ".3f", "ce": ".3f", "kl_o": ".3f", "kl_a": ".3f", "w": ".2f", "agreement": ".0%"}
    parts = [f"{name} {record[name]:{form}}" for name, form in shown.items() if name in record]
    return " ".join([*parts, f"{record['images_per_s']:,.0f} img/s", f"wait {record['wait_share']:.0%}"])
