"""Mixed views from the teacher pass to the student: both labels in every hard loss, and stores that say how."""

import dataclasses
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.images import jpeg
from support.papers import isotonic
from support.runs import assert_same_weights, log
from support.tars import tar_of
from support.tiny import Tiny, taught
from torch import Tensor
from torch.nn import functional as F

import cache
from cache import UserError
from kernels import Mixed, ccd_loss, reference
from pipeline import Replay
from pipeline.config import Inspect, TrainStudent, TrainTeacher, Verify
from pipeline.data import prepare
from pipeline.labels import inspect, precompute, verify
from pipeline.training import loop, train_student, train_teacher
from pipeline.training.imitation import Imitation
from pipeline.training.methods import loss, make
from pipeline.training.objectives import CrossEntropy, Distillation, Seen
from pipeline.views.batch import Batch

B, C, SMOOTHING = 7, 5, 0.1
OPTIONS = {"temperature": 4.0, "alpha": 0.3, "kd_weight": 2.0, "label_smoothing": SMOOTHING}
MIXING = (
    "name: tiny\nprobability: 0.5\nops: cifar10\nbase: {size: 8}\n"
    "mix: {mixup_alpha: 0.8, cutmix_alpha: 1.0, probability: 0.8}\nerase: {probability: 0.25}\n"
)

Case = namedtuple("Case", "student teacher target mixed")


@pytest.fixture
def case() -> Case:
    """In float64; student (2, B, C), teacher (B, 2, C)."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(2, B, C, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(B, 2, C, generator=generator, dtype=torch.float64)
    target, partner = torch.randint(C, (2, B), generator=generator)
    ratio = torch.tensor([1.0, 0.0, 0.25, 0.5, 0.75, 0.125, 0.9], dtype=torch.float64)
    return Case(student.requires_grad_(), teacher, target, Mixed(partner.where(ratio < 1, target), ratio))


def hard(case: Case, chosen: np.ndarray | None = None) -> Tensor:
    """Cross-entropies with both labels of each view, as PyTorch takes probabilities; (views,) of those chosen."""
    one, other = (F.one_hot(each, C).double() for each in (case.target, case.mixed.partner_target))
    share = case.mixed.ratio[:, None]
    labels = torch.stack([one, share * one + (1 - share) * other])
    each = F.cross_entropy(
        case.student.flatten(0, 1), labels.flatten(0, 1), label_smoothing=SMOOTHING, reduction="none"
    ).reshape(2, B)
    return each if chosen is None else each[torch.from_numpy(chosen)]


def assert_same(case: Case, got: Tensor, expected: Tensor, rel: float = 1e-12) -> None:
    """Loss and gradient."""
    ours, theirs = (torch.autograd.grad(value, case.student, retain_graph=True)[0] for value in (got, expected))
    assert got.item() == pytest.approx(expected.item(), rel=rel)
    torch.testing.assert_close(ours, theirs, rtol=rel, atol=rel * float(theirs.abs().max()))
    assert float((ours.sum(2)).abs().max()) < max(rel, 1e-12)


def test_the_public_loss_takes_both_labels(case):
    """And without a mixed view, with a mask, with another count, and in its parts."""
    teacher = case.teacher.unbind(1)
    plain = reference.ccd_loss(*case.student, *teacher, case.target, **OPTIONS)
    beyond = 2 * 0.3 * (hard(case) - hard(case._replace(mixed=case.mixed._replace(ratio=torch.ones(B)))))
    got, parts = ccd_loss(*case.student, *teacher, case.target, mixed=case.mixed, parts=True, **OPTIONS)
    assert_same(case, got, plain + beyond.sum() / (2 * B))
    torch.testing.assert_close(parts.ce_a, hard(case)[1].detach())
    torch.testing.assert_close(parts.ce_o, hard(case)[0].detach())

    valid = torch.tensor([True, True, False, True, False, True, True])
    labels = case.target.where(valid, -1)
    got = ccd_loss(*case.student, *teacher, labels, mixed=case.mixed, valid=valid, **OPTIONS)
    plain = reference.ccd_loss(*case.student, *teacher, case.target, valid=valid, **OPTIONS)
    assert_same(case, got, plain + beyond[:, valid].sum() / 10)
    got = ccd_loss(*case.student, *teacher, case.target, mixed=case.mixed, count=3.0, **OPTIONS)
    plain = reference.ccd_loss(*case.student, *teacher, case.target, count=3.0, **OPTIONS)
    assert_same(case, got, plain + beyond.sum() / 6)
    with pytest.raises(ValueError, match=r"mixed\.ratio: expected shape"):
        short = case.mixed._replace(ratio=torch.ones(B - 1))
        ccd_loss(*case.student, *teacher, case.target, mixed=short, **OPTIONS)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "triplet", "ida", "mjkd"])
def test_every_method_takes_both_labels(case, name):
    """Where alpha is 1 nothing else is left."""
    options = {**OPTIONS, "alpha": 1.0}
    got = loss(make(name), case.student, case.teacher, case.target, mixed=case.mixed, **options)
    assert_same(case, got.sum(), 2 * hard(case).mean())


def test_ida_repairs_labels_by_the_order_of_both(case):
    """Of the augmented views alone; the larger part comes first."""
    options = {**OPTIONS, "alpha": 0.0}
    p = (case.teacher / 4).softmax(2).numpy()
    expected = 0.0
    for i, (own, partner, ratio) in enumerate(zip(case.target, *case.mixed, strict=True)):
        labels = (int(own), int(partner)) if ratio >= 0.5 else (int(partner), int(own))
        for view, found in enumerate((isotonic(p[i, 0], int(own)), isotonic(p[i, 1], *labels))):
            log_q = (case.student[view, i] / 4).log_softmax(0)
            m = torch.from_numpy(found)
            expected = expected + torch.special.xlogy(m, m).sum() - (m * log_q).sum()
    got = loss(make("ida"), case.student, case.teacher, case.target, mixed=case.mixed, **options)
    assert_same(case, got, 2 * 16 * expected / (2 * B), 1e-9)


@pytest.mark.parametrize("name", ["kd", "ccd", "dkd", "energy", "mjkd"])
@pytest.mark.parametrize("some", [False, True], ids=["all views", "some views"])
def test_objectives_take_both_labels(case, name, some):
    """In float32, of the views that the student sees; by the kernel's way and by the other."""
    chosen = np.ones((2, B), bool)
    if some:
        chosen[1, [2, 4]] = chosen[0, [0, 4]] = False
    batch = Batch(
        np.arange(B), case.target, torch.empty(2, B), None, case.mixed._replace(ratio=case.mixed.ratio.float())
    )
    plain = dataclasses.replace(batch, mixed=None)
    config = TrainStudent(
        data=Path(), out=Path(), student="x", loss=name, store=None, alpha=0.3, label_smoothing=SMOOTHING
    )

    class Said:
        device = torch.device("cpu")

        def __call__(self, batch):
            return case.teacher.float()

    logits = case.student[torch.from_numpy(chosen)].float()
    with_both, own = (
        Distillation(config, 0, teacher=Said())(logits, Seen(each, chosen, float(chosen.sum()), logged=True))
        for each in (batch, plain)
    )
    beyond = hard(case, chosen) - hard(case._replace(mixed=case.mixed._replace(ratio=torch.ones(B))), chosen)
    assert_same(case, with_both[0].sum(), own[0].sum().double() + 2 * 0.3 * beyond.mean(), 1e-5)
    if "ce" in own[1]:
        assert float(with_both[1]["ce"]) == pytest.approx(hard(case, chosen).mean().item(), rel=1e-5)
    seen = Seen(batch, chosen, float(chosen.sum()))
    assert_same(case, CrossEntropy(SMOOTHING)(logits, seen)[0], hard(case, chosen).mean(), 1e-5)
    labels = case.target[torch.from_numpy(np.nonzero(chosen)[1])]
    imitated = Imitation._hard(SimpleNamespace(_config=config), logits, labels, seen)  # type: ignore[arg-type]
    assert_same(case, imitated.mean(), hard(case, chosen).mean(), 1e-5)


