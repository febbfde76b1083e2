"""The student loop: the loss it minimises, and what a run leaves."""

import dataclasses
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import log, weights

import cache
from cache import UserError, philox
from kernels import ccd_loss
from pipeline.config import TrainStudent
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels.epochs import Labels
from pipeline.labels.pixels import PixelCheck
from pipeline.networks import models
from pipeline.networks.placed import placed
from pipeline.training import objectives, train_student
from pipeline.training import trainee as trainees
from pipeline.training.checks import TeacherCheck
from pipeline.training.meter import Clock
from pipeline.training.objectives import CrossEntropy, Distillation, Seen, choice
from pipeline.training.trainee import learning_rate
from pipeline.views import policy as policies
from pipeline.views.batch import Batch


def test_a_run_leaves_its_records(whole):
    records = log(whole)
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert all(0 <= record["val"]["top1"] <= 1 and record["loss"] > 0 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert json.loads((whole.out / "config.json").read_text())["student"] == "cifar/resnet8"


@pytest.fixture(scope="module")
def live(whole, teacher, tmp_path_factory) -> TrainStudent:
    """As `whole`, with the teacher in the loop."""
    config = dataclasses.replace(
        whole, out=tmp_path_factory.mktemp("live") / "run", live_teacher=teacher, log_steps=1, lr=2e-4, epochs=2
    )
    train_student.run(config)
    return config


def steps(config: TrainStudent) -> list[dict]:
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def test_stored_labels_train_as_a_live_teacher_does(whole, live, tmp_path):
    """Same views, same losses at each of 24 steps but for the code's error: int8's KL is below 1e-7 here.

    KL changes by about sqrt(2 · KL · 1e-7), so 16 KL of some 0.1 nats by 2e-3 of it at most.
    """
    cached = dataclasses.replace(whole, out=tmp_path / "cached", log_steps=1, lr=2e-4, epochs=2)
    train_student.run(cached)
    ours, theirs = steps(cached), steps(live)
    assert len(ours) == len(theirs) == 2 * 12
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["w"] == pytest.approx(other["w"], abs=1e-5)


def test_a_live_check_stops_labels_of_another_teacher(whole, teacher, tmp_path):
    checked = dataclasses.replace(whole, out=tmp_path / "right", check_teacher=teacher, check_steps=3, epochs=1)
    train_student.run(checked)
    other = tmp_path / "other.safetensors"
    models.save_weights(models.create("cifar/resnet8", 10, seed=8).module, other)
    wrong = dataclasses.replace(checked, out=tmp_path / "wrong", check_teacher=f"cifar/resnet8@{other}")
    with pytest.raises(UserError, match="another teacher_weights"):
        train_student.run(wrong)
    store, index = cache.open(whole.store), Index.open(whole.data)
    plane = store.load_plane(0)
    labels = Labels(store, plane, torch.device("cpu"), torch.from_numpy(plane.codes))
    batch = Batch(index.good[:16], torch.zeros(16), torch.zeros(2, 16, 1), None)
    right = labels.logits(batch.rows)

    class Said:
        device = torch.device("cpu")

        def __init__(self, logits):
            self.logits = logits

        def __call__(self, batch):
            return self.logits

    TeacherCheck(labels, Said(right), 1, 1e-6)(batch)
    with pytest.raises(UserError, match="stored labels are not this teacher's"):
        TeacherCheck(labels, Said(right + 5 * torch.randn(right.shape)), 1, 1e-6)(batch)


def test_the_loss_is_that_of_the_stored_labels(whole):
    """One batch by hand: float64 autograd-free formula from PyTorch's own functionals on the decoded labels."""
    from torch.nn import functional as F

    store, index = cache.open(whole.store), Index.open(whole.data)
    plane = store.load_plane(1)
    stored = Labels(store, plane, torch.device("cpu"), torch.from_numpy(plane.codes))
    rows = index.good[:9]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 10, generator=generator) * 3
    labels = torch.from_numpy(index.records["label"][rows].astype("int64"))
    batch = Batch(rows, labels, torch.empty(0), None)
    encoded, weight = plane.gather(rows)
    teacher = store.codec.decode(encoded, philox.dither_keys(store.manifest.seed, index.records["key_hash"][rows], 1))
    t, z, T = torch.from_numpy(teacher).double(), logits.double(), 4.0
    for loss, w in (("ccd", torch.from_numpy(weight).double()), ("kd", torch.ones(9, dtype=torch.float64))):
        kl = [F.kl_div((z[v] / T).log_softmax(1), (t[:, v] / T).softmax(1), reduction="none").sum(1) for v in range(2)]
        hard = F.cross_entropy(z.flatten(0, 1), labels.repeat(2))
        expected = hard + 16 * 0.5 * (kl[0].mean() + (w * kl[1]).mean())
        config = dataclasses.replace(whole, loss=loss)
        seen = Seen(batch, np.ones((2, 9), bool), 18.0)
        got, _ = Distillation(config, 0, labels=stored)(logits.flatten(0, 1), seen)
        assert float(got) == pytest.approx(float(expected), rel=1e-6)
        fading = dataclasses.replace(config, kd_warmup_epochs=4)
        for epoch, part in ((0, 0.25), (2, 0.75), (3, 1), (9, 1)):
            got, _ = Distillation(fading, epoch, labels=stored)(logits.flatten(0, 1), seen)
            assert float(got) == pytest.approx(float(hard + part * (expected - hard)), rel=1e-6)
    assert float(CrossEntropy()(logits.flatten(0, 1), seen)[0]) == pytest.approx(float(hard), rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "ce"},
        {"loss": "kd", "precision": "bf16"},
        {"loss": "ccd-mean", "ema": 0.9},
        {"loss": "dkd", "clip": 1.0, "kd_warmup_epochs": 5},
        {"loss": "dist", "label_smoothing": 0.1},
        {"loss": "standardised", "few_shot": 0.5},
        {"loss": "ccd", "augmented_fraction": 0.3},
        {"loss": "ccd", "augmented_fraction": 1.0, "accumulate": 3},
    ],
    ids=str,
)
def test_other_ways_to_train(whole, changes, tmp_path):
    run = dataclasses.replace(whole, out=tmp_path / "run", epochs=1, **changes)
    train_student.run(run)
    (record,) = log(run)
    assert 0 < record["loss"] < 100
    assert (run.out / "report.html").exists()


