"""Training a student on stored soft labels, or beside its teacher: what it learns from; `training.loop` is the loop."""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import numpy as np
import torch

import cache
from cache import Store, UserError
from pipeline.config import TrainStudent
from pipeline.data.index import Index, open_data
from pipeline.labels.agreement import look
from pipeline.labels.epochs import Labels, features_of, numbered_alike
from pipeline.labels.several import Several, require_same_views
from pipeline.networks import models
from pipeline.networks.features import Learner, tapped
from pipeline.networks.models import Network
from pipeline.networks.teacher import Teacher
from pipeline.replay import Replay
from pipeline.system import device as devices
from pipeline.system import ranks
from pipeline.training import methods, momenta
from pipeline.training.checks import TeacherCheck
from pipeline.training.imitation import Imitation
from pipeline.training.loop import Job, fit
from pipeline.training.methods import Method
from pipeline.training.methods.features import FeatureMethod
from pipeline.training.objectives import CrossEntropy, Distillation, Objective, choice
from pipeline.views import policy as policies
from pipeline.views.policy import Policy

_UNKNOWN_KL = 0.05  # what a code may add where a store does not say
_HARMFUL_KL = 0.3  # nats at the student's temperature; docs/results.md: at T = 1 0.2 cost students 0.9 points, 0.5 1.3


def run(config: TrainStudent) -> dict:
    """Train a student; returns the last log record. Raises UserError if store, data and options disagree."""
    method = methods.make(config.loss, config.loss_option)
    index = open_data(config, config.data, "train")
    store = cache.open(config.store) if config.store else None
    others = [cache.open(path) for path in config.more_stores]
    _check(config, method, index, store, others)
    if store:
        index = numbered_alike(index, config, store.manifest)
    taught = "logits" in method.needs
    from_store = store is not None and taught and not config.live_teacher
    replay = Replay(
        index,
        store,
        batch_size=config.batch_size,
        epochs=config.epochs,
        device=config.device,
        seed=config.seed,
        few_shot=config.few_shot,
        shuffle_window=config.shuffle_window,
        repeat=config.repeat,
        views=config.student_views,
        policy=None if store else config.policy,
        labels=from_store,
        threads=config.threads,
        max_bad=config.max_bad,
        plane=config.plane,
        folder=config.out,
        check_share=config.check_share,
        others=others if from_store else (),
        combined=functools.partial(_combined, config, index) if others and from_store else None,
    )
    student = models.create(config.student, index.class_list, seed=config.seed)
    spec = config.live_teacher or config.check_teacher if taught else None
    # A live teacher's views are of any size; those that answered for the store were of one.
    size = store.manifest.teacher_size if store and not config.live_teacher else config.teacher_size
    teacher = _teacher(config, spec, index, replay.policy, size) if spec else None

    kept = method.keeps(config)
    learner = _learner(config, method, student, store, replay.policy) if isinstance(method, FeatureMethod) else None
    if learner:
        student = dataclasses.replace(student, module=learner)

    def objective(epoch: int, stored: Labels | None) -> Objective:
        if not taught:
            return CrossEntropy(config.label_smoothing, choice(config.augmented_fraction, config.seed, epoch))
        if not stored:
            return Distillation(config, epoch, teacher=teacher, kept=kept)
        checks = ()
        if teacher and store:
            expected = store.manifest.fidelity.get("kl", {}).get("4", _UNKNOWN_KL)
            checks = (TeacherCheck(stored, teacher, config.check_steps, expected),)
        if learner:
            return Imitation(config, epoch, stored, learner, index, checks)
        return Distillation(config, epoch, labels=stored, checks=checks, kept=kept)

    teachers = ", ".join(each.manifest.teacher for each in (store, *others) if each)
    about = {"store": config.store, "teacher": config.live_teacher or teachers or None}
    return fit(Job(config, replay, student, objective, kept, method.apart, about))


def _combined(config: TrainStudent, index: Index, each: Sequence[Labels]) -> Labels:
    target = index.records["label"].astype(np.int64)
    return Several.of(each, target, config.store_weights, config.together, config.temperature)


def _learner(config: TrainStudent, method: FeatureMethod, student: Network, store: Store | None, policy) -> Learner:
    """The student with what learns beside it, which starts from the seed. Raises UserError if it has no features."""
    assert store  # as checked
    code = features_of(store, f"--loss {config.loss}")
    models.probe(student, policy.base.size)
    width = tapped(student.module, policy.base.size, f"--student {student.name}").classifier.in_features
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed + 1)  # torch.manual_seed would reseed the GPUs as well
        return method.learner(student.module, width, code)


def _teacher(config: TrainStudent, spec: str, index: Index, policy: Policy, size: int | None) -> Teacher:
    device = devices.pick(config)
    network = models.trained(spec, index.class_list)
    teacher = Teacher(network, policy, device, devices.arithmetic(config.precision, device), size=size)
    known = config.live_teacher and not index.class_list.unlabelled
    if known and ranks.rank() == 0 and (found := look(teacher, index, policy, config, config.batch_size)):
        print(f"teacher: agrees with the labels of {found}", flush=True)
        found.warn(f"teacher {spec}")
    return teacher


