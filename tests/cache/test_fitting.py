"""Fitting `subspace` codes and choosing codecs: on the simulated teacher, and where there is next to nothing to fit.

KL, sizes and slopes are computed here, in float64, on pairs that no code was fitted to.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.subspace import coefficients, dither, fields, integers
from threadpoolctl import threadpool_limits

from bench.labels import simulated
from cache import UserError
from cache import codec as codecs
from cache.codec import entropy, fidelity, fitting
from cache.codec.subspace import Subspace


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads of LAPACK that share two busy cores take 70 times as long as one."""
    with threadpool_limits(1):
        yield


def kl(true: np.ndarray, decoded: np.ndarray, temperature: float = 4.0) -> float:
    """Mean over vectors of sum p (x - y) / T - log sum exp x / T + log sum exp y / T."""
    x, y = (torch.from_numpy(np.asarray(values, np.float64)) / temperature for values in (true, decoded))
    return float(((x.softmax(-1) * (x - y)).sum(-1) - x.logsumexp(-1) + y.logsumexp(-1)).mean())


def slope(true: np.ndarray, decoded: np.ndarray) -> float:
    """Of the least-squares line of decoded on true logits, each vector's mean taken off."""
    x, y = (
        values.astype(np.float64) - values.mean(axis=2, keepdims=True, dtype=np.float64) for values in (true, decoded)
    )
    return float(np.linalg.lstsq(x.reshape(-1, 1), y.ravel(), rcond=None)[0][0])


def measured(codec: codecs.Codec, logits: np.ndarray) -> tuple[float, float, float]:
    """(bytes per vector on disk, KL at T = 4, slope)."""
    stream = np.random.default_rng(11).integers(0, 2**64, len(logits), np.uint64)
    rows = codec.encode(logits, stream)
    packed = codec.pack(rows, stream)
    np.testing.assert_array_equal(codec.unpack(packed, stream), rows)
    decoded = codec.decode(rows, stream)
    return len(packed) / (2 * len(logits)), kl(logits, decoded), slope(logits, decoded)


def drawn(pairs: int, seed: int) -> np.ndarray:
    return simulated.draw(simulated.teacher(), pairs, seed=seed)[1][0].numpy()


def low_rank(pairs: int, classes: int = 60, rank: int = 20, seed: int = 0) -> np.ndarray:
    """f32 (pairs, 2, classes), the augmented view like the original."""
    mix = np.random.default_rng(1).normal(size=(rank, classes)) * 0.85 ** np.arange(rank)[:, None] * 2
    original, change = np.random.default_rng(seed).normal(size=(2, pairs, rank))
    return (np.stack([original, 0.8 * original + 0.6 * change], axis=1) @ mix).astype(np.float32)


# The simulated teacher


@pytest.fixture(scope="module")
def seen() -> np.ndarray:
    return drawn(1536, seed=1)


@pytest.fixture(scope="module")
def unseen() -> np.ndarray:
    return drawn(512, seed=2)


@pytest.fixture(scope="module")
def fitted(seen) -> dict[float, Subspace]:
    return {budget: fitting.fit(seen, budget) for budget in (1.0, 0.05, 0.01, 0.002)}


@pytest.mark.parametrize(("budget", "most"), [(0.05, 37.5), (0.01, 82), (0.002, 143)])
def test_labels_of_a_thousand_classes_fit_the_budget_in_few_bytes(fitted, unseen, budget, most):
    size, found, line = measured(fitted[budget], unseen)
    assert size <= most
    assert found <= budget
    assert found > 0.9 * budget, "a budget that is not used buys nothing"
    assert abs(line - 1) <= 0.02
    assert fitted[budget].dims <= simulated.FEATURES  # the rank of the head
    assert fitted[0.05].segment <= 336  # bytes in memory: most coefficients take half a one


def test_a_fidelity_is_what_it_says(fitted, unseen):
    codec, stream = fitted[0.01], np.arange(len(unseen), dtype=np.uint64)
    rows = codec.encode(unseen, stream)
    decoded, found = codec.decode(rows, stream), fidelity.measure(codec, unseen, stream)
    for temperature, value in found.kl.items():
        assert value == pytest.approx(kl(unseen, decoded, temperature), rel=1e-6)
    assert set(found.kl) == {1.0, 2.0, 4.0}
    assert found.slope == pytest.approx(slope(unseen, decoded), abs=1e-6)
    assert found.agreement == np.mean(np.argmax(unseen, 2) == np.argmax(decoded, 2))
    assert found.bytes_per_vector == len(codec.pack(rows, stream)) / 1024
    assert found.pairs == 512
    assert fidelity.measure(codec, unseen, stream, rows) == found
    assert json.loads(json.dumps(found.to_json()))["kl"]["4"] == found.kl[4.0]