def test_parts_of_a_step_make_its_gradient(whole):
    """A network without batch statistics, one step: in three parts of 3, 3 and 2 pairs as in one."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, 8, 4, 4, 3), np.uint8))
    batch = Batch(np.arange(8), torch.from_numpy(rng.integers(0, 10, 8)), images, None)
    base = policies.load(POLICY)
    small = dataclasses.replace(base, base=dataclasses.replace(base.base, size=4))
    found = []
    for parts in (1, 3):
        config = dataclasses.replace(whole, accumulate=parts)
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
        network = models.Network(module, "test", 10, None, None, "")
        trainee, forward = trainees.prepare(config, placed(network, torch.device("cpu"), "fp32", small))
        clock = Clock(torch.device("cpu"), False)
        values = trainees.take_step(config, trainee, forward, CrossEntropy(), batch, True, clock)
        found.append((module[1].weight.detach(), values[-1][1]["loss"]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_an_average_of_the_weights_is_what_is_exported(whole, tmp_path):
    run = dataclasses.replace(whole, out=tmp_path / "run", ema=0.5, epochs=1)
    train_student.run(run)
    state = torch.load(run.out / "checkpoint.pt", weights_only=True)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, state["average"][f"module.{name}"])
    assert not torch.equal(weights(run)["fc.weight"], state["model"]["fc.weight"])


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.75, 1.0])
def test_the_share_of_augmented_views_is_the_one_asked_for(fraction):
    batch = Batch(np.arange(4000), torch.empty(0), torch.empty(0), None)
    chosen = choice(fraction, 0, 3)(batch)
    assert abs(chosen[1].sum() / chosen.sum() - fraction) < 0.02
    assert (chosen[0] if fraction <= 0.5 else chosen[1]).all()
    part = choice(fraction, 0, 3)(Batch(np.arange(4000)[7:900], torch.empty(0), torch.empty(0), None))
    np.testing.assert_array_equal(part, chosen[:, 7:900])  # whatever the batch
    if 0 < fraction < 1 and fraction != 0.5:
        assert (choice(fraction, 0, 4)(batch) != chosen).any()


def test_a_dry_run_writes_nothing(whole, tmp_path, capsys):
    train_student.run(dataclasses.replace(whole, out=tmp_path / "run", dry_run=True))
    assert not (tmp_path / "run").exists()
    assert "nothing was written" in capsys.readouterr().out


def test_epoch_e_takes_view_e_mod_v(whole, monkeypatch, tmp_path):
    asked = []
    planes = cache.planes
    monkeypatch.setattr(cache, "planes", lambda store, of, **o: planes(store, (asked.append(v) or v for v in of), **o))
    train_student.run(dataclasses.replace(whole, out=tmp_path / "r"))
    assert asked == [0, 1, 0]


def test_other_pixels_than_the_teachers_are_refused(whole, tmp_path):
    """A store whose digests are of other pixels: as if another decoder had made this run's."""
    store = tmp_path / "labels.zarr"
    shutil.copytree(whole.store, store)
    opened = cache.open(store)
    for view, block in ((v, b) for v in range(2) for b in range(opened.manifest.blocks)):
        rows = slice(*opened.block_range(block))
        plane = cache.open(whole.store).load_plane(view)
        opened.write_block(view, block, plane.codes[rows], plane.weight[rows], plane.digest[rows] ^ np.uint32(1))
    with pytest.raises(UserError, match=r"not see the pixels .* 16 of 16 pairs of view 0 .* key train"):
        train_student.run(dataclasses.replace(whole, store=store, out=tmp_path / "run"))


