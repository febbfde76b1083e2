"""Data whose samples nobody labelled, and teachers of other classes than the data's, from images to a student."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.commands import command, refused
from support.images import jpeg
from support.tars import tar_of

import cache
from pipeline.data.classes import Classes, outputs
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.networks import models

IMAGES = {f"i{i:02d}": jpeg(np.random.default_rng(i), 40, 36) for i in range(24)}
STUDENT = ["--student", "cifar/resnet8", "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--seed", 4]


def passed(capsys, *arguments) -> str:
    code, out, err = command(capsys, *arguments)
    assert code == 0, err
    return out


def taught(capsys, data, store, out, *more) -> dict[str, torch.Tensor]:
    passed(capsys, "train-student", "--data", data, "--store", store, "--out", out, *STUDENT, *more)
    return load_file(out / "model.safetensors")


def labelled(capsys, data, teacher, store, *more) -> str:
    options = ["--views", 1, "--policy", POLICY, "--codec", "int8", "--device", "cpu", "--teacher", teacher, *more]
    return passed(capsys, "precompute-teacher", "--data", data, "--store", store, *options)


def test_unlabelled_tars_teach_what_the_same_tars_teach_with_labels(capsys, tmp_path, teacher):
    """At alpha 0 labels say nothing: the student is the same to the bit, whatever they would have been."""
    images = {f"{key}.jpg": data for key, data in IMAGES.items()}
    numbers = {f"{key}.cls": str(7 * i % 10).encode() for i, key in enumerate(IMAGES)}
    students = []
    for name, members, flags in (("bare", images, ["--unlabelled"]), ("known", images | numbers, [])):
        tar = tar_of(tmp_path / f"{name}.tar", members)
        data, store = tmp_path / name, tmp_path / f"{name}.zarr"
        out = passed(capsys, "prepare", f"webdataset:{tar}", "--out", data, "--classes", 10, *flags)
        assert ("samples have no labels" in out) == (name == "bare")
        assert ("agrees with the labels" in labelled(capsys, data, teacher, store)) == (name == "known")
        students.append(taught(capsys, data, store, tmp_path / f"run-{name}", "--alpha", 0))
    bare, known = students
    assert bare.keys() == known.keys() and all(torch.equal(bare[key], known[key]) for key in bare)


def test_a_flat_folder_is_prepared_and_what_needs_labels_is_refused(capsys, tmp_path, teacher):
    source, data, store = tmp_path / "images", tmp_path / "data", tmp_path / "s.zarr"
    (source / "deeper" / "still").mkdir(parents=True)
    for i, (key, image) in enumerate(IMAGES.items()):
        (source / ("deeper/still" if i % 3 == 0 else "") / f"{key}.jpg").write_bytes(image)
    (source / "notes.txt").write_text("no image")
    prepare = ["prepare", f"imagefolder:{source}", "--unlabelled", "--out", data]
    assert "--classes N" in refused(capsys, *prepare)
    assert "drop --class-order" in refused(capsys, *prepare, "--classes", 10, "--class-order", "natural")
    assert "--unlabelled means nothing to digits" in refused(
        capsys, "prepare", "digits", "--unlabelled", "--classes", 10, "--out", data
    )
    assert "25 found = 24 used + 0 quarantined + 1 left out" in passed(capsys, *prepare, "--classes", 10)
    index = Index.open(data)
    assert len(index) == 24 and index.classes == 10 and index.class_list.unlabelled
    assert {index.key(row) for row in range(24)} >= {"i01", "deeper/still/i00"}

    labelled(capsys, data, teacher, store)
    student = ["train-student", "--data", data, "--store", store, "--out", tmp_path / "run", *STUDENT]
    for arguments, said in (
        (student, "--alpha is the share of the hard loss; found 0.5 and data without labels, expected 0"),
        ([*student, "--loss", "ce"], "--loss ce needs labels"),
        ([*student, "--loss", "dkd", "--alpha", 0], "--loss dkd needs labels"),
        ([*student, "--alpha", 0, "--val", data], "--val has no labels"),
        (["evaluate", "--data", data, "--model", teacher], "--data has no labels"),
        (["train-teacher", "--data", data, "--teacher", "cifar/resnet8", "--out", tmp_path / "run"], "no labels"),
    ):
        assert said in refused(capsys, *arguments)
    assert not (tmp_path / "run").exists()
    taught(capsys, data, store, tmp_path / "run", "--alpha", 0, "--loss", "kd")


def test_a_teacher_of_more_classes_answers_for_those_that_the_map_leads_to(capsys, tmp_path, digits):
    """Labels are the chosen outputs of the teacher, verify finds them so, and a student learns them as its own."""
    module = models.create("cifar/resnet8", 25, seed=5).module.eval()
    models.save_weights(module, tmp_path / "wide.safetensors")
    chosen = [24, 3, 7, 0, 11, 5, 19, 2, 13, 8]
    (tmp_path / "map.yaml").write_text("".join(f"{label}: {output}\n" for label, output in enumerate(chosen)))
    store, wide = tmp_path / "s.zarr", f"cifar/resnet8@{tmp_path}/wide.safetensors"
    other = ["--teacher-classes", 25, "--class-map", tmp_path / "map.yaml"]
    labelled(capsys, digits, wide, store, *other)
    narrow = tmp_path / "narrow.safetensors"
    state = models.create("cifar/resnet8", 10, seed=5).module
    weights = module.state_dict()
    state.load_state_dict({k: v[chosen] if len(v.shape) and v.shape[0] == 25 else v for k, v in weights.items()})
    models.save_weights(state, narrow)
    labelled(capsys, digits, f"cifar/resnet8@{narrow}", tmp_path / "n.zarr")
    planes = [cache.open(str(path)).load_plane(0) for path in (store, tmp_path / "n.zarr")]
    # A layer of 25 outputs is summed in another order than one of 10: half a step of int8 at most.
    difference = planes[0].codes[:, 16:].astype(int) - planes[1].codes[:, 16:].astype(int)
    assert np.abs((difference + 128) % 256 - 128).max() <= 1

    verify = ["verify", store, "--data", digits, "--teacher", wide, "--device", "cpu"]
    assert "findings" in passed(capsys, *verify, *other)
    (tmp_path / "map.yaml").write_text("".join(f"{label}: {label}\n" for label in range(10)))
    with pytest.raises(SystemExit):  # of other outputs it is another teacher
        command(capsys, *verify, *other)
    taught(capsys, digits, store, tmp_path / "run")


def test_names_lead_to_outputs_by_name_or_number():
    classes, teacher = Classes(3, ("ant", "bee", "fly")), Classes(5, ("a", "b", "c", "bee", "e"))
    assert outputs(classes, teacher, {"ant": "e", "fly": "b"}).tolist() == [4, 3, 1]
    assert outputs(classes, Classes(9), {"ant": "8", "bee": "0", "fly": "1"}).tolist() == [8, 0, 1]
    assert outputs(Classes(2), Classes(9), {"1": "7"}).tolist() == [0, 7]
    for names, said in (
        ({"ant": "e"}, "class 'fly' leads to no output of the teacher; found 'fly'"),
        ({"ant": "e", "fly": "5"}, "found '5', expected a name of the teacher's"),
        ({"ant": "e", "fly": "3"}, "two classes lead to one output; found 'bee' and 'fly'"),
    ):
        with pytest.raises(cache.UserError, match=said):
            outputs(classes, teacher, names)
