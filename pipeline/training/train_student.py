"""Training a student on stored soft labels, or beside its teacher: what it learns from; `training.loop` is the loop."""

import hashlib
import json
from collections.abc import Callable, Iterator

import cache
from cache import Store, UserError
from pipeline.config import TrainStudent
from pipeline.data.index import Index, open_data
from pipeline.labels import epochs as labels
from pipeline.networks import models
from pipeline.networks.teacher import Teacher
from pipeline.system import device as devices
from pipeline.training.checks import PixelCheck, TeacherCheck
from pipeline.training.loop import Job, fit
from pipeline.training.objectives import CrossEntropy, Distillation, Objective, choice
from pipeline.views import policy as policies
from pipeline.views.batch import Batch
from pipeline.views.policy import Policy

_UNKNOWN_KL = 0.05  # what a code may add where a store does not say


def run(config: TrainStudent) -> dict:
    """Train a student; returns the last log record. Raises UserError if store, data and options disagree."""
    index = open_data(config, config.data, "train")
    store = cache.open(config.store) if config.store else None
    policy, decoder = _check(config, index, store) if store else (policies.load(config.policy or "imagenet"), None)
    if not store and config.loss != "ce" and not config.live_teacher:
        raise UserError(
            f"--loss {config.loss} needs soft labels", found="neither", expected="--store or --live-teacher"
        )
    if config.live_teacher and config.loss == "ccd-mean":
        raise UserError("--loss ccd-mean needs the stored w of all samples", fix="leave --live-teacher out")
    student = models.create(config.student, index.class_list, seed=config.seed)
    spec = None if config.loss == "ce" else config.live_teacher or config.check_teacher
    teacher = _teacher(config, spec, index, policy) if spec else None
    about = {"store": config.store, "teacher": config.live_teacher or (store.manifest.teacher if store else None)}
    return fit(
        Job(
            config,
            index,
            policy,
            student,
            lambda first: _objectives(config, index, store, teacher, first),
            seed_of_views=store.manifest.seed if store else config.seed,
            views=store.manifest.views if store else None,
            decoder=decoder,
            labels=_identity(store) if store else {},
            about=about,
        )
    )


def _identity(store: Store) -> dict:
    """Of its labels; it may grow while it is learned from."""
    fields = store.manifest.identity()
    codec = hashlib.sha256(json.dumps(fields["codec"], sort_keys=True).encode()).hexdigest()
    return {name: fields[name] for name in ("teacher", "teacher_weights", "seed", "decoder")} | {"codec": codec}


def _objectives(
    config: TrainStudent, index: Index, store: Store | None, teacher: Teacher | None, first: int
) -> Iterator[Objective]:
    """One per epoch from the epoch `first` on; the `teacher` is live, or checks."""
    epochs = range(first, config.epochs)
    device = devices.pick(config)
    if config.loss == "ce":
        for epoch in epochs:
            yield CrossEntropy(config.label_smoothing, choice(config.augmented_fraction, config.seed, epoch))
        return
    if config.live_teacher:
        for epoch in epochs:
            yield Distillation(config, epoch, teacher=teacher)
        return
    assert store
    numbers = (epoch % store.manifest.views for epoch in epochs)
    for epoch, found in zip(epochs, labels.epochs(store, numbers, device, config.plane, config.out), strict=True):
        checks: list[Callable[[Batch], None]] = [PixelCheck(found.plane, index, epoch, config.check_share)]
        if teacher:
            expected = store.manifest.fidelity.get("kl", {}).get("4", _UNKNOWN_KL)
            checks.append(TeacherCheck(found, teacher, config.check_steps, expected))
        yield Distillation(config, epoch, labels=found, checks=tuple(checks))


def _teacher(config: TrainStudent, spec: str, index: Index, policy: Policy) -> Teacher:
    device = devices.pick(config)
    return Teacher(models.trained(spec, index.class_list), policy, device, devices.arithmetic(config.precision, device))


def _check(config: TrainStudent, index: Index, store: Store) -> tuple[Policy, str]:
    """The store's policy and who must decode, after checking all that the options know against the manifest."""
    manifest = store.manifest
    expected: dict = {"dataset": index.fingerprint, "samples": len(index), "classes": index.classes}
    if config.policy:
        wanted = policies.load(config.policy).to_config()
        expected |= {"base": wanted.pop("base"), "policy": wanted}
    for spec in (config.teacher, config.check_teacher):
        if spec:
            teacher = models.create(spec, index.class_list)
            expected["teacher"] = teacher.name
            if "@" in spec:
                expected["teacher_weights"] = teacher.fingerprint
    cache.check(manifest, **expected)
    if config.loss != "ce" and not config.live_teacher and (missing := store.missing_blocks()):
        raise UserError(
            f"store {config.store} has missing blocks",
            found=f"{len(missing)} missing",
            expected="all committed",
            fix="run precompute-teacher again, it resumes",
        )
    return labels.replayed(manifest)