def test_a_random_share_of_each_epochs_pixels_is_checked(whole):
    """Every row is looked at in some epoch, and about `share` of them in each."""
    index, plane = Index.open(whole.data), cache.open(whole.store).load_plane(0)
    wrong = dataclasses.replace(plane, digest=plane.digest ^ np.uint32(1))
    images = torch.zeros((2, 1, 4, 4, 3), dtype=torch.uint8)
    nothing = Batch(index.good[:0], torch.empty(0), images[:, :0], None)
    found = np.zeros((40, len(index.good)), bool)
    for seed, row in np.ndindex(found.shape):
        check = PixelCheck(wrong, index, seed, 0.25)
        check(nothing)  # the first batch is checked whole
        try:
            check(Batch(index.good[row : row + 1], torch.empty(1), images, None))
        except UserError:
            found[seed, row] = True
    assert found.any(axis=0).all() and abs(found.mean() - 0.25) < 0.03


@pytest.mark.parametrize("plane", ["pinned", "mmap"])
def test_it_does_not_matter_where_the_labels_lie(whole, plane, tmp_path):
    train_student.run(run := dataclasses.replace(whole, out=tmp_path / "run", plane=plane))
    one, other = ((config.out / "model.safetensors").read_bytes() for config in (run, whole))
    assert one == other


def test_labels_that_do_not_fit_are_refused(whole):
    with pytest.raises(UserError, match=r"does not fit --plane gpu; found no CUDA device"):
        train_student.run(dataclasses.replace(whole, plane="gpu", out=whole.out.parent / "gpu"))


def test_evaluation_counts_what_pillow_and_numpy_count(whole):
    """Top-1, top-5 and cross-entropy of the trained student, from images that Pillow cropped."""
    from pipeline.training.evaluate import evaluate

    index, base = Index.open(whole.data, split="val"), policies.load(POLICY)
    network = models.create(f"cifar/resnet8@{whole.out / 'model.safetensors'}", index.classes)
    got = evaluate(placed(network, torch.device("cpu"), "fp32", base), index, base, 7, whole)

    images = [Image.open(io.BytesIO(index.read(row))).convert("RGB") for row in index.good]
    images = [image.resize((12, 12), Image.Resampling.BILINEAR) for image in images]  # the policy keeps all of it
    x = (np.stack([np.asarray(image) for image in images]) / 255 - base.mean) / base.std
    with torch.inference_mode():
        logits = network.module.eval()(torch.from_numpy(x).permute(0, 3, 1, 2).float()).double().numpy()
    labels = index.records["label"][index.good]
    rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    assert got["samples"] == len(labels) == 45
    assert got["top1"] == (rank < 1).mean() and got["top5"] == (rank < 5).mean() and got["top1"] < got["top5"]
    assert got["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_the_learning_rate_is_the_papers():
    config = TrainStudent(data=None, out=None, store=None, student="x")  # type: ignore[arg-type]
    rates = [learning_rate(config, epoch) for epoch in (0, 59.9, 60, 120, 180, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 1e-4, 1e-4])
    cosine = dataclasses.replace(config, schedule="cosine", warmup_epochs=10, epochs=100)
    assert [learning_rate(cosine, e) for e in (0, 50, 100)] == pytest.approx([0, 0.05, 0])


def gradient_alone(asked: list):
    """`ccd_loss` as it is where kernels compute: of a step that is not logged the loss has no value."""

    def loss(*arguments, **options):
        asked.append(options["report"])
        found = ccd_loss(*arguments, **options)
        return found if options["report"] != "none" else found - found.detach() + torch.nan

    return loss


def test_a_step_that_is_not_logged_computes_its_gradient_alone(whole, tmp_path, monkeypatch):
    """Weights are those of a run that knows every loss; records have the losses of their own steps."""
    asked = []
    monkeypatch.setattr(objectives, "ccd_loss", gradient_alone(asked))
    run = dataclasses.replace(whole, out=tmp_path / "run", log_steps=3)
    train_student.run(run)
    records = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert asked.count("plain") == sum("step" in record for record in records) < len(asked)
    assert all(math.isfinite(record["loss"]) for record in records)
    one, other = ((config.out / "model.safetensors").read_bytes() for config in (run, whole))
    assert one == other


def test_a_run_that_diverges_between_records_is_noticed(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "ccd_loss", gradient_alone([]))
    run = dataclasses.replace(whole, out=tmp_path / "run", lr=1e9, checkpoint_steps=10**6, log_steps=1000)
    with pytest.raises(UserError, match=r"training diverged: weights are not finite; found at step .* of epoch 0"):
        train_student.run(run)
