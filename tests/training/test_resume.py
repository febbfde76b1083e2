"""What a run may be resumed with, and that no checkpoint holds weights that are lost."""

import dataclasses
import json
import shutil
import sys
import types

import pytest
import torch
import yaml

from cache import UserError
from pipeline.config import TrainStudent, TrainTeacher
from pipeline.data import prepare
from pipeline.demo import POLICY
from pipeline.training import train_student, train_teacher


@pytest.fixture(scope="module")
def whole(digits, labels, tmp_path_factory) -> TrainStudent:
    """A finished run."""
    out = tmp_path_factory.mktemp("resume") / "whole"
    run = TrainStudent(
        data=digits, store=labels, student="cifar/resnet8", out=out, epochs=2, batch_size=16, lr=0.05, device="cpu"
    )
    train_student.run(run)
    return run


def test_other_options_are_refused(whole):
    with pytest.raises(UserError, match=r"--lr differs; found 0.1, expected 0.05"):
        train_student.run(dataclasses.replace(whole, resume=True, lr=0.1))


def test_a_run_goes_on_wherever_it_and_its_sources_lie(whole, tmp_path):
    run = dataclasses.replace(
        whole, out=tmp_path / "run", resume=True, data=tmp_path / "data", store=str(tmp_path / "labels.zarr")
    )
    for ours, theirs in ((run.out, whole.out), (run.data, whole.data), (run.store, whole.store)):
        shutil.copytree(theirs, ours)
    train_student.run(run)


def test_a_run_made_before_an_option_existed_goes_on(whole, tmp_path):
    run = dataclasses.replace(whole, out=tmp_path / "run", resume=True)
    shutil.copytree(whole.out, run.out)
    made_with = json.loads((run.out / "config.json").read_text())
    del made_with["kd_warmup_epochs"]
    (run.out / "config.json").write_text(json.dumps(made_with))
    (run.out / "sources.json").unlink()
    train_student.run(run)
    with pytest.raises(UserError, match="--kd-warmup-epochs differs; found 3, expected 0"):
        train_student.run(dataclasses.replace(run, kd_warmup_epochs=3))


@pytest.mark.parametrize("name", ["dataset", "labels.teacher_weights", "labels.seed", "labels.codec", "labels.decoder"])
def test_other_sources_are_refused(whole, tmp_path, name):
    run = dataclasses.replace(whole, out=tmp_path / "run", resume=True)
    shutil.copytree(whole.out, run.out)
    made_of = json.loads((run.out / "sources.json").read_text())
    group, _, last = name.rpartition(".")
    (made_of[group] if group else made_of)[last] = "other"
    (run.out / "sources.json").write_text(json.dumps(made_of))
    with pytest.raises(UserError, match=rf"cannot resume .*: another {name}; found .*, expected other"):
        train_student.run(run)


def test_a_policy_file_that_changed_is_refused(digits, tmp_path):
    """Nothing else than its content tells."""
    policy = tmp_path / "mine.yaml"
    shutil.copy(POLICY, policy)
    run = TrainTeacher(
        data=digits,
        teacher="cifar/resnet8",
        policy=str(policy),
        out=tmp_path / "run",
        epochs=1,
        device="cpu",
        resume=True,
    )
    train_teacher.run(run)
    train_teacher.run(run)
    content = yaml.safe_load(policy.read_text())
    policy.write_text(yaml.safe_dump(content | {"probability": 0.9}))
    with pytest.raises(UserError, match=r"another policy.probability; found 0.9, expected 0.3"):
        train_teacher.run(run)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
@pytest.mark.parametrize("name", ["config.json", "sources.json"])
def test_a_damaged_record_is_one_line(whole, tmp_path, name, content):
    run = dataclasses.replace(whole, out=tmp_path / "run", resume=True)
    shutil.copytree(whole.out, run.out)
    (run.out / name).write_text(content)
    with pytest.raises(UserError, match=f"damaged .*{name}"):
        train_student.run(run)


@pytest.mark.parametrize("log_steps", [1, 1000])
def test_a_run_that_diverges_ends_and_keeps_its_last_sound_checkpoint(whole, tmp_path, log_steps):
    run = dataclasses.replace(whole, out=tmp_path / "run", lr=1e9, checkpoint_steps=1, log_steps=log_steps)
    with pytest.raises(UserError, match=r"training diverged: weights are not finite; found at step .* --lr"):
        train_student.run(run)
    state = torch.load(run.out / "checkpoint.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert not (run.out / "model.safetensors").exists()


def test_a_resumed_run_is_the_same_one_to_wandb(whole, tmp_path, monkeypatch):
    """And one of the same folder name elsewhere is another."""
    started = []

    class Run:
        def log(self, *_, **__): ...
        def finish(self): ...

    def init(**options):
        started.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = dataclasses.replace(whole, epochs=1, wandb="project", resume=True)
    for folder in ("a", "a", "b"):
        train_student.run(dataclasses.replace(run, out=tmp_path / folder / "run"))
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    train_student.run(dataclasses.replace(run, out=tmp_path / "moved" / "run"))
    first, again, other, moved = (options["id"] for options in started)
    assert first == again == moved != other
    assert started[0]["config"]["student"] == "cifar/resnet8" and started[0]["resume"] == "allow"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"live_teacher": "cifar/resnet8"}, "network cifar/resnet8 has no weights"),
        ({"check_teacher": "cifar/resnet8@none.safetensors"}, "none.safetensors"),
        ({"student": "timm/vit_tiny_patch16_224"}, "does not take images of 12 x 12 pixels"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov without momentum"),
        ({"val": "WIDER"}, "--val has other classes"),
        ({"wandb": "project"}, "--wandb needs a package"),
    ],
    ids=str,
)
def test_what_is_wrong_from_the_start_leaves_no_run(whole, tmp_path, monkeypatch, change, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    if "val" in change:
        prepare.build("synthetic:24", tmp_path / "wider")
        change = {"val": tmp_path / "wider"}
    with pytest.raises(UserError, match=message):
        train_student.run(dataclasses.replace(whole, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()
