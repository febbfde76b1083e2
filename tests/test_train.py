"""The student loop: the loss it minimises, and a kill at any moment that leaves no trace in the weights."""

import dataclasses
import io
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_precompute import finished, killed

import cache
from cache import UserError, philox
from pipeline import train
from pipeline.config import TrainStudent
from pipeline.demo import POLICY
from pipeline.index import Index
from pipeline.labels import Labels
from pipeline.loader import Batch
from pipeline.loop import learning_rate
from pipeline.objectives import CrossEntropy, Distillation, PixelCheck, Seen


@pytest.fixture(scope="module")
def options(digits, labels, tmp_path_factory) -> TrainStudent:
    return TrainStudent(
        data=digits,
        val=digits,
        store=labels,
        student="cifar/resnet8",
        out=tmp_path_factory.mktemp("train") / "whole",
        epochs=3,
        batch_size=16,
        lr=0.05,
        schedule="cosine",
        warmup_epochs=0.5,
        checkpoint_steps=2,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(options) -> TrainStudent:
    train.run(options)
    return options


def weights(config: TrainStudent) -> dict[str, torch.Tensor]:
    return load_file(config.out / "model.safetensors")


def assert_same_weights(one: TrainStudent, other: TrainStudent) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


UNTIMED = {"seconds", "times", "wait_share", "images_per_s"}


def log(config: TrainStudent) -> list[dict]:
    """Records of epochs."""
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" not in record]


def test_a_run_leaves_its_records(whole):
    records = log(whole)
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert all(0 <= record["val"]["top1"] <= 1 and record["loss"] > 0 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert json.loads((whole.out / "config.json").read_text())["student"] == "cifar/resnet8"


def test_sigkill_at_five_random_moments(whole, tmp_path):
    """With --resume the final weights are bit-identical to those of an uninterrupted run on the CPU."""
    moments = random.Random(1)
    finished(int, 0)  # starts the server that children are forked from
    timed = dataclasses.replace(whole, out=tmp_path / "timed", resume=True)
    duration = finished(train.run, timed)
    assert_same_weights(timed, whole)
    kills = 0
    for number in range(20):
        run = dataclasses.replace(whole, out=tmp_path / str(number), resume=True)
        if killed(train.run, run, moments.uniform(0.1, 1) * duration):
            kills += 1
            finished(train.run, run)
        assert_same_weights(run, whole)
        ours, theirs = (
            [{name: value for name, value in record.items() if name not in UNTIMED} for record in records]
            for records in (log(run), log(whole))
        )
        assert ours == theirs
        if kills == 5:
            break
    assert kills == 5, "the kills came too late"


def test_the_loss_is_that_of_the_stored_labels(whole):
    """One batch by hand: float64 autograd-free formula from PyTorch's own functionals on the decoded labels."""
    from torch.nn import functional as F

    store, index = cache.open(whole.store), Index.open(whole.data)
    plane = store.load_plane(1)
    stored = Labels(store, plane, torch.device("cpu"), torch.from_numpy(plane.encoded), None)
    rows = index.good[:9]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 10, generator=generator) * 3
    labels = torch.from_numpy(index.records["label"][rows].astype("int64"))
    batch = Batch(rows, labels, torch.empty(0), None)
    encoded, weight = plane.gather(rows)
    teacher = store.codec.decode(encoded, philox.stream(store.manifest.seed, index.records["key_hash"][rows], 1))
    t, z, T = torch.from_numpy(teacher).double(), logits.double(), 4.0
    for loss, w in (("ccd", torch.from_numpy(weight).double()), ("kd", torch.ones(9, dtype=torch.float64))):
        kl = [F.kl_div((z[v] / T).log_softmax(1), (t[:, v] / T).softmax(1), reduction="none").sum(1) for v in range(2)]
        hard = F.cross_entropy(z.flatten(0, 1), labels.repeat(2))
        expected = hard + 16 * 0.5 * (kl[0].mean() + (w * kl[1]).mean())
        config = dataclasses.replace(whole, loss=loss)
        seen = Seen(batch, np.ones((2, 9), bool), 18.0)
        got, _ = Distillation(config, 0, labels=stored)(logits.flatten(0, 1), seen)
        assert float(got) == pytest.approx(float(expected), rel=1e-6)
    assert float(CrossEntropy()(logits.flatten(0, 1), seen)[0]) == pytest.approx(float(hard), rel=1e-6)


@pytest.mark.parametrize("loss", ["ce", "kd"])
def test_other_losses_train(whole, loss, tmp_path):
    run = dataclasses.replace(whole, loss=loss, out=tmp_path / loss, epochs=1)
    train.run(run)
    assert len(log(run)) == 1


def test_epoch_e_takes_view_e_mod_v(whole, monkeypatch, tmp_path):
    asked = []
    planes = cache.planes
    monkeypatch.setattr(cache, "planes", lambda store, of, **o: planes(store, (asked.append(v) or v for v in of), **o))
    train.run(dataclasses.replace(whole, out=tmp_path / "r"))
    assert asked == [0, 1, 0]


def test_other_pixels_than_the_teachers_are_refused(whole, tmp_path):
    """A store whose digests are of other pixels: as if another decoder had made this run's."""
    store = tmp_path / "labels.zarr"
    shutil.copytree(whole.store, store)
    opened = cache.open(store)
    for view, block in ((v, b) for v in range(2) for b in range(opened.manifest.blocks)):
        rows = slice(*opened.block_range(block))
        plane = cache.open(whole.store).load_plane(view)
        opened.write_block(view, block, plane.encoded[rows], plane.weight[rows], plane.digest[rows] ^ np.uint32(1))
    with pytest.raises(UserError, match=r"not see the pixels .* 16 of 16 pairs of view 0 .* key train"):
        train.run(dataclasses.replace(whole, store=store, out=tmp_path / "run"))


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
    train.run(run := dataclasses.replace(whole, out=tmp_path / "run", plane=plane))
    one, other = ((config.out / "model.safetensors").read_bytes() for config in (run, whole))
    assert one == other


def test_labels_that_do_not_fit_are_refused(whole):
    with pytest.raises(UserError, match=r"does not fit --plane gpu; found no CUDA device"):
        train.run(dataclasses.replace(whole, plane="gpu", out=whole.out.parent / "gpu"))


def test_evaluation_counts_what_pillow_and_numpy_count(whole):
    """Top-1, top-5 and cross-entropy of the trained student, from images that Pillow cropped."""
    from pipeline import models, policy
    from pipeline.device import Normalise
    from pipeline.evaluate import evaluate

    index, base = Index.open(whole.data, split="val"), policy.load(POLICY)
    network = models.create(f"cifar/resnet8@{whole.out / 'model.safetensors'}", index.classes)
    normalise = Normalise(base.mean, base.std, torch.device("cpu"))
    got = evaluate(network.module, normalise, index, base, 7, whole)

    images = [Image.open(io.BytesIO(index.read(row))).convert("RGB") for row in index.good]
    images = [image.resize((32, 32), Image.Resampling.BILINEAR) for image in images]  # the policy keeps all of it
    x = (np.stack([np.asarray(image) for image in images]) / 255 - base.mean) / base.std
    with torch.inference_mode():
        logits = network.module.eval()(torch.from_numpy(x).permute(0, 3, 1, 2).float()).double().numpy()
    labels = index.records["label"][index.good]
    rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    assert got["samples"] == len(labels) == 45
    assert got["top1"] == (rank < 1).mean() and got["top5"] == (rank < 5).mean() and got["top1"] < got["top5"]
    assert got["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_resuming_with_other_options_is_refused(whole):
    with pytest.raises(UserError, match=r"--lr differs; found 0.1, expected 0.05"):
        train.run(dataclasses.replace(whole, resume=True, lr=0.1))


def test_the_learning_rate_is_the_papers():
    config = TrainStudent(data=None, out=None, store=None, student="x")  # type: ignore[arg-type]
    rates = [learning_rate(config, epoch) for epoch in (0, 59.9, 60, 120, 180, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 1e-4, 1e-4])
    cosine = dataclasses.replace(config, schedule="cosine", warmup_epochs=10, epochs=100)
    assert [learning_rate(cosine, e) for e in (0, 50, 100)] == pytest.approx([0, 0.05, 0])
