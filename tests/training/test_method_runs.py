"""Every method by its switch: 20 steps on tiny images from one store, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from support.runs import weights
from support.tiny import Tiny, taught

import cache
from cache import UserError
from pipeline.config import Loss, TrainStudent, Verify
from pipeline.data.index import Index
from pipeline.labels import precompute, verify
from pipeline.networks import models
from pipeline.networks.placed import placed
from pipeline.training import objectives, train_student, trainee
from pipeline.training.methods import METHODS, make
from pipeline.views import policy as policies

STEPS = 20


def student(tiny: Tiny, out: Path, loss: str, **changes) -> TrainStudent:
    config = TrainStudent(
        data=tiny.data, student="cifar/resnet8", store=str(tiny.stores / "store"), out=out, loss=loss, epochs=4,
        batch_size=8, lr=0.01, device="cpu", log_steps=5, threads=1,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("loss", [name for name in get_args(Loss) if "features" not in METHODS[name].needs])
def test_each_method_runs_by_its_switch(tiny, tmp_path, loss):
    live = tiny.teacher if "attack" in METHODS[loss].needs else None
    train_student.run(run := student(tiny, tmp_path / "run", loss, live_teacher=live))
    steps = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert sum("step" in record for record in steps) == STEPS // 5
    assert all(np.isfinite(record["loss"]) and record["loss"] > 0 for record in steps)
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "plain"}, "--loss energy needs the teacher's energies; found a store without them; fix: run"),
        ({"loss_option": ("share=0.6",)}, "--loss-option share out of range; found 0.6, expected 0 to 0.5"),
        ({"loss_option": ("beta=2",)}, "--loss energy has no option beta"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_anything_is_written(tiny, tmp_path, changes, message):
    changes = {**changes, "store": str(tiny.stores / changes.get("store", "store"))}
    with pytest.raises(UserError, match=message):
        train_student.run(student(tiny, tmp_path / "run", "energy", **changes))
    assert not (tmp_path / "run").exists()


def test_two_momenta_that_do_not_suit_are_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match="--momentum does not suit two momenta"):
        train_student.run(student(tiny, tmp_path / "run", "mjkd", momentum=0.99))
    assert not (tmp_path / "run").exists()


def test_a_live_teacher_has_energies_of_its_own(tiny, tmp_path):
    train_student.run(student(tiny, tmp_path / "run", "energy", live_teacher=tiny.teacher, epochs=1))


def test_stored_energies_are_those_of_the_teachers_logits(tiny):
    """fp16 keeps raw logits of some 3 to 1e-3 each; the step is 4e-3."""
    store, index = cache.open(tiny.stores / "store"), Index.open(tiny.data)
    plane = store.load_plane(1)
    logits = store.codec.decode(plane.gather(index.good)[0], store.dither_keys(1, index.good)).astype(np.float64)
    assert plane.energy is not None and np.ptp(logits.mean(2)) > 0.1  # else a centred code would do
    np.testing.assert_allclose(plane.energy, -np.log(np.exp(logits).sum(2)), rtol=0, atol=4e-3)
    found = verify.verify(Verify(store=str(store.path), data=tiny.data, teacher=tiny.teacher, fraction=1, device="cpu"))
    assert not found.counts


def test_verify_names_rows_of_another_energy(tiny, tmp_path):
    """Written by whoever commits anything; w and labels agree."""
    store = cache.copy(cache.open(tiny.stores / "store"), tmp_path / "copy")
    block = store.read_block(0, 0)
    energy = block.energy.copy()
    energy[3, 1] += 0.5
    store.write_block(0, 0, block.codes, block.weight, block.digest, (0.0, 1.0), energy)
    found = verify.verify(Verify(store=str(store.path), data=tiny.data, teacher=tiny.teacher, fraction=1, device="cpu"))
    assert found.counts == {"label row damaged": 1}


def test_a_store_is_completed_as_it_was_begun(tiny, tmp_path):
    made = cache.copy(cache.open(tiny.stores / "store"), tmp_path / "copy")
    precompute.run(taught(tiny, Path(made.path), views=3))
    grown = cache.open(made.path)
    assert grown.manifest.energy and np.isfinite(grown.load_plane(2).energy).all()
    with pytest.raises(UserError, match="another energy; found none, expected True; fix: run precompute-teacher --ene"):
        precompute.run(taught(tiny, tiny.stores / "plain", energy=True))


def test_the_share_of_lower_energies_counts_labels(tiny):
    plane = cache.open(tiny.stores / "store").load_plane(0)
    energy = plane.energy.copy()
    energy[4], energy[5, 0] = np.nan, energy[6, 0]  # skipped by the teacher pass, and a tie
    weight = plane.weight.copy()
    weight[4] = np.nan
    known = np.delete(energy, 4, axis=0)
    found = objectives._shares_below(dataclasses.replace(plane, energy=energy, weight=weight))
    for row in (0, 5, 6, 39):
        for view in range(2):
            assert found[row, view] == pytest.approx((known < energy[row, view]).mean())


def test_a_run_from_before_there_were_such_options_goes_on(tiny, tmp_path):
    train_student.run(run := student(tiny, tmp_path / "run", "kd", epochs=1))
    path = run.out / "config.json"
    older = json.loads(path.read_text())
    for name in ("loss_option", "more_stores", "together", "store_weights"):
        del older[name]
    path.write_text(json.dumps(older))
    train_student.run(dataclasses.replace(run, resume=True))
    with pytest.raises(UserError, match="--together differs; found logits, expected probabilities"):
        train_student.run(dataclasses.replace(run, resume=True, together="logits"))


def test_what_a_method_keeps_is_in_checkpoints(tiny, tmp_path):
    """A temperature that rises by a hundredth each step, whatever the loss."""
    option = ("high=0", "rise=0.01")
    train_student.run(run := student(tiny, tmp_path / "run", "dytkd", loss_option=option))
    state = torch.load(run.out / "checkpoint.pt", weights_only=True)
    assert float(state["beside"]["temperature"]) == pytest.approx(4 * 1.01**STEPS, rel=1e-5)
    network = models.create("cifar/resnet8", 3, seed=0)
    place = placed(network, torch.device("cpu"), "fp32", policies.load(str(tiny.policy)))
    fresh, _ = trainee.prepare(run, place, make("dytkd").keeps(run))
    fresh.restore(state)
    assert fresh.beside is not None
    assert torch.equal(fresh.beside.state_dict()["temperature"], state["beside"]["temperature"])