def test_a_drift_says_how_far_chance_goes(fitted, unseen):
    """Over keys the KL and the slope of 64 pairs vary by no more than their standard errors, which count pairs too."""
    codec, pairs = fitted[0.05], unseen[:64]
    drifts, exact = [], []
    for seed in range(12):
        stream = np.random.default_rng(seed).integers(0, 2**64, 64, np.uint64)
        rows = codec.encode(pairs, stream)
        drifts.append(fidelity.drift(codec, pairs, rows, stream))
        decoded = codec.decode(rows, stream)
        exact.append((kl(pairs, decoded), slope(pairs, decoded)))
    found = np.array([(drift.kl, drift.slope) for drift in drifts])
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    each = [kl(true, said) for true, said in zip(pairs, decoded, strict=True)]
    assert drifts[-1].kl_error == pytest.approx(np.std(each) / math.sqrt(64), rel=1e-6)
    ratio = found.std(axis=0) / (drifts[-1].kl_error, drifts[-1].slope_error)
    assert ((ratio > 0.4) & (ratio < 1.8)).all(), "twelve draws give a deviation to about a fifth"
    assert all(drift.beyond(0.05) is None for drift in drifts)
    assert "KL(T = 4)" in drifts[0].beyond(0.02)
    other = codec.encode(np.float32(1.2) * pairs, stream)
    steep = fidelity.drift(codec, pairs, other, stream)
    assert steep.slope == pytest.approx(1.2, abs=0.005)
    assert f"slope {steep.slope:.3f}, expected 1 ± 0.02" in steep.beyond(1.0)


def test_the_code_of_a_large_teacher_survives_json(fitted):
    for codec in fitted.values():
        assert codecs.from_config(json.loads(json.dumps(codec.config))) == codec


