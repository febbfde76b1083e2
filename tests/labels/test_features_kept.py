"""Features in the store: what the teacher's classifier was given, through the pass, verification and every loss."""

import dataclasses

import numpy as np
import pytest
import torch
from support.passes import teacher_pass
from torch import nn

import cache
from cache import UserError
from kernels import reference
from pipeline.config import Inspect, PrecomputeTeacher, TrainStudent, Verify
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels import epochs, inspect, precompute, verify
from pipeline.labels import store as stores
from pipeline.networks import features, models
from pipeline.training.objectives import Distillation, Seen
from pipeline.views import drawing
from pipeline.views import policy as policies
from pipeline.views.loader import Loader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def said(digits, certain):
    """Rows, batch, features and logits of all good samples, by a hook on the classifier, in float64."""
    index, policy = Index.open(digits), policies.load(POLICY)
    (batch,) = Loader(index, policy, threads=1).batches(
        [(index.good, drawing.of(index.records[index.good], 5, 0, policy))]
    )
    module, given = models.create(certain, 10).module.eval().double(), []
    module.fc.register_forward_hook(lambda layer, inputs, output: given.append(inputs[0]))
    with torch.inference_mode():
        logits = [module(images.permute(0, 3, 1, 2).double() / 127.5 - 1) for images in batch.images]
    return batch, torch.stack(given, 1).numpy(), torch.stack(logits, 1).numpy()


def test_a_store_keeps_what_the_classifier_was_given(featured, said):
    """Off by the noise that its manifest says, over as many samples as fit it; w is that of the raw logits."""
    found, (batch, given, logits) = cache.open(featured), said
    rows, weight = found.load_plane(0).gather(batch.rows)
    stream = found.dither_keys(0, batch.rows)
    decoded = found.codec.features(rows, stream).astype(np.float64)
    share = np.square(decoded - given).sum() / np.square(given - given.mean((0, 1))).sum()
    assert share == pytest.approx(found.manifest.fidelity["feature_noise"], rel=0.3)
    assert 0.001 < share < 0.2
    module = models.create("cifar/resnet8", 10).module
    assert module.fc.in_features == given.shape[2] == found.codec.width
    np.testing.assert_allclose(
        found.codec.decode(rows, stream), decoded @ found.codec.head[0].T + found.codec.head[1], atol=1e-3
    )
    (o, a) = logits.swapaxes(0, 1)
    cosine = (o * a).sum(1) / np.linalg.norm(o, axis=1) / np.linalg.norm(a, axis=1)
    np.testing.assert_allclose(weight, 1 + cosine, atol=1e-5)


