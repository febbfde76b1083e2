"""Students that learn by a store's features: their terms against the papers in float64, their runs, what they leave."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.features import WIDTH, draw, fitted
from support.runs import assert_same_weights, log, weights

import cache
from cache import UserError
from pipeline.config import Evaluate, TrainStudent
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels.epochs import Labels
from pipeline.networks import models
from pipeline.networks.placed import placed
from pipeline.training import evaluate, imitation, train_student
from pipeline.training.imitation import Imitation
from pipeline.training.methods import METHODS, make
from pipeline.training.methods.features import FeatureMethod, FeatureView
from pipeline.training.objectives import Seen
from pipeline.views import policy as policies
from pipeline.views.batch import Batch

NAMES = ("fitnet", "simkd", "crd", "vid", "ft")
VIEWS, OWN, OTHERS = 6, 64, 9  # views, features of a student, negatives


def test_these_are_all_of_them():
    assert set(NAMES) == {name for name, kind in METHODS.items() if issubclass(kind, FeatureMethod)}


# Terms: what learns beside the student, and the loss, once more in NumPy


def affine(x: np.ndarray, layer) -> np.ndarray:
    y = x @ layer.weight.detach().numpy().reshape(len(layer.weight), -1).T
    return y if layer.bias is None else y + layer.bias.detach().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(1, keepdims=True))


def normed(x: np.ndarray) -> np.ndarray:
    """Batch statistics, an affine map that begins as the identity."""
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def paper_fitnet(learner, s, t, others, differ):
    return ((normed(affine(s, learner.beside[0])) - t) ** 2).mean(1)


def paper_simkd(learner, s, t, others, differ):
    first, middle, last = (learner.beside[at] for at in (0, 3, 6))
    return (
        (affine(np.maximum(normed(affine(np.maximum(normed(affine(s, first)), 0), middle)), 0), last) - t) ** 2
    ).mean(1)


def paper_crd(learner, s, t, others, differ):
    ours, theirs, bank = (
        unit(affine(x, layer))
        for x, layer in ((s, learner.beside.student), (t, learner.beside.teacher), (others, learner.beside.teacher))
    )
    values = []
    for one, its, apart in zip(ours, theirs, differ, strict=True):
        own = np.exp(one @ its / 0.07)
        values.append(-np.log(own / (own + np.exp(bank[apart] @ one / 0.07).sum())))
    return values


def paper_vid(learner, s, t, others, differ):
    first, middle, last = (learner.beside.mean[at] for at in (0, 2, 4))
    mean = affine(np.maximum(affine(np.maximum(affine(s, first), 0), middle), 0), last)
    variance = np.log1p(np.exp(learner.beside.scale.detach().numpy())) + 1e-5
    np.testing.assert_allclose(variance, 5.0, rtol=1e-6)
    return (((mean - t) ** 2 / variance + np.log(variance)) / 2).mean(1)


def paper_ft(learner, s, t, others, differ):
    """The teacher's factors by an SVD of the features that the code was fitted to."""
    seen = draw(512).reshape(-1, WIDTH).astype(np.float64)
    directions = np.linalg.svd(seen - seen.mean(0), full_matrices=False)[2][: WIDTH // 2]
    found = learner.beside.directions.numpy()
    np.testing.assert_allclose(np.abs((found * directions).sum(1)), 1, atol=2e-3)  # 8 bits a number
    first, middle, last = (learner.beside.translator[at] for at in (0, 2, 4))
    x = affine(s, first)
    x = affine(np.where(x > 0, x, 0.1 * x), middle)
    student = affine(np.where(x > 0, x, 0.1 * x), last)
    return np.abs(unit(student) - unit((t - seen.mean(0)) @ found.T)).mean(1)


@pytest.mark.parametrize("name", NAMES)
def test_a_term_is_its_papers(name):
    """Of a learner in training, with gradients that finite differences agree with."""
    torch.manual_seed(1)
    method, code = make(name), fitted()
    learner = method.learner(models.create("cifar/resnet8", 9, seed=0).module, OWN, code).double().train()
    rng = np.random.default_rng(2)
    s, differ = rng.normal(size=(VIEWS, OWN)), rng.random((VIEWS, OTHERS)) < 0.7
    t, others = draw(VIEWS, 4)[:, 0].astype(np.float64), draw(OTHERS, 5)[:, 1].astype(np.float64)

    def term(features: torch.Tensor) -> torch.Tensor:
        view = FeatureView(
            student=learner.beside(features),
            teacher=torch.from_numpy(t),
            others=torch.from_numpy(others),
            differ=torch.from_numpy(differ),
        )
        return method.imitate(learner, view)

    expected = globals()[f"paper_{name}"](learner, s, t, others, differ)
    features = torch.from_numpy(s).requires_grad_()
    rel = 1e-5 if name == "ft" else 1e-9  # the code's mean is a float32
    np.testing.assert_allclose(term(features).detach().numpy(), expected, rtol=rel, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: term(x).sum(), features, atol=1e-6)
    term(features).sum().backward()
    assert all(parameter.grad is not None for parameter in learner.beside.parameters())


def test_fitnet_takes_the_cosine_too():
    method = make("fitnet", ["distance=cosine"])
    learner = method.learner(models.create("cifar/resnet8", 9, seed=0).module, OWN, fitted())
    s, t = torch.randn(5, OWN), torch.from_numpy(draw(5)[:, 0])
    with torch.no_grad():
        made = learner.beside(s)
        found = method.imitate(learner, FeatureView(student=made, teacher=t))
    one, other = made.numpy().astype(np.float64), t.numpy().astype(np.float64)
    np.testing.assert_allclose(found, 1 - (unit(one) * unit(other)).sum(1), atol=1e-6)


@pytest.mark.parametrize("name", ["fitnet", "simkd", "crd"])
def test_the_loss_of_a_batch_is_the_sum_of_its_parts(name, featured, digits, tmp_path):
    """CE, term and KL of the head's logits, over the views that are there; w and all else of the store left out."""
    store, index = cache.open(featured), Index.open(digits)
    labels = Labels(store, plane := store.load_plane(0), torch.device("cpu"), torch.from_numpy(plane.codes))
    options = ("kd=0.5", "beta=2", *(("negatives=10",) if name == "crd" else ()))
    config = TrainStudent(
        data=digits, store=featured, student="-", out=tmp_path, loss=name, loss_option=options, alpha=0.3, kd_weight=1.7
    )
    method = make(name, options)
    learner = method.learner(models.create("cifar/resnet8", 10, seed=0).module, OWN, store.codec)
    objective = Imitation(config, 0, labels, learner, index)
    rows = index.good[[3, 30, 31, 90]]
    chosen = np.array([[True, True, False, True], [True, False, True, True]])
    batch = Batch(rows, torch.from_numpy(index.records["label"][rows].astype(np.int64)), torch.empty(0), None)
    logits, features = torch.randn(6, 10), torch.randn(6, WIDTH if name == "crd" else 64)
    if name == "crd":
        features = learner.beside(torch.randn(6, OWN)).detach()
    torch.manual_seed(3)
    loss, means = objective(logits, Seen(batch, chosen, 5.0, logged=True, features=features))
    assert means.keys() == {"features", "agreement", "ce"}
    decoded = store.codec.features(plane.codes[rows], store.dither_keys(0, rows)).astype(np.float64)
    taught = np.concatenate([decoded[chosen[0], 0], decoded[chosen[1], 1]])
    target = np.concatenate([batch.labels.numpy()[chosen[view]] for view in range(2)])

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    z, (weight, bias) = logits.numpy().astype(np.float64), store.codec.head
    p, q = (log_softmax(x / 4) for x in (taught @ weight.T.astype(np.float64) + bias, z))
    kl = (np.exp(p) * (p - q)).sum(1)
    ce = -log_softmax(z)[np.arange(6), target]
    view = {"student": features, "teacher": torch.from_numpy(taught).float()}
    if name == "crd":
        torch.manual_seed(3)
        known = index.good[torch.randint(len(index.good), (5,)).numpy()]
        bank = store.codec.features(plane.codes[known], store.dither_keys(0, known)).reshape(10, -1)
        whose = np.repeat(index.records["label"][known], 2)
        view |= {"others": torch.from_numpy(bank), "differ": torch.from_numpy(target[:, None] != whose)}
    term = method.imitate(learner, FeatureView(**view)).detach().numpy()
    soft = (2 * term + 0.5 * 16 * kl).sum()
    expected = soft / 5 if name == "simkd" else 1.7 * (0.3 * ce.sum() + 0.7 * soft) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-4)