def errors(codec: Subspace, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients f64 (n, 2, d), decoded ones, which are q - beta u, and their difference."""
    stream = np.arange(len(logits), dtype=np.uint64)
    q = integers(codec.encode(logits, stream), codec.dims, codec.wide)
    x, decoded = coefficients(codec, logits), q - fields(codec)["beta"] * dither(stream, codec.dims)
    return x, decoded, decoded - x


def test_noise_per_coefficient_is_the_documented_and_its_share_of_dither_the_best(fitted, unseen):
    """Var e = E[f (1 - f)] (1 - beta) + beta² / 12 in steps squared: measured, and least at the fitted beta.

    On the trellis 0.2466; each but those near its ends, of 512 squares of a deviation of 0.33, to five deviations.
    """
    codec = fitted[1.0]
    assert 100 < codec.trellis[1] < codec.trellis[0] < codec.dims - 20
    coded, _, error = errors(codec, unseen)
    for segment, trellis in enumerate(codec.trellis):
        found, noise = (error[:, segment] ** 2).mean(axis=0), entropy.TRELLIS_NOISE[256]
        joint, found = found[:trellis], found[trellis:]
        assert joint[30:-30].mean() == pytest.approx(noise, rel=0.02)
        assert np.abs(joint[30:-30] - noise).max() < 5 * 0.33 / math.sqrt(512)
        share = fields(codec)["beta"][segment]
        assert (share[:trellis] == entropy.TRELLIS_DITHER).all()
        x, beta = coded[:, segment, trellis:], share[trellis:]
        fraction = (x % 1 * (1 - x % 1)).mean(axis=0)
        expected = fraction * (1 - beta) + beta**2 / 12
        # |e| ≤ 1, so a mean of e² over 512 has a variance of at most Var e / 512; 1/256 is the dither's grid.
        assert found.sum() == pytest.approx(expected.sum(), abs=5 * math.sqrt(expected.sum() / 512))
        assert (np.abs(found - expected) <= 5 * np.sqrt(expected / 512) + 1 / 256).all()
        best = np.minimum(6 * fraction, 1)
        assert expected.sum() <= 1.02 * (fraction * (1 - best) + best**2 / 12).sum()


def test_the_trellis_saves_a_fifth_of_the_bytes(fitted, seen, unseen, monkeypatch):
    choices = fitting._choices()
    dear = np.where(np.arange(len(choices.rate)) < choices.alone, choices.rate, np.inf)
    monkeypatch.setattr(fitting, "_choices", lambda: replace(choices, rate=dear))
    alone = fitting.fit(seen, 0.05)
    assert alone.trellis == (0, 0)
    assert measured(fitted[0.05], unseen)[0] < 0.8 * measured(alone, unseen)[0]


def test_a_step_is_right_for_its_direction(fitted, unseen):
    """Moving rate between directions, at the same KL, saves next to nothing: the steps are near the optimum."""
    codec, budget = fitted[0.01], 0.01
    arrays, stream = fields(codec), np.arange(len(unseen), dtype=np.uint64)
    size, loss, _ = measured(codec, unseen)
    assert loss == pytest.approx(budget, rel=0.1)
    for tilt in (-0.3, 0.3):
        factor = np.exp(tilt * np.linspace(-1, 1, codec.dims))
        tilted = replace(
            codec,
            scale=(arrays["scale"] * factor).astype("<f4").tobytes(),
            spread=np.rint(arrays["spread"] / factor).clip(1).astype("<i4").tobytes(),
        )
        rows = tilted.encode(unseen, stream)
        other = kl(unseen, tilted.decode(rows, stream))
        # At rates of R bits per vector KL falls as 2^(-2 R / d) or faster: bytes per factor of KL, from two budgets.
        exchange = (measured(fitted[0.002], unseen)[0] - size) / math.log(5)
        assert len(tilted.pack(rows, stream)) / (2 * len(rows)) + exchange * math.log(other / loss) > 0.995 * size


def test_noise_that_views_share_is_dearer_than_noise_that_they_do_not(fitted, seen, unseen, monkeypatch):
    """By a third: of the sums' noise there is less than where both weigh the same, for next to no bytes."""

    def share(codec: Subspace) -> float:
        size = fields(codec)["scale"] * np.linalg.norm(fields(codec)["basis"], axis=1)
        sums, differences = ((errors(codec, unseen)[2] * size) ** 2).mean(axis=(0, 2))
        return sums / (sums + differences)

    monkeypatch.setattr(fitting, "_SHARED", (1.0, 1.0))
    equal = fitting.fit(seen, 0.05)
    assert share(fitted[0.05]) < share(equal) - 0.02
    assert measured(fitted[0.05], unseen)[0] < 1.01 * measured(equal, unseen)[0]


def test_the_entropy_models_are_those_of_the_data(fitted, unseen):
    """Spreads say what pairs that were not fitted to do: to 5 % in the mean, and each to 25 %.

    Of the 1536 fitted pairs 384 give the spreads, and 512 check them: two standard deviations of n values each differ
    by 5 %, and heavy tails double it.
    """
    codec = fitted[0.01]
    arrays, (x, decoded, _) = fields(codec), errors(codec, unseen)
    rest = x[:, 1] - arrays["gain"] / 4096 * decoded[:, 0]
    joint = np.arange(codec.dims) < np.array(codec.trellis)[:, None]
    found = np.stack([(x[:, 0] ** 2).mean(0), (rest**2).mean(0)])
    ratio = np.sqrt(found + entropy.TRELLIS_NOISE[256] * joint) * 512 / arrays["spread"]
    assert (np.abs(ratio.mean(axis=1) - 1) < 0.05).all()
    assert (np.abs(ratio - 1) < 0.25).all()
    lengths = arrays["scale"] * np.linalg.norm(arrays["basis"], axis=1)
    sums, differences = ((x * lengths) ** 2).mean(axis=(0, 2))
    assert differences < 0.3 * sums  # views of one image are alike


# The choice


@pytest.mark.parametrize(
    ("budget", "expected"), [(0.3, "subspace"), (0.05, "subspace"), (1e-3, "subspace"), (1e-5, "int8"), (1e-7, "fp16")]
)
def test_auto_takes_the_fewest_bytes_within_the_budget(budget, expected):
    logits, unseen = low_rank(1024), low_rank(2048, seed=8)
    chosen = codecs.auto(logits, budget)
    assert chosen.config["name"] == expected
    sizes = {}
    for name in codecs.NAMES:
        try:
            codec = codecs.fit(name, logits, **({"kl": budget} if name == "subspace" else {}))
        except UserError:
            assert name == "subspace" and budget < 1e-4
            continue
        size, found, line = measured(codec, unseen)
        if found <= 1.03 * budget and abs(line - 1) <= 0.02:  # other pairs than auto's
            sizes[name] = size
    assert min(sizes, key=sizes.get) == expected
    assert measured(chosen, low_rank(512, seed=9))[1] <= 1.1 * budget


def test_identical_logits_give_identical_codecs():
    logits = low_rank(128)
    assert fitting.fit(logits, 0.01) == fitting.fit(logits.copy(), 0.01)
    assert codecs.auto(logits).config == codecs.auto(logits.copy()).config
    assert fitting.fit(logits, 0.01) != fitting.fit(logits, 0.011)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("budget", [0.05, 1e-4, 1e-9])
def test_few_classes_get_a_codec_too(classes, budget):
    logits = np.random.default_rng(0).normal(0, 3, (1024, 2, classes)).astype(np.float32)
    codec = codecs.auto(logits, budget)
    assert codecs.from_config(json.loads(json.dumps(codec.config))) == codec
    size, found, _ = measured(codec, logits)
    assert size <= 2 * classes + 1
    assert found <= max(1.1 * budget, 2e-8)  # what fp16 does where nothing is good enough


def _rank_one() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(256, 2, 1)) * rng.normal(size=(1, 1, 30)) * 3).astype(np.float32)


