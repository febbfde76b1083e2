"""Small inputs that people bring, in the folder that the environment variable CASES names: each ends as it should.

One section for each kind; what a line should say is a pattern. Nothing may end in a traceback.
"""

import os
import re
from pathlib import Path

import pytest
from support.commands import command, refused

from pipeline import cli
from pipeline.config import TrainTeacher

CASES = Path(os.environ.get("CASES", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("CASES" not in os.environ, reason="CASES names no folder of cases"),
]
POLICY = CASES / "training" / "policy.yaml"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of cases -> a data set, prepared once."""
    made = {}

    def of(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("data") / case.replace("/", "-")
            assert cli.main(["prepare", f"imagefolder:{CASES / case}", "--out", str(made[case])]) == 0
        return made[case]

    return of


# --- weights


RIGHT = (
    *(
        "right.pth",
        "right.safetensors",
        "right.pth.tar",
        "right.ckpt",
        "right.bin",
        "right",
        "parallel.pth",
        "half.pth",
    ),
    *("double.pth", "namespace.pth", "only_ema.pth", "compiled.pth", "compiled_in_parallel.pth", "numpy_metric.pth"),
    *("parallel_in_compiled.pth", "lightning.ckpt", "lightning.pth", "safetensors_named.pth"),
)
SAID = {
    "ema_beside_raw.pth": "took state_dict_ema .*#state_dict takes state_dict",
    "model_beside_state_dict.pth": "took state_dict; .*#model takes model",
    "averaged.pth": "left out the counters 'n_averaged'",
    "thop.pth": "left out the counters 'total_ops', 'layer1.0.conv1.total_params'",
    "before_2018.pth": "filled 9 absent num_batches_tracked",
}
REFUSED = {
    "nan.pth": "not finite; found 192 of 192 values of 'fc.weight'",
    "page.pth": "found an HTML page",
    "pointer.safetensors": "found a Git LFS pointer.*git lfs pull",
    "empty.pth": "found an empty file",
    "five_classes.pth": "another number of classes; found 5, expected 3",
}


def evaluate(prepared, weights: str) -> list:
    data = prepared("folders/split/val")
    model = f"cifar/resnet8@{CASES / 'weights' / weights}"
    return ["evaluate", "--data", data, "--policy", POLICY, "--model", model]


@pytest.mark.parametrize("case", [*RIGHT, *SAID])
def test_weights_that_are_right_score_every_image(prepared, capsys, case):
    code, out, err = command(capsys, *evaluate(prepared, case))
    assert code == 0 and "100.00 %" in out
    assert re.search(SAID[case], err) if case in SAID else "note:" not in err


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_are_not_are_refused(prepared, capsys, case):
    assert re.search(REFUSED[case], refused(capsys, *evaluate(prepared, case)))


def test_a_start_of_other_classes_gets_a_new_classifier(prepared, capsys, tmp_path):
    start = f"cifar/resnet8@{CASES / 'weights' / 'five_classes.pth'}"
    options = ["--loss", "ce", "--policy", POLICY, "--epochs", 1, "--out", tmp_path / "out"]
    code, _, err = command(
        capsys, "train-student", "--data", prepared("folders/split/val"), "--student", start, *options
    )
    assert code == 0 and "a new classifier for 3 classes, as theirs is for 5" in err


def test_a_teacher_of_another_order_is_warned_of_before_the_pass(prepared, capsys, tmp_path):
    """timm's order, 1, 2, 10, beside torchvision's: two of the three classes are mixed up."""
    teacher = f"cifar/resnet8@{CASES / 'weights' / 'natural_order.pth'}"
    code, out, err = command(capsys, "evaluate", "--data", prepared("folders/numbers/val"), "--model", teacher,
                             "--policy", POLICY)  # fmt: skip
    assert code == 0 and "33.33 %" in out and "--class-order" in err
    options = ["--data", prepared("folders/numbers/train"), "--teacher", teacher, "--policy", POLICY, "--views", 1]
    code, out, err = command(capsys, "precompute-teacher", *options, "--store", tmp_path / "s.zarr", "--dry-run")
    assert code == 0 and "agrees with the labels of" in out and "33.3 % of 18 samples" in out
    assert "agrees with the labels of 33.3 %" in err and "numbered as those of the data set" in err


# --- training


def training(command: str, network: str, out: Path, *more) -> list:
    role = "--teacher" if command == "train-teacher" else "--student"
    return [command, role, network, "--policy", POLICY, "--epochs", 1, "--out", out, *more]


@pytest.mark.parametrize("more", [[], ["--accumulate", 4]])
def test_nine_images_in_batches_of_four_train(prepared, capsys, tmp_path, more):
    arguments = training("train-teacher", "timm/resnet18", tmp_path / "out", "--no-jda", "--batch-size", 4, *more)
    assert command(capsys, *arguments, "--data", prepared("training/nine"))[0] == 0


@pytest.mark.parametrize("fraction", [0, 1])
def test_nine_images_with_views_of_one_kind_train(prepared, capsys, tmp_path, fraction):
    more = ["--loss", "ce", "--batch-size", 4, "--augmented-fraction", fraction]
    arguments = training("train-student", "timm/resnet18", tmp_path / "out", *more)
    assert command(capsys, *arguments, "--data", prepared("training/nine"))[0] == 0


def test_a_batch_of_one_is_refused(prepared, capsys, tmp_path):
    arguments = training("train-teacher", "timm/resnet18", tmp_path / "out", "--no-jda", "--batch-size", 1)
    assert "--batch-size is too small" in refused(capsys, *arguments, "--data", prepared("training/nine"))
    assert not (tmp_path / "out").exists()


def test_dkd_of_one_class_is_refused(prepared, capsys, tmp_path):
    teacher = f"cifar/resnet8@{CASES / 'weights' / 'right.pth'}"
    arguments = training("train-student", "cifar/resnet8", tmp_path / "out", "--loss", "dkd", "--live-teacher", teacher)
    assert "dkd needs two classes" in refused(capsys, *arguments, "--data", prepared("training/one_class"))


@pytest.mark.parametrize("codec", ["auto", "fp16"])
def test_one_image_is_labelled(prepared, capsys, tmp_path, codec):
    data = ["--data", prepared("training/one_image"), "--policy", POLICY]
    assert command(capsys, *training("train-teacher", "cifar/resnet8", tmp_path / "t"), "--data", data[1])[0] == 0
    teacher = f"cifar/resnet8@{tmp_path / 't' / 'model.safetensors'}"
    store = ["--store", tmp_path / "s.zarr", "--views", 1, "--codec", codec]
    assert command(capsys, "precompute-teacher", *data, "--teacher", teacher, *store)[0] == 0


def test_a_run_that_diverged_says_what_to_do(prepared, capsys, tmp_path):
    arguments = training("train-teacher", "timm/resnet18", tmp_path / "out", "--lr", 1e9, "--epochs", 20)
    said = refused(capsys, *arguments, "--data", prepared("training/nine"))
    assert "training diverged" in said and "start anew in another --out" in said


# --- recipes


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("key_twice.yaml", "a key twice; found epochs in lines 1 and 3"),
        ("dash_and_underscore.yaml", "a key twice; found batch-size and batch_size"),
        ("quoted_no.yaml", "jda; found 'no', expected true or false"),
        ("unknown_key.yaml", "unknown recipe key epoch in .*; fix: did you mean epochs"),
        ("tab.yaml", "cannot parse recipe .*line 1, column 8"),
    ],
)
def test_recipes_that_are_not_clear_are_refused(capsys, case, message):
    recipe = ["--data", "d", "--config", CASES / "recipes" / case]
    assert re.search(message, refused(capsys, *training("train-teacher", "cifar/resnet8", Path("o")), *recipe))


def test_a_recipe_of_comments_is_empty():
    recipe = str(CASES / "recipes" / "only_comments.yaml")
    flags = ["--config", recipe, "--data", "d", "--teacher", "t", "--out", "o"]
    options = cli._parse("train-teacher", TrainTeacher, flags)
    assert options == TrainTeacher(data=Path("d"), teacher="t", out=Path("o"))
