"""Students of a real teacher are judged by its own top classes and by KL, on the pixels that they see."""

import copy
import dataclasses
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import png
from support.tars import tar_of

import cache
from bench.claims import data as trials
from bench.claims import processes
from bench.claims import suite as claims
from bench.claims.differences import arm, compared
from bench.claims.studies import less, setting
from bench.labels import real
from cache import UserError
from pipeline.config import Bench
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.networks import models
from pipeline.training import train_student
from pipeline.views.policy import IMAGENET_STATS

SIDE, TEACHER_SIDE, STUDENT = 16, 24, "cifar/resnet8"
STATS = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def options(tmp_path, monkeypatch) -> Bench:
    """PNGs that an evaluation view takes as they are, and a tiny teacher that wants them larger."""
    rng = np.random.default_rng(0)
    for name, count in (("data", 60), ("val", 30)):
        members = {f"{i:03d}.png": png(rng, SIDE, SIDE) for i in range(count)}
        members["004.png"] = members["004.png"][:40]  # keeps its row, and is no sample
        labels = {f"{i:03d}.cls": b"0" for i in range(count)}
        tar_of(tmp_path / f"{name}.tar", dict(sorted((members | labels).items())))
        prepare.build(f"webdataset:{tmp_path / name}.tar", tmp_path / name, classes=1)
    policy = {"name": "small", "probability": 0.2, "ops": "imagenet", "base": {"size": SIDE, "centre": 1.0}}
    (tmp_path / "policy.yaml").write_text(json.dumps(policy))
    monkeypatch.setattr(real, "SIZE", TEACHER_SIDE)
    network = tiny(Index.open(tmp_path / "data"))
    monkeypatch.setattr(real, "network", lambda name: copy.deepcopy(network))
    monkeypatch.setattr(processes, "workers", lambda: ThreadPoolExecutor(1))
    return Bench(
        suite="claims",
        teacher="lite0",
        student=STUDENT,
        data=tmp_path / "data",
        val=tmp_path / "val",
        policy=str(tmp_path / "policy.yaml"),
        work=tmp_path / "work",
        seeds=2,
        epochs=1,
        threads=1,
        arms="losses",
    )


def tiny(index: Index) -> models.Network:
    """A network of random weights, but for a classifier that has an opinion of its own on each image."""
    network = models.create(STUDENT, real.CLASSES, seed=3)
    classifier = network.module.fc
    with torch.no_grad():
        classifier.weight *= 30
        classifier.bias[:] = -torch.from_numpy(said(network.module, index, *STATS, TEACHER_SIDE).mean(0))
    return dataclasses.replace(network, mean=STATS[0], std=STATS[1])


def said(network: torch.nn.Module, index: Index, mean, std, side: int) -> np.ndarray:
    """f64 (N, C): what a network says of the good images as Pillow decodes them."""
    network = copy.deepcopy(network)
    images = np.stack([np.asarray(Image.open(io.BytesIO(index.read(row)))) for row in index.good])
    seen = torch.from_numpy((images / 255.0 - mean) / std).permute(0, 3, 1, 2)
    seen = torch.nn.functional.interpolate(seen, (side, side), mode="bilinear", antialias=True)
    with torch.no_grad():
        return network.double().eval()(seen).numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def test_labels_are_the_teachers_top_classes_of_what_students_see(options):
    bench = claims.Workbench.open(options)
    for index, source, count in ((bench.whole, options.data, 59), (bench.val, options.val, 29)):
        whole = Index.open(source)
        assert len(index) == len(index.good) == count == len(whole.good) and index.classes == 1000
        assert [index.read(row) for row in range(count)] == [whole.read(row) for row in whole.good]
        expected = said(real.network("lite0").module, index, *STATS, TEACHER_SIDE)
        kept = np.load(index.path / "teacher.npy")
        np.testing.assert_allclose(kept, expected, atol=1e-3)
        top = np.sort(expected, axis=1)
        clear = top[:, -1] - top[:, -2] > 2e-3
        assert clear.mean() > 0.9 and (index.records["label"] == expected.argmax(1))[clear].all()
    assert len(np.unique(bench.whole.records["label"])) > 10
    # What is there is taken as it is, and a teacher of another size names classes anew.
    assert claims.Workbench.open(options).val.path == bench.val.path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "SIZE", 2 * SIDE)
        other = claims.Workbench.open(options)
    assert other.val.path != bench.val.path and other.data.fingerprint != bench.data.fingerprint


