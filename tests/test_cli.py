"""The command line: what works exits with 0; whatever a user gets wrong is one line, exit code 2, no traceback."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import command, refused
from support.images import jpeg
from support.processes import exit_code
from support.tars import mixed_tar, tar_of

import cache
from pipeline import cli
from pipeline.__main__ import main
from pipeline.config import Evaluate, recipe_flags
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.networks import models
from pipeline.system.terminal import duration

MAIN = "import sys; from pipeline.__main__ import main; sys.exit(main())"  # what the console script does
IMAGE = jpeg(np.random.default_rng(0), 48, 40)


def precompute(digits, teacher, store, *more) -> list:
    options = {"--data": digits, "--teacher": teacher, "--store": store, "--views": 2, "--policy": POLICY}
    options |= {"--block-rows": 64}
    flat = [part for option in options.items() for part in option]
    return ["precompute-teacher", *flat, *more]


def student(digits, store, out, *more) -> list:
    options = {"--data": digits, "--store": store, "--student": "cifar/resnet8", "--out": out, "--epochs": 1}
    return ["train-student", *[part for option in options.items() for part in option], *more]


# --- what works


def test_a_reader_that_leaves_ends_the_command_quietly():
    ended = subprocess.run(
        [sys.executable, "-c", MAIN, "train-student", "--help"],
        stdout=(closed := closed_pipe()),
        stderr=subprocess.PIPE,
    )
    os.close(closed)
    assert (ended.returncode, ended.stderr) == (1, b"")


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_the_four_commands_from_images_to_a_student(digits, teacher, tmp_path, capsys):
    store, run = tmp_path / "s.zarr", tmp_path / "run"
    code, out, _ = command(capsys, *precompute(digits, teacher, store))
    assert code == 0 and "teacher pass" in out
    code, out, _ = command(capsys, *student(digits, store, run, "--val", digits, "--lr", 0.01))
    assert code == 0 and "top-1" in out
    weights = f"cifar/resnet8@{run / 'model.safetensors'}"
    code, out, _ = command(capsys, "evaluate", "--data", digits, "--model", weights, "--policy", POLICY)
    assert code == 0 and "top-1" in out and "45" in out
    code, out, _ = command(
        capsys, "train-teacher", "--data", digits, "--teacher", "cifar/resnet8", "--out", tmp_path / "t",
        "--policy", POLICY, "--epochs", 1, "--no-jda",
    )  # fmt: skip
    assert code == 0 and (tmp_path / "t" / "model.safetensors").exists()


def test_a_policy_beside_the_recipe_is_found_from_anywhere(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("policy: mine.yaml\n")
    assert recipe_flags(recipe, "evaluate", Evaluate, ()) == ["--policy", "mine.yaml"]
    (tmp_path / "mine.yaml").touch()
    assert recipe_flags(recipe, "evaluate", Evaluate, ()) == ["--policy", str(tmp_path / "mine.yaml")]


def test_flags_override_the_recipe_and_the_recipe_the_defaults(digits, labels, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "batch-size: 40\nloss: kd\ntrain-student: {epochs: 2, nesterov: true}\nevaluate: {batch_size: 3}\n"
    )
    flags = ["--config", recipe, "--loss", "ce", "--lr", "0.01"]
    arguments = ["train-student", "--data", digits, "--store", labels, "--student", "cifar/resnet8"]
    assert command(capsys, *arguments, "--out", tmp_path / "r", *flags)[0] == 0
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert [config[key] for key in ("batch_size", "epochs", "nesterov", "loss", "momentum")] == [40, 2, True, "ce", 0.9]


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["train-student", "--help"]])
def test_help_is_help(arguments, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert not code
    assert "usage: pipeline" in capsys.readouterr().out


@pytest.mark.parametrize("entry", [["-m", "pipeline"], ["-c", MAIN]])
def test_the_process_exits_with_two(entry, tmp_path):
    """The real exit code of a real process; and `-m pipeline` is what torchrun starts."""
    arguments = ["prepare", f"imagefolder:{tmp_path}/no", "--out", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, *entry, *arguments], capture_output=True, text=True)
    assert run.returncode == 2
    found = "found No such file or directory; fix: give a folder of folders"
    assert run.stderr == f"error: cannot read {tmp_path}/no; {found}\n"
    assert run.stdout == ""


# --- wrong names and flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-studnt"], "unknown command train-studnt; fix: did you mean train-student"),
        (["evaluate", "--data", "x"], "--model"),
        (["evaluate", "--data", "x", "--model", "y", "--batchsize", "3"], "batchsize"),
        (["evaluate", "--data", "x", "--model", "y", "--batch-size", "many"], "many"),
        (["prepare", "imagefoldr:x", "--out", "y"], "imagefold"),
        (["evaluate", "--config"], "--config needs a recipe"),
        (["evaluate", "--config", "/no/recipe.yaml"], "cannot read recipe /no/recipe.yaml; found No such file"),
    ],
)
def test_wrong_commands_and_flags(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sz: 3", "unknown recipe key batch_sz in {path}; fix: did you mean batch_size"),
        ("train-student: {optimizer: adam}", "unknown recipe key optimizer"),
        ("batch_size: many", "many"),
        ("- 3", "found list, expected a mapping"),
        ("a: [", "cannot parse recipe"),
        ("!!python/object/apply:os.abort []", "cannot parse recipe"),
    ],
)
def test_wrong_recipes(text, message, digits, labels, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message.format(path=path) in refused(capsys, *student(digits, labels, tmp_path / "r", "--config", path))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar/resnt8", "unknown network cifar/resnt8; expected resnet{6n+2}"),
        ("timm/resnt34", "did you mean timm/resnet34"),
        ("resnet34", "fix: put the family in front of the name"),
        ("cifar/resnet8@/no/weights.pt", "cannot read weights /no/weights.pt; found No such file"),
    ],
)  # fmt: skip
def test_unknown_networks(name, message, digits, labels, tmp_path, capsys):
    assert message in refused(capsys, *student(digits, labels, tmp_path / "r", "--student", name))
    assert message in refused(capsys, *precompute(digits, name, tmp_path / "s.zarr"))
    assert not (tmp_path / "r").exists() and not (tmp_path / "s.zarr").exists()


def test_a_teacher_needs_weights(digits, tmp_path, capsys):
    said = refused(capsys, *precompute(digits, "cifar/resnet8", tmp_path / "s.zarr"))
    assert "network cifar/resnet8 has no weights" in said
    assert not (tmp_path / "s.zarr").exists()


def test_a_network_for_another_size_of_image(digits, tmp_path, capsys):
    name, weights = "timm/vit_tiny_patch16_224", tmp_path / "weights.safetensors"
    models.save_weights(models.create(name, 10).module, weights)
    arguments = precompute(digits, f"{name}@{weights}", tmp_path / "s.zarr")
    assert "does not take images of 12 x 12 pixels" in refused(capsys, *arguments)
    assert not (tmp_path / "s.zarr").exists()


# --- wrong data


def test_sources_that_do_not_exist_or_hold_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    tar_of(tmp_path / "empty.tar", {})
    out = tmp_path / "out"
    for source in ("imagefolder:/no/such", f"imagefolder:{tmp_path}/empty", "webdataset:/no/*.tar",
                   f"webdataset:{tmp_path}/empty.tar", "cifar10:/no", "synthetic:0", "synthetic:x"):  # fmt: skip
        refused(capsys, "prepare", source, "--out", out)
        assert not out.exists()
    assert "/no" in refused(capsys, "train-teacher", "--data", "/no", "--teacher", "cifar/resnet8", "--out", out)
    assert "is not a prepared data set" in refused(
        capsys, "evaluate", "--data", tmp_path / "empty", "--model", "cifar/resnet8"
    )


def test_damaged_samples_are_counted_and_the_rest_is_used(tmp_path, capsys):
    """Truncated, empty and non-image files, a missing label, a label ≥ --classes, a tar that ends early."""
    members = {f"{i}.{e}": d for i in range(8) for e, d in (("jpg", IMAGE), ("cls", b"1"))}
    members |= {"cut.jpg": IMAGE[:-99], "cut.cls": b"1", "zero.jpg": b"", "zero.cls": b"1", "text.jpg": b"hello"}
    members |= {"text.cls": b"1", "nolabel.jpg": IMAGE, "beyond.jpg": IMAGE, "beyond.cls": b"10"}
    whole = tar_of(tmp_path / "a.tar", members)
    (tmp_path / "b.tar").write_bytes(mixed_tar(tmp_path / "b", 12).read_bytes()[:-20000])
    out = tmp_path / "out"
    code, text, _ = command(capsys, "prepare", f"webdataset:{tmp_path}/*.tar", "--out", out, "--classes", 10)
    assert code == 0
    words = " ".join(text.replace("│", " ").split())
    for cause in ("truncated: 1", "empty file: 1", "AVIF): 1", "no label: 1", "tar ends early: 1"):
        assert cause in words, words
    index = Index.open(out)
    bad = {index.key(row) for row in np.flatnonzero(index.records["status"])}
    assert {"cut", "zero", "text", "nolabel", "beyond"} <= bad
    assert whole.exists() and all(f"{i}" not in bad for i in range(8))


def test_an_image_folder_with_one_bad_file(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(IMAGE)
    (tmp_path / "in" / "a" / "bad.jpg").write_bytes(IMAGE[:300])
    code, _, _ = command(capsys, "prepare", f"imagefolder:{tmp_path / 'in'}", "--out", tmp_path / "out")
    assert code == 0
    assert len(Index.open(tmp_path / "out").good) == 6


def test_an_output_that_exists(digits, labels, teacher, tmp_path, capsys):
    exists = tmp_path / "there"
    exists.mkdir()
    (exists / "mine").write_text("precious")
    assert "exists" in refused(capsys, "prepare", "digits", "--out", exists)
    assert "exists; fix: pass --resume" in refused(capsys, *student(digits, labels, exists))
    arguments = ["--data", digits, "--teacher", "cifar/resnet8", "--policy", POLICY, "--out", exists]
    assert "exists; fix: pass --resume" in refused(capsys, "train-teacher", *arguments)
    assert "is not a store" in refused(capsys, *precompute(digits, teacher, exists))
    assert [path.name for path in exists.iterdir()] == ["mine"]


# --- wrong stores


@pytest.fixture()
def harmed(labels, tmp_path) -> Path:
    """A copy of the store, to be damaged."""
    return Path(shutil.copytree(labels, tmp_path / "harmed.zarr"))


def test_a_store_of_another_data_set(labels, tmp_path, capsys):
    assert command(capsys, "prepare", "synthetic:6", "--out", tmp_path / "d", "--classes", "10")[0] == 0
    assert "the store has another dataset; found" in refused(capsys, *student(tmp_path / "d", labels, tmp_path / "r"))


def test_a_store_of_another_class_count(labels, digits, tmp_path, capsys, monkeypatch):
    """Same samples under another number of classes are another data set, and say so; so does the manifest alone."""
    index = Index.open(digits)
    other = shutil.copytree(index.path, tmp_path / "d")
    from pipeline.data import index as indices
    from pipeline.data.classes import Classes

    indices.write(
        other,
        np.array(index.records),
        [str(path) for path in index.shards],
        [],
        source="x",
        classes=Classes(12),
    )
    assert "another dataset" in refused(capsys, *student(other, labels, tmp_path / "r"))
    with pytest.raises(cache.UserError, match="another classes; found 10, expected 12"):
        cache.check(cache.open(labels).manifest, classes=12)


def test_a_store_of_another_policy_or_teacher(labels, digits, teacher, tmp_path, capsys):
    def line(*more):
        return refused(capsys, *student(digits, labels, tmp_path / "r", *more))

    assert "another base.centre" in line("--policy", "cifar10") or "another policy" in line("--policy", "cifar10")
    assert "another teacher; found cifar/resnet8, expected cifar/resnet14" in line("--teacher", "cifar/resnet14")
    path = tmp_path / "other.safetensors"
    models.save_weights(models.create("cifar/resnet8", 10, seed=9).module, path)
    assert "another teacher_weights" in line("--teacher", f"cifar/resnet8@{path}")
    assert "another teacher_weights" in refused(capsys, *precompute(digits, f"cifar/resnet8@{path}", labels))
    assert not (tmp_path / "r").exists()
    assert command(capsys, *student(digits, labels, tmp_path / "ok", "--policy", POLICY, "--teacher", teacher))[0] == 0


def test_a_store_with_missing_blocks(harmed, digits, tmp_path, capsys):
    (harmed / "commit" / "c" / "1" / "0").unlink()
    err = refused(capsys, *student(digits, harmed, tmp_path / "r"))
    assert "has missing blocks; found 1" in err and "fix: run precompute-teacher again, it resumes" in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("array", ["pairs", "weight", "digest"])
def test_a_corrupt_chunk(array, harmed, digits, tmp_path, capsys):
    (path,) = (harmed / array / "c" / "0" / "1").rglob("*0") if array == "pairs" else [harmed / array / "c/0/1"]
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    err = refused(capsys, *student(digits, harmed, tmp_path / "r"))
    assert "is damaged: array" in err and "view 0, block 1" in err and "run precompute-teacher again" in err


def test_no_store_at_all(digits, tmp_path, capsys):
    assert "no store at" in refused(capsys, *student(digits, tmp_path / "no.zarr", tmp_path / "r"))
    (tmp_path / "file").write_text("x")
    assert "is not a store" in refused(capsys, *student(digits, tmp_path / "file", tmp_path / "r"))


# --- a disk that is full


def limited(limit: int, folder: Path, arguments: list) -> tuple[int | None, list[str]]:
    """Exit code and lines on stderr of a command whose writes fail beyond `limit` bytes of a file, as they would on a
    full disk."""
    said = folder / "stderr"
    code = exit_code(_limited, limit, said, [str(argument) for argument in arguments])
    return code, said.read_text().splitlines()


def _limited(limit: int, said: Path, arguments: list[str]) -> None:
    sys.argv, sys.stdout, sys.stderr = ["pipeline", *arguments], io.StringIO(), said.open("w")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main())


def test_a_full_disk_while_labels_are_written(digits, teacher, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    code, said = limited(2000, tmp_path, precompute(digits, teacher, store, "--codec", "fp16"))
    assert code == 2 and "cannot write store" in said[-1] and said[-1].startswith("error: "), said
    assert all(line.startswith("warning: teacher") for line in said[:-1]), said  # it is none
    if (store / "zarr.json").exists():
        assert len(cache.open(store).missing_blocks()) == 2 * 3
    assert command(capsys, *precompute(digits, teacher, store, "--codec", "fp16"))[0] == 0
    assert cache.open(store).missing_blocks() == []


def test_a_full_disk_while_a_checkpoint_is_written(digits, labels, tmp_path, capsys):
    code, said = limited(20000, tmp_path, student(digits, labels, tmp_path / "r"))
    assert code == 2 and said[-1].startswith("error: ") and "Traceback" not in "".join(said), said
    assert all(line.startswith("train ") for line in said[:-1]), said  # how far it is, on a slow machine
    assert not (tmp_path / "r" / "checkpoint.pt").exists()
    assert command(capsys, *student(digits, labels, tmp_path / "r", "--resume"))[0] == 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.5, "0.5 s"),
        (41.26, "41.3 s"),
        (99.9, "99.9 s"),
        (99.96, "1.67 min"),
        (5996, "99.9 min"),
        (457200, "127 h"),
        (5998, "1.67 h"),
        (3600000.0, "1,000 h"),
        (44446000, "12,300 h"),
        (4.4446e9, "1,230,000 h"),
    ],
)
def test_durations_have_three_digits(seconds, said):
    assert duration(seconds) == said