# Runs


def run(featured: Path, digits: Path, out: Path, name: str, **changes) -> TrainStudent:
    fixed = {
        "epochs": 2,
        "batch_size": 18,
        "lr": 0.02,
        "loss_option": ("negatives=256",) if name == "crd" else (),
        "warmup_epochs": 0.5,
        "device": "cpu",
        "eval_epochs": 0,
        "threads": 1,
    }
    options = dict(data=digits, val=digits, store=str(featured), student="cifar/resnet8", out=out, loss=name)
    return TrainStudent(**{**fixed, **options, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_of_each(name, featured, digits, tmp_path):
    """The term falls, and what is exported is evaluated to what the run said."""
    config = run(featured, digits, tmp_path / "run", name)
    train_student.run(config)
    first, last = log(config)
    assert last["features"] < first["features"]
    assert np.isfinite(last["loss"])
    spec = f"cifar/resnet8@{config.out / 'model.safetensors'}"
    keys = set(weights(config))
    assert ("beside.0.weight" in keys) == (name == "simkd")
    if name != "simkd":
        assert keys == set(models.create("cifar/resnet8", 10).module.state_dict())
    policy = policies.load(POLICY)
    network = placed(models.trained(spec, 10), torch.device("cpu"), "fp32", policy)
    found = evaluate.evaluate(network, Index.open(digits, split="val"), policy, 64, config)
    assert found["loss"] == pytest.approx(last["val"]["loss"], rel=1e-5)


def test_a_student_of_simkd_ends_in_the_teachers_classifier(featured, digits, certain, tmp_path, capsys):
    """Its own is neither used nor changed; `pipeline evaluate` takes it; other networks do not take its weights."""
    config = run(featured, digits, tmp_path / "run", "simkd", epochs=1)
    train_student.run(config)
    found, start = weights(config), models.create("cifar/resnet8", 10, seed=0).module
    teacher = load_file(certain.partition("@")[2])
    assert torch.equal(found["weight"], teacher["fc.weight"]) and torch.equal(found["bias"], teacher["fc.bias"])
    assert torch.equal(found["body.fc.weight"], start.fc.weight)
    assert not torch.equal(found["body.conv1.weight"], start.conv1.weight)
    spec = f"cifar/resnet8@{config.out / 'model.safetensors'}"
    evaluate.run(Evaluate(data=digits, model=spec, policy=POLICY, device="cpu"))
    assert "top-1" in capsys.readouterr().out
    with pytest.raises(UserError, match="are not those of cifar/resnet14"):
        models.create(spec.replace("resnet8@", "resnet14@"), 10)


@pytest.mark.parametrize("name", ["simkd", "crd"])
def test_a_run_that_is_cut_goes_on_to_the_bit(name, featured, digits, tmp_path, monkeypatch):
    """A projector with batch statistics, and negatives drawn at each step."""
    whole = run(featured, digits, tmp_path / "whole", name, epochs=1, checkpoint_steps=3)
    train_student.run(whole)
    cut = dataclasses.replace(whole, out=tmp_path / "cut", resume=True)
    calls, ours = [], Imitation.__call__

    def failing(self, logits, seen):
        calls.append(seen)
        if len(calls) == 8:
            raise UserError("cut")
        return ours(self, logits, seen)

    monkeypatch.setattr(imitation.Imitation, "__call__", failing)
    with pytest.raises(UserError, match=r"^cut"):
        train_student.run(cut)
    monkeypatch.undo()
    state = torch.load(cut.out / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, 6)
    assert any(key.startswith("beside.") for key in state["model"])
    train_student.run(cut)
    assert_same_weights(whole, cut)
    assert log(whole)[-1]["features"] == log(cut)[-1]["features"]


def test_what_has_no_features_is_refused(featured, labels, digits, certain, tmp_path):
    out = tmp_path / "run"
    for changes, words in (
        (
            {"store": str(labels)},
            r"--loss fitnet needs the teacher's features; found a store of logits \(int8\).*--feat",
        ),
        ({"live_teacher": certain}, "--loss fitnet takes features from the store alone"),
        ({"store": None, "live_teacher": certain}, "--loss fitnet takes features from the store alone"),
        ({"student": "timm/vit_tiny_patch16_224"}, "does not take images of 12 x 12 pixels"),
        ({"student": "timm/resnetv2_50"}, "--student timm/resnetv2_50 has no features to take; found a classifier of"),
    ):
        with pytest.raises(UserError, match=words):
            train_student.run(run(featured, digits, out, "fitnet", **changes))
        assert not out.exists()