def test_the_gpus_path_decodes_the_same(featured, said):
    """PyTorch's decoder, as on a GPU, against the codec's own in NumPy."""
    found, rows = cache.open(featured), said[0].rows[:40]
    labels = epochs.Labels(found, plane := found.load_plane(0), CPU, torch.from_numpy(plane.codes))
    pairs, stream = labels.pairs(rows), found.dither_keys(0, rows)
    for got, expected in (
        (pairs.features(), found.codec.features(plane.codes[rows], stream)),
        (pairs.logits(), found.codec.decode(plane.codes[rows], stream)),
        (labels.features(rows), found.codec.features(plane.codes[rows], stream)),
    ):
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("loss", ["kd", "ccd", "dkd"])
def test_losses_of_logits_are_those_of_the_heads_product(loss, featured, said, digits, tmp_path):
    """Against `kernels.reference` in float64, of the decoded features times the head."""
    found, batch = cache.open(featured), said[0]
    labels = epochs.Labels(found, plane := found.load_plane(0), CPU, torch.from_numpy(plane.codes))
    config = TrainStudent(data=digits, store=featured, student="cifar/resnet8", out=tmp_path / "run", loss=loss)
    objective = Distillation(config, 0, labels=labels)
    chosen = objective.wants(batch)
    student = 3 * torch.randn(2, len(batch.rows), 10, generator=torch.Generator().manual_seed(1))
    objective.begin(batch, chosen)
    got, _ = objective(student.flatten(0, 1), Seen(batch, chosen, float(chosen.sum()), logged=True))
    weight, bias = (torch.from_numpy(array.copy()).double() for array in found.codec.head)
    decoded = torch.from_numpy(found.codec.features(plane.codes[batch.rows], found.dither_keys(0, batch.rows))).double()
    teacher = decoded @ weight.T + bias
    expected = reference.ccd_loss(
        *student.double(),
        *teacher.unbind(1),
        batch.labels,
        weight=torch.from_numpy(plane.weight[batch.rows]).double() if loss == "ccd" else 1.0,
        method="dkd" if loss == "dkd" else "kd",
        temperature=4.0,
        alpha=0.5,
        kd_weight=2.0,
    )
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_store_of_features_is_verified_shown_and_completed(featured, digits, certain, tmp_path):
    verify.run(Verify(store=str(featured), data=digits, teacher=certain, device="cpu", fraction=0.3))
    inspect.run(Inspect(store=str(featured), data=digits, teacher=certain, out=tmp_path / "page.html", device="cpu"))
    assert (tmp_path / "page.html").stat().st_size < 3_000_000
    facts = stores._facts(cache.open(featured))
    assert "features for T = 4, 0.05 nats; 64 features and their head" in facts["code"]
    copied = cache.copy(cache.open(featured), tmp_path / "copy.zarr").path
    teacher_pass(digits, certain, copied, views=2)  # without --features: the store says what it keeps
    assert not cache.open(copied).missing_blocks()
    np.testing.assert_array_equal(cache.open(copied).load_plane(0).codes, cache.open(featured).load_plane(0).codes)


def test_what_has_no_features_is_refused(digits, certain, labels, tmp_path):
    """A codec of logits, a store of logits, a callable."""
    for changes, words in (
        ({"codec": "int8"}, "--features has a code of its own; found --codec int8"),
        ({"store": str(labels)}, "the store keeps no features; found codec int8"),
        ({"teacher": "python:support.passes.ten_pixels"}, "has no features to take; found a callable"),
    ):
        with pytest.raises(UserError, match=words):
            fixed = dict(data=digits, teacher=certain, store=str(tmp_path / "none.zarr"), views=1, policy=POLICY)
            precompute.run(PrecomputeTeacher(**{**fixed, **changes}, features=True, device="cpu"))
    assert not (tmp_path / "none.zarr").exists()


@pytest.mark.parametrize("how", ["two layers", "a layer behind it", "convolutional"])
def test_a_head_that_is_not_one_linear_layer_is_refused(how):
    network = models.create("cifar/resnet8", 10, seed=0)
    if how == "two layers":
        network.module.fc = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))
    elif how == "a layer behind it":
        network.module.add_module("scale", nn.Softsign())
    else:
        network = dataclasses.replace(network, module=nn.Sequential(nn.Conv2d(3, 10, 1), nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(UserError, match="--teacher cifar/resnet8 has no features to take"):
        features.tapped(network.module, 32, f"--teacher {network.name}")


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"])
def test_timms_networks_are_tapped_where_their_classifier_begins(name):
    """By a hook on it; with some of the outputs alone as well."""
    size = 224 if name.startswith("vit") else 64
    network = models.create(f"timm/{name}", 12, seed=0)
    made, given = features.tapped(network.module, size, name).eval(), []
    made.classifier.register_forward_hook(lambda layer, inputs, output: given.append(inputs[0]))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole, (logits, found) = network.module.eval()(images), made(images)
    torch.testing.assert_close(logits, whole)
    torch.testing.assert_close(found, given[0], rtol=0, atol=0)
    some = features.Chosen(network.module, np.array([3, 1, 7]))
    less = features.tapped(some, size, name).eval()
    head = features.head(less)
    with torch.inference_mode():
        torch.testing.assert_close(less(images)[0], whole[:, [3, 1, 7]])
    np.testing.assert_allclose(found.numpy() @ head.weight.T + head.bias, whole[:, [3, 1, 7]].numpy(), atol=1e-5)