def test_students_are_judged_by_agreement_and_kl(options, monkeypatch):
    """Students of random weights: both measures against NumPy, and their differences within a seed."""
    made: dict[tuple, models.Network] = {}

    def made_up(config):
        network = models.create(STUDENT, real.CLASSES, seed=100 + len(made))
        made[config.loss, config.augmented_fraction, config.seed] = network
        config.out.mkdir()
        models.save_weights(network.module, config.out / "model.safetensors")
        return {"val": {"top1": 0.25, "loss": 7.0}}

    monkeypatch.setattr(train_student, "run", made_up)
    found = claims.run(dataclasses.replace(options, arms="losses,teacher", samples=40))
    (row,) = found["tables"]["teachers"]
    assert row == {"trained": "elsewhere", "top1": 100.0}  # it agrees with itself
    (store,) = (options.work / "claims").glob("labels-*.zarr")
    manifest = cache.open(str(store)).manifest
    assert (manifest.teacher_size, manifest.classes, manifest.size) == (TEACHER_SIDE, 1000, SIDE)
    assert found["options"]["teacher_size"] == TEACHER_SIDE and manifest.samples == 40 == found["options"]["samples"]

    val = claims.Workbench.open(options).val
    p = softmax(np.load(val.path / "teacher.npy").astype(np.float64))
    kl = {}
    for key, network in made.items():
        q = softmax(said(network.module, val, *IMAGENET_STATS, SIDE))
        kl[key] = (p * np.log(p / q)).sum(1).mean()
    for name, (loss, fraction) in {"kd": ("kd", 0.5), "ce, originals alone": ("ce", 0.0)}.items():
        expected = [kl[loss, fraction, seed] for seed in (0, 1)]
        assert found["arms"][name]["kl"]["seeds"] == pytest.approx(expected, rel=1e-4)
        assert found["arms"][name]["top1"]["seeds"] == [25, 25]
    assert list(found["tables"])[2:] == ["losses", "losses: differences", "losses-KL", "losses-KL: differences"]
    rows = {row["comparison"]: row for row in found["tables"]["losses-KL: differences"]}
    expected = [kl["kd", 0.5, seed] - kl["ce", 0.5, seed] for seed in (0, 1)]
    assert rows["kd − ce"]["seeds"] == pytest.approx(expected, rel=1e-2, abs=1e-4)
    assert len(made) == 12


def test_a_kl_has_an_interval_and_top1_one_beside_it():
    """Of 1, 2, 3: deviation 1, and t of two degrees of freedom 4.303."""
    results = {
        setting("kd"): [{"top1": 0.5, "loss": 1.0, "kl": kl} for kl in (1.0, 2.0, 3.0)],
        setting("ce"): [{"top1": 0.25, "loss": 1.0, "kl": 0.5}] * 3,
    }
    half = 4.303 / 3**0.5
    found = arm(results[setting("kd")])
    assert found["kl"]["interval"] == pytest.approx([2 - half, 2 + half], rel=1e-4)
    assert found["top1"]["interval"] == [50, 50]
    difference = compared(less(setting("kd"), setting("ce")), results, "kl")
    assert difference["seeds"] == [0.5, 1.5, 2.5]
    assert difference["interval"] == pytest.approx([1.5 - half, 1.5 + half], rel=1e-4)
    assert compared(less(setting("kd"), setting("ce")), results)["seeds"] == [25, 25, 25]


def test_other_sets_have_the_keys_and_documents_that_they_had(digits, teacher, tmp_path):
    """So students that are finished stay so: the hashes are written out here once more."""
    options = Bench(suite="claims", data=digits, teacher=teacher, policy=POLICY, work=tmp_path, samples=40)
    bench = claims.Workbench.open(options)

    def key(*parts) -> str:
        text = json.dumps([torch.__version__, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    recipe = {"schedule": "cosine", "eval_epochs": 0, "student": bench.trial.student, "loss": "ccd", "few_shot": 1.0}
    recipe |= {"temperature": 4.0, "augmented_fraction": 0.5, "seed": 1, "epochs": 8, "batch_size": 64, "lr": 0.1}
    recipe |= {"warmup_epochs": 1, "student_views": 2}
    start = models.create(bench.trial.student, 10, seed=1).fingerprint
    which = setting("ccd", views=2)
    assert bench._student_key(which, 1, "store") == key("store", bench.val.fingerprint, start, recipe)
    taught = processes.Trained(teacher, "its", 0.5)
    policy = bench.trial.policy.to_config()
    assert bench._store(taught, which.policy, False)[0] == key(bench.data.fingerprint, "its", policy, 8)
    assert bench._store(taught, which.policy, True)[0] == key(bench.data.fingerprint, "its", policy, 8, "energy")
    assert bench.data.path.name == f"pool-{bench.whole.fingerprint[:16]}-40"
    assert "teacher_size" not in bench.about()
    made = arm([{"top1": 0.5, "loss": 1.0}])
    assert {name: set(values) for name, values in made.items()} == {
        name: {"mean", "sd", "seeds"} for name in ("top1", "cross_entropy")
    }


def test_what_a_user_gets_wrong_is_an_error(options, digits):
    for change, message in (
        ({"val": None}, "--teacher lite0 without --val"),
        ({"val": options.data}, "--val has the photographs of --data"),
        ({"teacher": "lite9"}, "--val without a teacher of photographs; found lite9"),
        ({"teacher": None, "data": digits}, "--val without a teacher of photographs; found no --teacher"),
    ):
        with pytest.raises(UserError, match=message):
            claims.run(dataclasses.replace(options, **change))
    assert trials.trial(options).teacher_size == TEACHER_SIDE
