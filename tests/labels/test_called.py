"""Any callable from images to logits as a teacher: from Python, and by its name on the command line."""

import numpy as np
import pytest
import torch

import cache
from pipeline import Replay, UserError, cli, precompute
from pipeline.demo import POLICY
from pipeline.networks import models

NETWORKS = [models.create("cifar/resnet8", 10, seed=seed).module.eval() for seed in (1, 2)]
OPTIONS = {"views": 1, "policy": POLICY, "codec": "fp16", "device": "cpu", "batch_size": 32}
MODULE = """
import torch
from pipeline.networks import models
networks = [models.create("cifar/resnet8", 10, seed=seed).module.eval() for seed in (1, 2)]
def answer(images):
    return torch.stack([network(images) for network in networks]).mean(0)
def few(images):
    return answer(images)[:, :9]
def lost(images):
    return answer(images) * float("nan")
number = 3
"""


def ensemble(images: torch.Tensor) -> torch.Tensor:
    return torch.stack([network(images) for network in NETWORKS]).mean(0)


def as_array(images: torch.Tensor) -> np.ndarray:
    """As another framework would answer."""
    return ensemble(images).numpy()


def decoded(path, digits) -> np.ndarray:
    """All labels of view 0, f32 (N, 2, C)."""
    store = cache.open(str(path))
    rows = np.arange(store.manifest.samples)
    return store.codec.decode(store.load_plane(0).codes, store.dither_keys(0, rows))


@pytest.mark.parametrize("teacher", [ensemble, as_array])
def test_a_store_holds_what_a_callable_answers(digits, tmp_path, teacher):
    precompute(digits / "train", teacher, tmp_path / "s.zarr", **OPTIONS)
    with Replay(digits / "train", tmp_path / "s.zarr", batch_size=50, epochs=1, device="cpu") as replay:
        for batch in replay:
            with torch.inference_mode():
                expected = ensemble(batch.images).unflatten(0, (2, -1)).swapaxes(0, 1)
            np.testing.assert_allclose(batch.teacher.logits().numpy(), expected.numpy(), rtol=2e-3, atol=1e-3)


def test_a_module_is_known_by_its_weights(digits, tmp_path):
    precompute(digits / "train", NETWORKS[0], tmp_path / "s.zarr", **OPTIONS)
    with pytest.raises(UserError, match="teacher_weights"):
        precompute(digits / "train", NETWORKS[1], tmp_path / "s.zarr", **OPTIONS)


def test_a_callable_is_named_on_the_command_line(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "own_teacher_of_a_test.py"
    module.write_text(MODULE)

    def command(name: str, *more: str) -> int:
        arguments = [
            "--data",
            digits / "train",
            "--store",
            "s.zarr",
            "--views",
            "1",
            "--policy",
            POLICY,
            "--codec",
            "fp16",
        ]
        teacher = ["--teacher", f"python:own_teacher_of_a_test.{name}", "--device", "cpu"]
        return cli.main(["precompute-teacher", *map(str, arguments), *teacher, *more])

    for name, said in (
        ("few", "is no classifier; found (1, 9), expected (1, 10)"),
        ("lost", "answers a black image with NaN or infinity"),
        ("none", "no callable none in own_teacher_of_a_test; found NoneType"),
        ("number", "no callable number in own_teacher_of_a_test; found int"),
    ):
        assert command(name) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "s.zarr").exists()
    assert command("answer") == 0
    precompute(digits / "train", ensemble, tmp_path / "other.zarr", **OPTIONS)
    np.testing.assert_array_equal(decoded("s.zarr", digits), decoded("other.zarr", digits))
    module.write_text(MODULE + "# changed\n")
    assert command("answer", "--views", "2") == 2
    assert "teacher_weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("python:", "unknown teacher; found python:, expected python:MODULE.FUNCTION"),
        ("python:json", "unknown teacher"),
        ("python:no.such", "cannot import no; found ModuleNotFoundError"),
        ("python:json.1", "unknown teacher"),
    ],
)
def test_what_is_no_callable_is_one_line(spec, said):
    with pytest.raises(UserError) as caught:
        models.trained(spec, 10)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_callable_without_an_identity_is_refused():
    with pytest.raises(UserError, match="nothing identifies"):
        models.of_callable(eval("lambda images: images"), 10)
    said = type("Said", (), {"fingerprint": "v1", "__call__": lambda self, images: images})()
    assert models.of_callable(said, 10).fingerprint != models.of_callable(ensemble, 10).fingerprint
