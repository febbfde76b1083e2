"""Labels are made for a temperature: their code spends its budget there, and a student at a lower one is told."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.stores import manifest

from cache import UserError
from cache import codec as codecs
from pipeline.training import train_student


def low_rank(pairs: int, seed: int) -> np.ndarray:
    """f32 (pairs, 2, 60), of 20 directions of falling variance."""
    mix = np.random.default_rng(1).normal(size=(20, 60)) * 0.85 ** np.arange(20)[:, None] * 2
    return (np.random.default_rng(seed).normal(size=(pairs, 2, 20)) @ mix).astype(np.float32)


def kl(true: np.ndarray, decoded: np.ndarray, temperature: float) -> float:
    p, q = (np.exp(x.astype(np.float64) / temperature) for x in (true, decoded))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


@pytest.mark.parametrize("make", ["fit", "auto"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_code_for_a_temperature_spends_its_budget_there(temperature, make):
    seen, unseen = low_rank(768, seed=3), low_rank(512, seed=4)
    if make == "fit":
        code = codecs.fit("subspace", seen, kl=0.05, temperature=temperature)
    else:
        code = codecs.auto(seen, 0.05, temperature)
    stream = np.arange(512, dtype=np.uint64)
    decoded = code.decode(code.encode(unseen, stream), stream)
    assert kl(unseen, decoded, temperature) == pytest.approx(0.05, rel=0.12)
    assert kl(unseen, decoded, 4.0) < 0.02  # which is all that a budget at T = 4 would have asked for


def test_noise_between_temperatures_is_interpolated():
    made = manifest(fidelity={"kl": {"1": 0.8, "2": 0.2, "4": 0.05}, "temperature": 4.0})
    assert made.temperature == 4.0 and manifest(fidelity={}).temperature == 4.0
    assert [made.noise(t) for t in (0.5, 1, 2, 4, 9)] == pytest.approx([0.8, 0.8, 0.2, 0.05, 0.05])
    assert 0.2 < made.noise(1.5) < 0.8
    for hostile in ({}, {"kl": None}, {"kl": {"x": 1.0, "nan": 1.0, "-1": 1.0, "1": "y", "2": True}}):
        assert manifest(fidelity=hostile).noise(2) is None
    for hostile in ("1", None, -1, float("inf"), True):
        assert manifest(fidelity={"temperature": hostile}).temperature == 4.0


def test_a_student_at_a_lower_temperature_is_told_and_refused_beyond_harm(capsys):
    made = manifest(fidelity={"kl": {"1": 0.8, "2": 0.2, "4": 0.05}, "temperature": 4.0})

    def check(temperature: float) -> str:
        train_student._check_temperature(SimpleNamespace(temperature=temperature), SimpleNamespace(manifest=made))
        return capsys.readouterr().err

    assert check(4.0) == check(8.0) == ""
    assert "labels made for T = 4 have a noise of 0.2 nats at --temperature 2" in check(2.0)
    message = r"too noisy for --temperature 1; found 0\.8 nats.*at most 0\.3; fix: .* --temperature 1"
    with pytest.raises(UserError, match=message):
        check(1.0)
