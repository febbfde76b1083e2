"""One cause over a whole store is not laid on single rows, and rows that were harmed are not laid on the store.

The teacher's pixels here are its logits, so that no network and no processor's arithmetic has a say in what is judged.
"""

import base64
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache import codec as codecs
from pipeline.labels.judge import CODEC, DAMAGED, TEACHER, Judge, _w
from pipeline.networks.teacher import Said
from pipeline.views.batch import Batch

ROWS = 180


def answers(kind: str, classes: int = 10) -> np.ndarray:
    """Logits f32 (ROWS, 2, classes): of one spread in all directions, of falling ones, or with a few rows far out."""
    rng = np.random.default_rng(0)
    logits = 5 * (0.9 * rng.standard_normal((ROWS, 1, classes)) + 0.45 * rng.standard_normal((ROWS, 2, classes)))
    if kind != "even":
        logits = logits / np.arange(1, classes + 1) @ np.linalg.qr(rng.standard_normal((classes, classes)))[0]
    if kind == "far out":
        logits *= np.exp(rng.standard_normal((ROWS, 1, 1))) / 2
    return logits.astype(np.float32)


def dither_keys(view: int, rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(7 + view)


def causes(codec, logits: np.ndarray, encoded: np.ndarray, weight: np.ndarray) -> set[tuple[str, int]]:
    """(cause, row) of what a judge finds in a store of `encoded` and `weight`, if the teacher says `logits`."""
    manifest = SimpleNamespace(versions={}, fidelity={}, codec=codec.config)
    teacher = SimpleNamespace(device=torch.device("cpu"), precision="fp32")
    judge = Judge(SimpleNamespace(codec=codec, dither_keys=dither_keys, manifest=manifest), teacher)  # type: ignore[arg-type]
    judge._teacher = SimpleNamespace(said=lambda batch: Said(*[batch.images.transpose(0, 1)] * 2))  # type: ignore[assignment]
    rows = np.arange(len(logits))
    batch = Batch(rows, torch.zeros(len(rows)), torch.from_numpy(logits).transpose(0, 1), None)
    judge.look(0, batch, encoded, weight, np.empty((len(weight), 0), np.float32))
    return {(cause, row) for cause, _, _, row in judge.conclude()}


def furthest(values: np.ndarray) -> list[int]:
    """The two rows that differ most."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    distance = np.square(flat[:, None] - flat).sum(axis=2)
    return list(np.unravel_index(distance.argmax(), distance.shape))


KINDS = ("even", "falling", "far out")


@pytest.fixture(scope="module", params=[(kind, budget) for kind in KINDS for budget in (0.01, 0.2)], ids=str)
def coded(request):
    """Logits, and a code of few or many bits fitted to them."""
    kind, budget = request.param
    logits = answers(kind)
    return logits, codecs.auto(logits, kl_budget=budget)


@pytest.mark.parametrize("factor", [0.9, 1.003, 1.01, 1.03, 1.1, 1.5])
def test_a_code_of_other_steps_damages_no_row(coded, factor):
    """By a few per cent it rounds few rows otherwise, down to one of 180: they still say what the teacher says."""
    logits, codec = coded
    scale = codec.array("scale") * np.float32(factor)
    other = codecs.from_config(codec.config | {"scale": base64.b64encode(scale.tobytes()).decode()})
    encoded = codec.encode(logits, dither_keys(0, np.arange(ROWS)))
    found = {cause for cause, _ in causes(other, logits, encoded, _w(logits))}
    assert found == {CODEC} or (found == set() and abs(factor - 1) < 0.02)


def test_exchanged_labels_are_damage_and_no_code(coded):
    logits, codec = coded
    encoded = codec.encode(logits, dither_keys(0, np.arange(ROWS)))
    assert not causes(codec, logits, encoded, _w(logits))
    rows = furthest(logits)
    encoded[rows, 16:] = encoded[rows[::-1], 16:]  # but for the dither keys
    assert causes(codec, logits, encoded, _w(logits)) == {(DAMAGED, row) for row in rows}


@pytest.mark.parametrize("times", [1, 3, 4, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_hardly_differs_damages_no_row(kind, times):
    """Off by some times the noise, it moves the w of few rows beyond it, and by no more than the others."""
    logits, found = answers(kind), []
    codec = codecs.make("fp16", classes=10)
    for seed in range(3):
        noise = 2 * np.random.default_rng(seed).random(logits.shape) - 1
        moved = (logits * (1 + times * 2.0**-18 * noise)).astype(np.float32)
        encoded = codec.encode(logits, dither_keys(0, np.arange(ROWS)))
        found.append({cause for cause, _ in causes(codec, moved, encoded, _w(logits))})
    assert all(each <= {TEACHER} for each in found)
    assert all(found) if times >= 100 else times > 1 or not any(found)


def test_exchanged_weights_are_damage_and_no_teacher():
    logits = answers("even")
    codec, weight = codecs.make("fp16", classes=10), _w(logits)
    rows = [int(weight.argmin()), int(weight.argmax())]
    weight[rows] = weight[rows[::-1]]
    encoded = codec.encode(logits, dither_keys(0, np.arange(ROWS)))
    assert causes(codec, logits, encoded, weight) == {(DAMAGED, row) for row in rows}
