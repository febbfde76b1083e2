"""Rounding on the trellis: against brute force over the shift register of test_entropy.py, and its noise measured."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace import coded, codes, coefficients, dither, header, integers, resolved, streams, with_coefficients
from support.trellis import as_path, as_paths, decoded_steps, follow, normal_codec, parity, rows_of, tables

from cache.codec import entropy, fitting

STATES = sorted(entropy.TRELLIS_NOISE)


def rounded(x: np.ndarray, wide: int, states: int = 256) -> np.ndarray:
    """`nearest` of x f32 (n, t): i32 (n, t)."""
    q, labels = np.full(x.shape, 99, np.int32), entropy.labels(states)
    near, older = np.empty((x.shape[1], 4), np.int32), np.empty((x.shape[1], states), np.bool_)
    for row, found in zip(x, q, strict=True):
        entropy.nearest(row, labels, wide, near, older, found)
    return q


def quantised(
    steps: np.ndarray, stream: np.ndarray, joint: int, wide: int, out: np.ndarray, states: int = 256
) -> np.ndarray:
    """`quantise` with the same trellis in both segments; returns `out`."""
    entropy.quantise(steps.astype(np.float32), stream, np.array([joint, joint]), entropy.labels(states), wide, out)
    return out


def is_path(q: np.ndarray, trellis: int, states: int = 256) -> np.ndarray:
    """Whether each of the integers (..., d) is what the states along the leading `trellis` allow."""
    return (as_path(q, trellis, states) == q).all(axis=-1)


def ranges(wide: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    within = np.arange(size) < wide
    return np.where(within, -128, -8), np.where(within, 127, 7)


def candidates(x: np.ndarray, low: int, high: int) -> np.ndarray:
    """All integers of a nibble's range; of a byte's the sixteen around x (...), f64, or at the end that x is beyond.

    Four more or less lead to the same state: of a nearest path no integer is four farther from x than need be.
    """
    first = np.clip(np.floor(x) - 7, low, high - 15).astype(np.int64)
    return first[..., None] + np.arange(16)


def best_of_all(x: np.ndarray, wide: int, states: int) -> float:
    """The least sum of squares of x f64 (t,) less a path, over all the paths."""
    cost, state = np.zeros(1), np.zeros(1, np.int64)
    for value, low, high in zip(x, *ranges(wide, len(x)), strict=True):
        q = candidates(value, low, high)
        cost, state, q = (a.ravel() for a in np.broadcast_arrays(cost[:, None], state[:, None], q))
        allowed = (q & 1) == parity(state, states)
        cost, state = (cost + (value - q) ** 2)[allowed], follow(state, q, states)[allowed]
    return float(cost.min())


def least(x: np.ndarray, wide: int, states: int = 256) -> np.ndarray:
    """The same of rows (n, t) at once: f64 (n,). Of the paths to a state the cheapest is enough, whatever follows."""
    cost, state = np.full((states, len(x)), np.inf), np.arange(states)[:, None, None]
    cost[0] = 0
    for i, (low, high) in enumerate(zip(*ranges(wide, x.shape[1]), strict=True)):
        q = candidates(x[:, i], low, high)
        total = np.where((q & 1) == parity(state, states), cost[..., None] + (x[:, i, None] - q) ** 2, np.inf)
        then, cost = follow(state, q, states), np.full_like(cost, np.inf)
        for bit in range(2):  # that enters, so is the lowest
            best = np.where(then % 2 == bit, total, np.inf).min(axis=2)
            np.minimum.at(cost, (2 * np.arange(states) + bit) % states, best)
    return cost.min(axis=0)


# The nearest path


@settings(deadline=None, max_examples=250)
@given(st.data(), st.integers(1, 5), st.sampled_from(STATES))
def test_rounding_finds_the_nearest_of_all_paths(data, size, states):
    """Within nibbles, within bytes, at the ends of either and beyond: of float32, so to a few units of the last place.

    Each of t squares is off by 2^-22 of itself (a difference, twice, and a product), and each of t sums by 2^-24.
    """
    wide = data.draw(st.integers(0, size))
    around = data.draw(st.sampled_from([0, 7, -8, 127, -128, 60]))
    apart = st.one_of(st.floats(-12, 12, width=32), st.integers(-12, 12).map(lambda k: k / 2))
    x = np.array([data.draw(apart) for _ in range(size)], np.float32) + np.float32(around)
    q = rounded(x[None], wide, states)[0]
    low, high = ranges(wide, size)
    assert ((low <= q) & (q <= high)).all()
    assert is_path(q, size, states)
    best = best_of_all(x.astype(np.float64), wide, states)
    assert ((q - x.astype(np.float64)) ** 2).sum() <= best * (1 + (size + 4) * 2.0**-22) + 1e-12


@pytest.mark.parametrize("states", STATES)
def test_brute_force_state_by_state_is_brute_force(states):
    x = np.random.default_rng(0).normal(0, 6, (30, 5))
    for wide in (0, 2, 5):
        best = [best_of_all(row, wide, states) for row in x]
        np.testing.assert_allclose(least(x, wide, states), best, rtol=1e-12)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("wide", [0, 30, 200])
def test_long_rows_are_rounded_to_the_nearest_path_too(wide, states):
    x = (np.random.default_rng(1).uniform(-9, 9, (40, 200)) * np.where(np.arange(200) < wide, 15, 1)).astype("f4")
    q = rounded(x, wide, states)
    assert is_path(q, 200, states).all()
    found = ((q - x.astype(np.float64)) ** 2).sum(axis=1)
    np.testing.assert_allclose(found, least(x.astype(np.float64), wide, states), rtol=204 * 2.0**-22)


@settings(deadline=None, max_examples=60)
@given(codes(), st.integers(0, 2**32), st.integers(1, 6))
def test_a_row_holds_the_path_nearest_to_the_coefficients_plus_four_times_their_dither(codec, seed, count):
    """As near as can be where float32 takes an x for one within 1e-3 of it: 2 |e| 1e-3 a coefficient, e at most 4.

    A path that is nearest to the one x is that much farther from the other, and so is the other's nearest: twice.
    """
    rng = np.random.default_rng(seed)
    _, high = ranges(codec.wide, codec.dims)
    logits = with_coefficients(codec, rng.uniform(-1, 1, (count, 2, codec.dims)) * (high - 2.0))
    stream = streams(count, seed)
    q = integers(codec.encode(logits, stream), codec.dims, codec.wide)
    exact = coefficients(codec, logits) + 4 * dither(stream, codec.dims)
    np.testing.assert_array_equal(as_paths(q, codec), q)
    for segment, trellis in enumerate(codec.trellis):
        found, true = q[:, segment, :trellis], exact[:, segment, :trellis]
        assert (np.abs(found - true) <= 4).all()
        best = least(true, codec.wide, codec.states)
        assert (((found - true) ** 2).sum(axis=1) <= best + 2 * 2 * 4 * 1e-3 * trellis).all()


@pytest.mark.parametrize("size", [150, 1000, 30000, 1e8, 1e17])
def test_coefficients_out_of_range_stay_at_its_ends_and_spoil_no_others(size):
    """Within three of the end, as the path must go on. The others' noise would be 4/3 on a path that chance chose."""
    rng = np.random.default_rng(0)
    steps = rng.uniform(-3, 3, (200, 2, 40))
    steps[..., 3::8] = size * rng.choice([-1, 1], (200, 2, 5))
    rows = quantised(steps, streams(200), 40, 13, np.empty((200, 2, 32), np.uint8))
    q = integers(np.hstack([np.zeros((200, 16), np.uint8), rows.reshape(200, 64)]), 40, 13)
    assert is_path(q, 40).all()
    low, high = ranges(13, 40)
    off = np.where(steps > 0, high - q, q - low)[..., 3::8]
    assert ((off >= 0) & (off <= 3)).all()
    error = np.delete(q - 4 * dither(streams(200), 40) - steps, np.s_[3::8], axis=2)
    assert (error**2).mean() < 0.4