def test_parts_of_a_batch_keep_their_labels(case):
    batch = Batch(np.arange(B), case.target, torch.zeros(2, B, 1), None, case.mixed)
    part = batch.part(np.array([4, 1]))
    assert part.mixed and part.mixed.ratio.tolist() == [0.75, 0.0]
    assert part.mixed.partner_target.tolist() == case.mixed.partner_target[[4, 1]].tolist()


@pytest.fixture(scope="module")
def mixing(tiny, tmp_path_factory) -> Tiny:
    """The tiny data with a policy that mixes, and its store of two views."""
    folder = tmp_path_factory.mktemp("mixing")
    (folder / "policy.yaml").write_text(MIXING)
    found = tiny._replace(policy=folder / "policy.yaml", stores=folder)
    precompute.run(taught(found, folder / "store"))
    return found


def student(mixing: Tiny, out: Path, **changes) -> TrainStudent:
    config = TrainStudent(
        data=mixing.data, student="cifar/resnet8", store=str(mixing.stores / "store"), out=out, epochs=2,
        batch_size=8, lr=0.01, device="cpu", log_steps=1, threads=1, checkpoint_steps=2, check_share=1.0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_a_teacher_pass_does_not_depend_on_batches_or_on_views_of_a_decode(mixing, tmp_path):
    precompute.run(taught(mixing, tmp_path / "other", batch_size=7, views_per_decode=2, block_rows=16))
    ours, theirs = (cache.open(path) for path in (mixing.stores / "store", tmp_path / "other"))
    for view in range(2):
        np.testing.assert_array_equal(ours.load_plane(view).digest, theirs.load_plane(view).digest)
    assert ours.manifest.policy["mix"] == {
        "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 0.8, "switch_probability": 0.5
    }  # fmt: skip


def test_a_mixed_store_verifies_and_is_shown(mixing, tmp_path):
    store = str(mixing.stores / "store")
    found = verify.verify(Verify(store=store, data=mixing.data, teacher=mixing.teacher, fraction=1, device="cpu"))
    assert not found.counts and found.facts["rows checked"] == "80 of 80"
    inspect.run(Inspect(store=store, data=mixing.data, out=tmp_path / "page.html", samples=12, device="cpu"))
    page = (tmp_path / "page.html").read_text()
    assert "mixup, " in page and "cutmix, " in page and "erase" in page


def test_a_student_that_is_stopped_goes_on_to_the_same_weights(mixing, tmp_path, monkeypatch):
    """Its pixels are all held against the teacher's digests."""
    train_student.run(whole := student(mixing, tmp_path / "whole", loss="ccd"))
    run, step, taken = student(mixing, tmp_path / "run", loss="ccd"), loop.take_step, iter(range(7))

    def stopping(*arguments):
        if next(taken) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_student.run(run)
    monkeypatch.undo()
    train_student.run(dataclasses.replace(run, resume=True))
    assert_same_weights(run, whole)


def test_a_teacher_learns_from_both_labels(mixing, tmp_path, monkeypatch):
    config = TrainTeacher(
        data=mixing.data, teacher="cifar/resnet8", policy=str(mixing.policy), out=tmp_path / "both", epochs=1,
        batch_size=40, lr=0.0001, device="cpu", threads=1,
    )  # fmt: skip
    train_teacher.run(config)
    monkeypatch.setattr("pipeline.training.objectives.with_partners", lambda hard, *_: hard)
    train_teacher.run(other := dataclasses.replace(config, out=tmp_path / "own"))
    assert log(config)[0]["loss"] != pytest.approx(log(other)[0]["loss"], rel=1e-3)


def test_replay_says_whose_labels_a_view_has(mixing):
    with Replay(mixing.data, mixing.stores / "store", batch_size=40, epochs=1, device="cpu", threads=1) as replay:
        (batch,) = replay
    labels, mixed = replay.index.records["label"], batch.mixed
    assert mixed is not None and (mixed.ratio < 1).any() and (mixed.ratio == 1).any()
    whole = mixed.ratio == 1
    assert mixed.partner_target[whole].tolist() == labels[batch.made.rows][whole.numpy()].tolist()


def test_a_mixed_store_takes_more_views_and_no_more_samples(mixing, tiny, tmp_path):
    """With other samples other partners."""
    store = cache.copy(cache.open(mixing.stores / "store"), tmp_path / "copy")
    precompute.run(taught(mixing, Path(store.path), views=3))
    tar_of(tmp_path / "more.tar", {"99.jpg": jpeg(np.random.default_rng(99), 12, 12), "99.cls": b"1"})
    prepare.build(f"webdataset:{{{tiny.data.parent}/images,{tmp_path}/more}}.tar", tmp_path / "data", classes=3)
    with pytest.raises(UserError, match="a store of mixed views cannot grow with its data set; found 41 samples"):
        precompute.run(taught(mixing, Path(store.path), views=3, data=tmp_path / "data"))


def test_a_store_of_another_mix_is_refused(mixing, tiny, tmp_path):
    store = mixing.stores / "store"
    message = "the store has another policy.mix; found .*mixup_alpha.*, expected nothing; fix: take the policy"
    with pytest.raises(UserError, match=message):
        precompute.run(taught(mixing, store, policy=str(tiny.policy)))
    with pytest.raises(UserError, match=message):
        train_student.run(student(mixing, tmp_path / "run", policy=str(tiny.policy)))
    other = tmp_path / "other.yaml"
    other.write_text(MIXING.replace("cutmix_alpha: 1.0", "cutmix_alpha: 0.5"))
    message = "another policy.mix.cutmix_alpha; found 1.0, expected 0.5"
    with pytest.raises(UserError, match=message):
        train_student.run(student(mixing, tmp_path / "run", policy=str(other)))
    with pytest.raises(UserError, match=r"partners of mixed views come from all samples; found few_shot 0.5"):
        train_student.run(student(mixing, tmp_path / "run", few_shot=0.5))
    other.write_text(MIXING.replace("mixup_alpha: 0.8", "mixup_alpha: -1"))
    with pytest.raises(UserError, match=r"mix: mixup_alpha; found \[-1\], expected"):
        precompute.run(taught(mixing, tmp_path / "new", policy=str(other)))
    assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists()