DEGENERATE = {
    "zero": np.zeros((128, 2, 10), np.float32),
    "constant": np.full((128, 2, 10), 5, np.float32),
    "one vector": np.tile(low_rank(1)[:, :1], (128, 2, 1)),
    "rank one": _rank_one(),
    "rank one, far off zero": _rank_one() + np.float32(1000),
    "two equal views": low_rank(256)[:, [0, 0]],
    "opposite views": low_rank(256)[:, :1] * np.float32([[[1], [-1]]]),
    "opposite views, but for a fortieth": low_rank(256)[:, :1] * np.float32([[[1], [-1.05]]]),
    "an augmented view forty times as large": low_rank(256)[:, :1] * np.float32([[[1], [40]]]),
    "one hot, as large as can be": np.where(np.eye(10)[np.arange(256).reshape(128, 2) % 10], 65504, 0).astype("f4"),
    "near zero": low_rank(128) * np.float32(1e-6),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_logits_get_a_codec_within_the_budget(name):
    logits = DEGENERATE[name]
    codec = codecs.auto(logits, 0.05)
    assert codecs.from_config(json.loads(json.dumps(codec.config))) == codec
    assert measured(codec, logits.astype(np.float32))[1] <= 0.06


def test_a_gain_beyond_its_range_is_cut_not_wrapped():
    codec = fitting.fit(DEGENERATE["opposite views, but for a fortieth"], 0.001)
    gain = fields(codec)["gain"]
    assert (gain < 0).all()
    assert gain.min() < -7.8 * 4096


@pytest.mark.parametrize("pairs", [4, 63])
def test_too_few_pairs_for_a_subspace_are_enough_for_the_others(pairs):
    logits = low_rank(pairs)
    assert codecs.auto(logits).config["name"] == "int8"
    with pytest.raises(UserError, match=rf"too few pairs.*found {pairs}, expected at least 64; fix: "):
        codecs.fit("subspace", logits, kl=0.05)


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, math.inf, -math.inf])
def test_a_budget_that_is_no_positive_number_is_refused(budget):
    with pytest.raises(UserError, match=r"KL budget; found .*, expected a positive number.*; fix: "):
        fitting.fit(low_rank(64), budget)
    with pytest.raises(UserError, match="KL budget"):
        codecs.auto(low_rank(64), budget)


@pytest.mark.parametrize("budget", [1e-5, 1e-9])
def test_a_budget_that_no_code_reaches_is_refused(budget):
    """Steps stop where the largest coefficient would leave its byte, and directions are rounded."""
    with pytest.raises(UserError, match=r"within the KL budget; found .* expected at most .*; fix: "):
        fitting.fit(low_rank(128), budget)


