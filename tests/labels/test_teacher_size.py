"""A teacher of one size answers for views of another: it sees them resized, students see them as they are."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import command, refused

import cache
from cache import UserError
from pipeline.config import PrecomputeTeacher
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels import precompute
from pipeline.networks import models
from pipeline.views import plan
from pipeline.views import policy as policies
from pipeline.views.loader import Loader

SIZE = 160  # of timm/test_vit3, which takes no other


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vit") / "w.safetensors"
    models.save_weights(models.create("timm/test_vit3", 10, seed=0).module, path)
    return f"timm/test_vit3@{path}"


@pytest.fixture(scope="module")
def options(vit, tmp_path_factory) -> PrecomputeTeacher:
    """Of a store that is made."""
    folder = tmp_path_factory.mktemp("store")
    prepare.build("synthetic:12", folder / "data", classes=10)
    config = PrecomputeTeacher(
        data=folder / "data",
        teacher=vit,
        store=str(folder / "labels.zarr"),
        views=1,
        policy=POLICY,
        codec="fp16",
        teacher_size=SIZE,
        device="cpu",
    )
    precompute.run(config)
    return config


def resized(image: np.ndarray, mean, std) -> np.ndarray:
    """u8 (S, S, 3) -> f32 (3, SIZE, SIZE), normalised, each channel resized by Pillow in floats."""
    scaled = (image / 255 - np.array(mean)) / np.array(std)
    channels = [Image.fromarray(scaled[..., i].astype(np.float32)) for i in range(3)]
    return np.stack([np.asarray(one.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for one in channels])


def test_labels_are_what_the_teacher_says_of_views_that_pillow_resizes(options, vit):
    """To float16, in which labels up to 4 lie 2⁻⁹ apart; the digests are of the views as students see them."""
    index, store = Index.open(options.data), cache.open(options.store)
    rows = index.good[:8]
    requests = plan.requests(index, policies.load(POLICY), 0, [(0, rows)])
    (batch,) = Loader(index, policies.load(POLICY), threads=1).batches(requests, digests=True)
    network = models.create(vit, 10)
    seen = [[resized(image, network.mean, network.std) for image in view] for view in batch.images.numpy()]
    with torch.inference_mode():
        expected = network.module.eval()(torch.from_numpy(np.array(seen)).flatten(0, 1)).unflatten(0, (2, -1))
    block = store.read_block(0, 0)
    found = store.codec.decode(block.codes[rows], store.dither_keys(0, rows))
    np.testing.assert_allclose(found, expected.numpy().swapaxes(0, 1), rtol=0, atol=2**-8)
    np.testing.assert_array_equal(block.digest[rows], cache.pair_digest(batch.digests))
    assert store.manifest.teacher_size == SIZE and store.manifest.size == batch.images.shape[2] != SIZE


def test_without_it_the_line_names_the_option_and_the_size(options, capsys, tmp_path):
    arguments = ["--data", options.data, "--teacher", options.teacher, "--views", 1, "--policy", POLICY]
    said = refused(capsys, "precompute-teacher", *arguments, "--store", tmp_path / "s.zarr")
    assert "does not take images of 12 x 12 pixels; found " in said and f"give --teacher-size {SIZE}, or a" in said
    assert not (tmp_path / "s.zarr").exists()


def test_a_store_resumes_with_its_own_size_only(options, tmp_path):
    precompute.run(options)
    policy = tmp_path / "large.yaml"
    policy.write_text(f"probability: 0.2\nops: imagenet\nbase: {{size: {SIZE}}}\n")
    with pytest.raises(UserError, match=f"another teacher_size; found {SIZE}, expected none; fix: give the store's"):
        precompute.run(dataclasses.replace(options, teacher_size=None, policy=str(policy)))


def test_student_verify_and_inspect_take_the_stores_size(options, capsys, tmp_path):
    store = ["--store", options.store, "--data", options.data]
    train = ["train-student", *store, "--student", "cifar/resnet8", "--epochs", 1, "--batch-size", 32]
    code, _, err = command(capsys, *train, "--check-teacher", options.teacher, "--out", tmp_path / "run")
    assert code == 0, err
    said = refused(capsys, *train, "--teacher-size", 64, "--out", tmp_path / "other")
    assert f"another teacher_size; found {SIZE}, expected 64" in said
    assert f" {SIZE} " in command(capsys, "store", "info", options.store)[1]
    for words in (["verify", options.store], ["inspect", options.store, "--out", tmp_path / "page.html"]):
        code, out, err = command(capsys, *words, "--data", options.data, "--teacher", options.teacher)
        assert code == 0, (out, err)


def test_a_live_teacher_is_resized_for(options, capsys, tmp_path):
    train = ["train-student", "--data", options.data, "--student", "cifar/resnet8", "--policy", POLICY, "--dry-run"]
    live = ["--live-teacher", options.teacher, "--loss", "kd", "--out", tmp_path / "run"]
    assert f"give --teacher-size {SIZE}" in refused(capsys, *train, *live)
    code, out, err = command(capsys, *train, *live, "--teacher-size", SIZE)
    assert code == 0 and "agrees with the labels" in out, err
    assert "--teacher-size needs a teacher" in refused(
        capsys, *train, "--loss", "ce", "--out", tmp_path / "o", "--teacher-size", SIZE
    )