# Noise


def errors_of(steps: np.ndarray, wide: int, states: int) -> np.ndarray:
    """Decoded less true coefficients f32 (B, 2, d), all on the trellis; row b has the key b."""
    count, _, dims = steps.shape
    key, decoded = np.arange(count, dtype=np.uint64), np.empty_like(steps)
    rows = quantised(steps, key, dims, wide, np.empty((count, 2, wide + -(-(dims - wide) // 2)), np.uint8), states)
    entropy.dequantise(rows, key, wide, np.full((2, dims), 1024, np.int32), decoded)
    return decoded - steps


@pytest.mark.parametrize(("states", "digit"), [(8, 0.005), (256, 0.0015)])
def test_the_noise_of_random_coefficients_is_the_documented(states, digit):
    """To its last digit: squares of 2,000,000 errors, of a deviation of 0.33, give the mean to 0.0003; the first
    coefficients, whose state is given, add 0.0007 to it.
    """
    x = np.random.default_rng(4).uniform(-60, 60, (4000, 512)).astype(np.float32)
    errors = rounded(x, 512, states) - x
    assert (errors**2).mean() == pytest.approx(entropy.TRELLIS_NOISE[states], abs=digit)
    assert abs(errors.mean()) < 5 * math.sqrt(0.26 / errors.size)


@pytest.mark.parametrize("states", STATES)
def test_the_noise_is_the_same_whatever_the_coefficients(states):
    """All of one fraction, or random: means of 1,000,000 squares of a deviation of 0.33, to five deviations of two."""
    found = []
    for fraction in (0, 1 / 256, 0.25, 0.5, 0.75, 0.9, None):
        rng = np.random.default_rng(5)
        whole = rng.integers(-3, 4, (4000, 2, 128))
        steps = (whole + (rng.random(whole.shape) if fraction is None else fraction)).astype(np.float32)
        found.append((errors_of(steps, 128, states) ** 2).mean())
    assert np.ptp(found) < 5 * math.sqrt(2) * 0.33 / 1000


SAMPLES = 20000


@pytest.fixture(scope="module")
def repeated() -> np.ndarray:
    """Errors (SAMPLES, 2, 40) in steps, of one pair of logits under many keys; 30 coefficients are on the trellis."""
    codec = coded(60, 40, wide=20, trellis=30, beta=[1024] * 30 + [256] * 10)
    x = np.random.default_rng(1).normal(size=(1, 2, 40)) * np.where(np.arange(40) % 2, 0.1, 1.5)
    logits, stream = with_coefficients(codec, x), np.arange(SAMPLES, dtype=np.uint64)
    rows = codec.encode(np.repeat(logits, SAMPLES, axis=0), stream)
    return resolved(codec, codec.decode(rows, stream)) - coefficients(codec, logits)


def test_the_mean_over_keys_is_the_truth(repeated):
    """Within five standard errors, and half of the 1/64 step that lies between the 256 levels of dither.

    The mean over them is zero on average over x, as for a dither without levels, and falls by 1 a step but for jumps
    upwards: where it is highest it has at least as far to fall to half a level's distance on, so is below that.
    """
    bound = 5 * repeated.std(axis=0) / math.sqrt(SAMPLES) + 1 / 128
    assert (np.abs(repeated.mean(axis=0)) <= bound).all()


def test_the_noise_of_no_coefficient_is_far_from_the_others(repeated):
    """0.41 of the first, whose state is given, to 0.19 of the last, after which any state will do."""
    found = (repeated**2).mean(axis=0)[:, :30]
    assert ((found > 0.17) & (found < 0.43)).all()
    assert (found[:, 0] > 1 / 3).all(), "of even integers only, the nearest have that"
    assert (found[:, -1] < 0.26).all()


def test_errors_of_rows_views_and_coefficients_are_uncorrelated(repeated):
    """Although they are rounded together, and with those that are not."""
    together = (repeated / repeated.std(axis=0)).reshape(SAMPLES, 80)
    following = np.roll(together, 1, axis=0)
    for product in (together.T @ together / SAMPLES - np.eye(80), together.T @ following / SAMPLES):
        assert np.abs(product).max() <= 5 / math.sqrt(SAMPLES)


def test_a_row_is_rounded_as_if_it_were_alone():
    steps = np.random.default_rng(0).normal(0, 3, (30, 2, 50)).astype(np.float32)
    steps[::3] *= 100
    rows, alone = quantised(steps, streams(30), 40, 14, np.empty((30, 2, 32), np.uint8)), np.empty((1, 2, 32), np.uint8)
    for row in range(30):
        quantised(steps[row : row + 1], streams(30)[row : row + 1], 40, 14, alone)
        np.testing.assert_array_equal(rows[row], alone[0])


# Packing


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_only_paths_can_be_packed(data):
    """A step off the path at one place, or anything at all: what the shift register does not allow is refused."""
    codec = data.draw(codes())
    q = data.draw(tables(codec))
    if len(q) and data.draw(st.booleans()):
        at = tuple(data.draw(st.integers(0, size - 1)) for size in q.shape)
        q[at] ^= data.draw(st.sampled_from([1, 2, 4, 7]))  # stays within its range
    elif len(q):
        q = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-8, 8, q.shape)
    stream = streams(len(q))
    rows = rows_of(codec, q, stream)
    for keys in (stream, None):
        if (as_paths(q, codec) == q).all():
            np.testing.assert_array_equal(codec.unpack(codec.pack(rows, keys), keys), rows)
        else:
            with pytest.raises(ValueError, match="codes that no logits make"):
                codec.pack(rows, keys)


def test_a_change_of_one_integer_of_a_row_is_refused():
    """By one, the next state would not allow it; by two, it would lead elsewhere, unless it is the last."""
    codec, rows, stream = normal_codec(trellis=12)
    q = integers(rows, 24, 8)[:1]
    for view, i, by in np.ndindex(2, 24, 3):
        other = q.copy()
        other[0, view, i] ^= (1, 2, 4)[by]  # by four there are other integers that lead to the same state
        changed = rows_of(codec, other, stream[:1])
        if i < 12 and (by == 0 or (by == 1 and i < 11)):
            with pytest.raises(ValueError, match="codes that no logits make"):
                codec.pack(changed, stream[:1])
        else:
            np.testing.assert_array_equal(codec.unpack(codec.pack(changed)), changed)


def packed_bits(x: np.ndarray, trellis: int, variance: float) -> tuple[float, np.ndarray]:
    """Bits a coefficient of x f32 (B, 2, d), in steps, of models of this variance; and the errors."""
    dims, stream = x.shape[2], np.arange(len(x), dtype=np.uint64)
    beta, spread = 1024 if trellis else 256, round(512 * math.sqrt(variance))
    arrays = {"beta": np.full(dims, beta), "spread": np.full((2, dims), spread), "gain": np.zeros(dims)}
    codec = coded(dims + 1, dims, dims, trellis=trellis, **arrays)
    views = quantised(x, stream, trellis, dims, np.empty((len(x), 2, codec.segment), np.uint8))
    rows = np.hstack([header(stream), views.reshape(len(x), 2 * codec.segment)])
    return 8 * len(codec.pack(rows, stream)) / x.size, decoded_steps(codec, rows, stream) - x


def test_noise_of_the_same_variance_costs_a_fifth_of_a_bit_less():
    """log2(2 / sqrt(12 0.2466)) = 0.217 of coefficients much finer than their spread; here of a fourth of it."""
    x, error = 4 * np.random.default_rng(0).normal(size=(200, 2, 200)), entropy.TRELLIS_NOISE[256]
    step = 1 / math.sqrt(12 * error)
    alone, joint = packed_bits(x, 0, 16), packed_bits(x / step, 200, 16 / step**2 + error)
    assert ((step * joint[1]) ** 2).mean() == pytest.approx((alone[1] ** 2).mean(), rel=0.02)
    assert alone[0] - joint[0] == pytest.approx(1 / 5, abs=0.02)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4, 1.0, 4.0])
def test_the_rates_that_steps_are_chosen_by_are_those_of_normal_numbers(ratio):
    """Of a spread of `ratio` steps: 200,000 of them, of a deviation of 1.3 bits at most, to five of its deviations.

    On the trellis the model has the variance of what is decoded: 0.03 more or less save nothing.
    """
    x = np.random.default_rng(0).normal(0, ratio, (400, 2, 250)).astype(np.float32)
    choices, error = fitting._choices(), entropy.TRELLIS_NOISE[256]
    for trellis, noise, part in ((0, 0, slice(choices.alone)), (250, error, slice(choices.alone, None))):
        promised = np.interp(math.log(ratio), np.log(choices.ratio[part]), choices.rate[part])
        bits = packed_bits(x, trellis, ratio**2 + noise)[0]
        assert promised == pytest.approx(bits, abs=0.015)
        if trellis:
            for other in (-0.03, 0.03):
                assert packed_bits(x, trellis, ratio**2 + noise + other)[0] > bits - 3e-4


def test_a_coefficient_that_never_moves_costs_next_to_nothing():
    """On the trellis too, as what entered is known from the dither to come: a sixth of a bit where that is not seen."""
    still = np.zeros((400, 2, 250), np.float32)
    bits, error = packed_bits(still, 250, entropy.TRELLIS_NOISE[256])
    assert bits < 0.05
    assert (error**2).mean() == pytest.approx(entropy.TRELLIS_NOISE[256], rel=0.02)