def _check_temperature(config: TrainStudent, store: Store) -> None:
    """Say what labels that were made for a higher temperature lose at the student's; refuse what was seen to harm."""
    made_for, noise = store.manifest.temperature, store.manifest.noise(config.temperature)
    if config.temperature >= made_for or noise is None:
        return
    if noise > _HARMFUL_KL:
        raise UserError(
            f"labels made for T = {made_for:g} are too noisy for --temperature {config.temperature:g}",
            found=f"{noise:.2g} nats of noise there",
            expected=f"at most {_HARMFUL_KL:g}",
            fix=f"run precompute-teacher --temperature {config.temperature:g} into another store",
        )
    what = f"labels made for T = {made_for:g} have a noise of {noise:.2g} nats at --temperature {config.temperature:g}"
    print(f"warning: {what}", file=sys.stderr)


def _check_several(
    config: TrainStudent, method: Method, index: Index, store: Store | None, others: Sequence[Store]
) -> None:
    """Raise UserError unless the stores suit each other, and the options them."""
    count = len(others) + (store is not None)
    if config.store_weights and len(config.store_weights) != count:
        found = f"{len(config.store_weights)} for {count} {'store' if count == 1 else 'stores'}"
        raise UserError("--store-weights needs one of each store", found=found, expected=count)
    if not others:
        return
    if not store:
        raise UserError("--more-stores without a first one", found="no --store", fix="give the first as --store")
    for option, given in (
        ("--live-teacher", config.live_teacher),
        ("--check-teacher", config.check_teacher),
        (f"--loss {config.loss}, which needs energies,", "energy" in method.needs),
        (f"--loss {config.loss}, which needs features,", "features" in method.needs),
    ):
        if given:
            raise UserError(f"{option} takes one store", found=f"{count}", fix="leave it or --more-stores out")
    if config.together == "confidence" and index.class_list.unlabelled:
        found = "data prepared with --unlabelled"
        raise UserError("--together confidence needs labels", found=found, fix="take probabilities or logits")
    require_same_views(store, others, config.student_views or store.manifest.views)


def _check(config: TrainStudent, method: Method, index: Index, store: Store | None, others: Sequence[Store]) -> None:
    """Raise UserError unless the options suit each other, and what they know of the store is in its manifest."""
    taught = "logits" in method.needs
    if "attack" in method.needs and not config.live_teacher:
        raise UserError(f"--loss {config.loss} needs the teacher's gradient", found="none", fix="give --live-teacher")
    if method.apart:
        momenta.require(config, method.apart)
    _check_several(config, method, index, store, others)
    if not store:
        if taught and not config.live_teacher:
            what = f"--loss {config.loss} needs soft labels"
            raise UserError(what, found="neither", expected="--store or --live-teacher")
        if config.teacher_size and not config.live_teacher:
            raise UserError("--teacher-size needs a teacher", found="none", fix="give --live-teacher, or leave it out")
    else:
        expected: dict = {"dataset": index.fingerprint, "samples": len(index), "classes": index.classes}
        if config.teacher_size and not config.live_teacher:
            own = config.teacher_size == store.manifest.size
            expected["teacher_size"] = None if own else config.teacher_size
        if config.policy:
            wanted = policies.load(config.policy).to_config()
            expected |= {"base": wanted.pop("base"), "policy": wanted}
        for spec in (config.teacher, config.check_teacher):
            if spec:
                teacher = models.create(spec, index.class_list)
                expected["teacher"] = teacher.name
                if "@" in spec:
                    expected["teacher_weights"] = teacher.fingerprint
        cache.check(store.manifest, **expected)
        if "energy" in method.needs and not config.live_teacher and not store.manifest.energy:
            fix = "run precompute-teacher --energy into another store, or give --live-teacher"
            raise UserError(f"--loss {config.loss} needs the teacher's energies", found="a store without them", fix=fix)
        if taught and not config.live_teacher:
            for each in (store, *others):
                _check_temperature(config, each)
    if index.class_list.unlabelled:
        if "labels" in method.needs:
            found = "data prepared with --unlabelled"
            raise UserError(f"--loss {config.loss} needs labels", found=found, fix="take kd or ccd")
        if config.alpha:
            what, fix = "--alpha is the share of the hard loss", "give --alpha 0"
            raise UserError(what, found=f"{config.alpha:g} and data without labels", expected=0, fix=fix)
    if "two classes" in method.needs and index.classes < 2:
        fix = "take another --loss, or more classes"
        raise UserError(f"--loss {config.loss} needs two classes", found=index.classes, fix=fix)
    if config.live_teacher and "features" in method.needs:
        fix = "leave --live-teacher out, and give a --store made with --features"
        raise UserError(f"--loss {config.loss} takes features from the store alone", found="--live-teacher", fix=fix)
    if config.live_teacher and "mean agreement" in method.needs:
        raise UserError(f"--loss {config.loss} needs the stored w of all samples", fix="leave --live-teacher out")
