"""Training a student on stored soft labels; `fit` is the loop, which the teacher's training shares."""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat

import numpy as np
import torch

import cache
from cache import Plane, Store, UserError
from kernels import ccd_loss
from pipeline import checkpoint, labels, models, order, views
from pipeline import device as devices
from pipeline import policy as policies
from pipeline.config import Training, TrainStudent
from pipeline.device import Normalise
from pipeline.evaluate import evaluate, shown
from pipeline.index import Index
from pipeline.labels import Labels
from pipeline.loader import Batch, Request, load
from pipeline.metrics import Log, Means
from pipeline.policy import Policy
from pipeline.report import progress, summary
from pipeline.skipped import Skipped

Objective = Callable[[torch.Tensor, Batch], torch.Tensor]
"""Logits f32 (views, B, C) and their batch -> scalar loss."""


def run(config: TrainStudent) -> dict:
    """Train a student; returns the last log record. Raises UserError if store, data and options disagree."""
    index = devices.open_data(config, config.data, "train")
    store = cache.open(config.store)
    policy, decoder = _check(config, index, store)
    student = models.create(config.student, index.classes, seed=config.seed)

    def objectives(first_epoch: int) -> Iterator[Objective]:
        if config.loss == "ce":
            yield from repeat(cross_entropy)
        numbers = (epoch % store.manifest.views for epoch in range(first_epoch, config.epochs))
        device = devices.pick(config)
        for epoch, found in enumerate(labels.epochs(store, numbers, device, config.plane, config.out), first_epoch):
            yield partial(_checked, PixelCheck(found.plane, index, epoch, config.check_share), config, found)

    return fit(
        config,
        index,
        policy,
        student,
        objectives,
        seed_of_views=store.manifest.seed,
        views_in_store=store.manifest.views,
        decoder=decoder,
    )


def cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over all views."""
    labels = batch.labels.to(logits.device)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))


def _checked(check: "PixelCheck", config: TrainStudent, stored: Labels, logits: torch.Tensor, batch: Batch):
    check(batch)
    return distillation(config, stored, logits, batch)


def distillation(config: TrainStudent, stored: Labels, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """CCD against the stored labels of the batch; KD is the same with w ≡ 1. Samples without labels do not count."""
    device, rows, target = logits.device, batch.rows, batch.labels
    weight = stored.plane.weight[rows]
    if np.isnan(weight).any():
        labelled = np.flatnonzero(~np.isnan(weight))
        if not len(labelled):
            return logits.sum() * 0.0
        rows, weight = rows[labelled], weight[labelled]
        logits, target = logits[:, labelled], target[labelled]
    teacher = stored.logits(rows)
    w = torch.from_numpy(weight if config.loss == "ccd" else np.ones_like(weight)).to(device)
    return ccd_loss(
        logits[0],
        logits[1],
        teacher[:, 0],
        teacher[:, 1],
        target.to(device),
        temperature=config.temperature,
        alpha=config.alpha,
        kd_weight=config.kd_weight,
        weight=w,
    )


class PixelCheck:
    """Does the student see what the teacher saw? Called with each batch of an epoch, it compares pixel digests.

    All of the first batch's (what changes every picture, such as another decoder, stops the run at once) and then
    those of a random `share` of the rows, drawn anew for each `seed`.
    """

    def __init__(self, plane: Plane, index: Index, seed: int, share: float):
        self.plane, self.index = plane, index
        self._chosen = np.random.default_rng(seed).random(len(plane.weight), np.float32) < share
        self._first = True

    def __call__(self, batch: Batch) -> None:
        """Raise UserError unless the chosen pixels have the digests that the teacher pass stored."""
        chosen = (self._chosen[batch.rows] | self._first) & ~np.isnan(self.plane.weight[batch.rows])
        self._first = False
        if not chosen.any():
            return
        rows, at = batch.rows[chosen], np.flatnonzero(chosen)
        pairs = batch.images[:, at].cpu().numpy().swapaxes(0, 1)
        found = np.array([[zlib.crc32(view) for view in pair] for pair in pairs], np.uint32).reshape(-1, 2)
        if len(differ := np.flatnonzero((found != self.plane.digest[rows]).any(axis=-1))):
            key = self.index.key(int(rows[differ[0]]))
            raise UserError(
                "the student would not see the pixels that the teacher saw",
                found=f"{len(differ)} of {len(found)} pairs of view {self.plane.view} differ, the first of key {key}",
                expected="the digests in the store",
                fix="decode with the DALI version and on the kind of device of the teacher pass, or run it again",
            )


def fit(
    config: Training,
    index: Index,
    policy: Policy,
    network: models.Network,
    objectives: Callable[[int], Iterator[Objective]],
    *,
    seed_of_views: int,
    views_in_store: int | None = None,
    decoder: str | None = None,
    pairs: bool = True,
) -> dict:
    """The loop: data in the order of (seed, epoch), one objective per epoch, a checkpoint to resume from.

    Epoch e trains on view e mod `views_in_store` (None: on a view of its own). Returns the last log record.
    """
    checkpoint.open_run(config)
    device = devices.pick(config)
    torch.manual_seed(config.seed)  # dropout and its like; views and order have their own source
    module = devices.place(network.module, device)
    models.probe(network, policy.base.size)
    normalise = Normalise(network.mean or policy.mean, network.std or policy.std, device)
    optimizer = torch.optim.SGD(
        module.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    rows = index.good
    steps = order.steps_per_epoch(len(rows), config.batch_size)
    val = devices.open_data(config, config.val, "val") if config.val else None
    if val and val.classes != index.classes:
        raise UserError("--val has other classes", found=val.classes, expected=index.classes, fix="check --val")

    epoch, step, means = 0, 0, Means()
    if config.resume and (state := checkpoint.load(config.out)):
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        epoch, step, means = state["epoch"], state["step"], Means(state["means"])
    log = Log(config.out, epoch)

    def save(epoch: int, step: int) -> None:
        checkpoint.save(
            config.out,
            {
                "model": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "epoch": epoch,
                "step": step,
                "means": means.sums,
            },
        )

    def plan() -> Iterator[Request]:
        shards, window = index.records["shard"][rows], config.shuffle_window
        for at, part in order.steps(
            config.seed, rows, config.batch_size, config.epochs, (epoch, step), shards=shards, window=window
        ):
            view = at % views_in_store if views_in_store else at
            yield part, views.of(index.records[part], seed_of_views, view, policy)

    skipped = Skipped(index, config.max_bad)
    batches = load(
        index,
        plan(),
        policy,
        threads=devices.threads(config),
        decoder=decoder or devices.decoder("auto", device),
        pairs=pairs,
        skipped=skipped,
    )
    started = time.perf_counter()
    with progress("train", config.epochs * steps, "steps", epoch * steps + step) as advance:
        for now, objective in zip(range(epoch, config.epochs), objectives(epoch), strict=False):
            module.train()
            while step < steps:
                waited = -time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter()
                step += 1
                advance(1)
                if not len(batch.rows):  # all of it was skipped
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, now + (step - 1) / steps)
                with devices.autocast(device, config.precision):
                    logits = module(normalise(batch.images.flatten(0, 1)))
                logits = logits.float().unflatten(0, batch.images.shape[:2])
                loss = objective(logits, batch)
                optimizer.zero_grad()
                loss.backward()
                if config.clip:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip)
                optimizer.step()
                means.add(len(batch.rows), {"loss": loss.detach(), "wait_s": waited / len(batch.rows)})
                if step % config.checkpoint_steps == 0 and step < steps:
                    save(now, step)
            record = {"epoch": now, "lr": optimizer.param_groups[0]["lr"], **means.result()}
            if val and (now + 1 == config.epochs or (config.eval_epochs and (now + 1) % config.eval_epochs == 0)):
                record |= {"val": evaluate(module, normalise, val, policy, config.batch_size, config, config.precision)}
            log.write(record | {"seconds": time.perf_counter() - started})
            step, means = 0, Means()
            save(now + 1, 0)
    models.save_weights(module, config.out / "model.safetensors")
    last = log.records[-1]
    checkpoint.write_atomically(config.out / "summary.json", json.dumps(last, indent=1).encode())
    accuracy = shown(last["val"]) if "val" in last else {}
    summary(
        "training",
        {
            "run": config.out,
            "loss": f"{last['loss']:.4f}",
            **accuracy,
            "skipped samples": len(skipped.causes),
            "weights": "model.safetensors",
        },
    )
    return last


def learning_rate(config: Training, epoch: float) -> float:
    """The rate at a point of the run, in epochs; a pure function, so that resuming needs no scheduler state."""
    warm = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    if config.schedule == "cosine":
        return config.lr * warm * 0.5 * (1 + float(np.cos(np.pi * epoch / config.epochs)))
    return config.lr * warm * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)


def _check(config: TrainStudent, index: Index, store: Store) -> tuple[Policy, str]:
    """The store's policy and who must decode, after checking all that the options know against the manifest."""
    manifest = store.manifest
    expected: dict = {"dataset": index.fingerprint, "samples": len(index), "classes": index.classes}
    if config.policy:
        wanted = policies.load(config.policy).to_config()
        expected |= {"base": wanted.pop("base"), "policy": wanted}
    if config.teacher:
        teacher = models.create(config.teacher, index.classes)
        expected["teacher"] = teacher.name
        if "@" in config.teacher:
            expected["teacher_weights"] = teacher.fingerprint
    cache.check(manifest, **expected)
    if config.loss != "ce" and (missing := store.missing_blocks()):
        raise UserError(
            f"store {config.store} has missing blocks",
            found=f"{len(missing)} missing",
            expected="all committed",
            fix="run precompute-teacher again, it resumes",
        )
    return labels.replayed(manifest)