@pytest.mark.parametrize("budget", [1e-3, 1e-4, 30.0])
def test_no_budget_makes_a_code_that_clips_or_cannot_be_read(budget):
    """Of too small a one the steps stop where the largest coefficient would leave its byte: clipping is a bias."""
    logits = low_rank(128)
    codec = fitting.fit(logits, budget)
    assert codecs.from_config(json.loads(json.dumps(codec.config))) == codec
    limit = np.where(np.arange(codec.dims) < codec.wide, 127, 7)
    joint = np.arange(codec.dims) < np.array(codec.trellis)[:, None]
    limit = limit - np.where(joint, 3.5, 0)  # 2 for the dither, 2 to go on, less 1/2
    assert (np.abs(coefficients(codec, logits)).max(axis=0) < limit).all()
    assert abs(measured(codec, logits)[2] - 1) < 0.02 or budget > 1


@pytest.mark.parametrize("pairs", [0, 1, 2, 3])
def test_pairs_of_which_none_can_be_held_out(pairs):
    try:
        assert codecs.auto(low_rank(pairs)).config["name"] in ("int8", "fp16")
    except UserError as error:
        assert "pairs" in str(error)  # as good an answer


@pytest.mark.parametrize("budget", [0, -1.0, math.nan])
def test_a_budget_that_is_no_positive_number_is_refused_of_few_pairs_too(budget):
    with pytest.raises(UserError, match="KL budget"):
        codecs.auto(low_rank(10), budget)


def test_one_class_gets_a_codec_that_can_be_read():
    codec = codecs.auto(np.zeros((64, 2, 1), np.float32))
    assert codecs.from_config(codec.config) == codec


def test_logits_that_no_codec_could_keep_are_not_fitted_to():
    logits = low_rank(64)
    logits[3, 1, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fitting.fit(logits, 0.05)


# Directions


@pytest.mark.parametrize("classes", [20, 100])
def test_directions_are_the_principal_ones_however_many_pairs_there_are(classes):
    """Of 30 pairs and 20 classes from covariances, of 100 classes from products of vectors: those of the SVD."""
    logits = low_rank(30, classes, rank=12)
    flat = logits.reshape(60, classes).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    found = fitting._directions(logits, 4.0)
    np.testing.assert_allclose(found.mean, flat.mean(axis=0), atol=1e-6)
    left, values, right = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    assert len(found.basis) == 12
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(12), atol=1e-6)
    same = np.sign((found.basis * right[:12]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(same * found.basis, right[:12], atol=1e-5)
    along = (left * values)[:, :12].reshape(30, 2, 12)
    reach = np.abs(np.stack([along.sum(axis=1), along[:, 0] - along[:, 1]]) / 2).max(axis=1)
    np.testing.assert_allclose(found.reach, reach, rtol=1e-4)


def test_both_ways_to_the_directions_agree():
    """Logits padded with classes that say nothing have the same directions, padded with zeros."""
    logits = low_rank(30, 20, rank=12)
    centred = logits - logits.mean(axis=2, keepdims=True)
    few = fitting._directions(centred, 4.0)
    many = fitting._directions(np.pad(centred, ((0, 0), (0, 0), (0, 80))), 4.0)
    np.testing.assert_allclose(np.abs(many.basis[:, :20]), np.abs(few.basis), atol=1e-5)
    np.testing.assert_allclose(many.basis[:, 20:], 0, atol=1e-6)


def test_three_thousand_classes_of_two_hundred_pairs_are_fitted():
    logits = low_rank(200, 3000)
    codec = fitting.fit(logits, 0.01)
    size, found, line = measured(codec, low_rank(100, 3000, seed=5))
    assert codec.dims == 20
    assert found <= 0.012
    assert size < 40
    assert abs(line - 1) < 0.02


def test_what_kl_feels_of_noise_along_a_direction():
    """Against KL itself, of a small step to and fro along each."""
    logits, size = low_rank(40, 30, rank=8), 1e-3
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(30, 5)))[0].T
    for along, felt in zip(basis, fitting.sensitivity(logits, basis, 4.0), strict=True):
        true = logits.astype(np.float64)
        noise = (kl(true, true + size * along) + kl(true, true - size * along)) / 2
        assert felt == pytest.approx(noise / size**2, rel=1e-3)
