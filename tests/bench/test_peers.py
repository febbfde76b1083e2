"""The peers' formats keep what their publishers say, in as many bytes; each claim has its own formula here."""

import json
import math

import numpy as np
import pytest

from bench.labels import peers, simulated
from bench.labels.peers import ABSENT, Field

CLASSES = simulated.CLASSES


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """f32 (96, 2, 1000) of the simulated teacher."""
    return simulated.draw(simulated.teacher(), 96, seed=3)[1][0].numpy()


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 64, 96, np.uint64)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    p = np.exp((logits - logits.max(axis=-1, keepdims=True)).astype(np.float64) / temperature)
    return p / p.sum(axis=-1, keepdims=True)


ALL = {
    "fkd": (peers.fkd(CLASSES), 57),
    "tinyvit-10": (peers.tinyvit(CLASSES, 10), 44),
    "tinyvit-100": (peers.tinyvit(CLASSES, 100), 404),
    "apple": (peers.apple(CLASSES), 69),
    "distillkit": (peers.DistillKit(CLASSES), 77),
    "distillkit-65536": (peers.DistillKit(1 << 16), 114),
    "rskd-100": (peers.Sampled(CLASSES, 100), 125),
    "rskd-400": (peers.Sampled(CLASSES, 400), 500),
    "int4": (peers.PerRow(CLASSES, 4), 504),
    "int6": (peers.PerRow(CLASSES, 6), 754),
    "int8": (peers.PerRow(CLASSES, 8), 1004),
    "dense": (peers.Dense(CLASSES), 2028),
}
CODECS = {name: codec for name, (codec, _) in ALL.items() if codec.classes == CLASSES}


@pytest.mark.parametrize("name", ALL)
def test_a_vector_takes_the_published_bytes(name):
    codec, size = ALL[name]
    assert codec.row_bytes == 2 * size and json.loads(json.dumps(codec.config))["classes"] == codec.classes


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_bytes_and_packing_gives_them_back(name, logits, stream):
    codec = CODECS[name]
    rows = codec.encode(logits, stream)
    assert rows.shape == (96, codec.row_bytes) and rows.dtype == np.uint8
    code = codec.pack(rows, stream)
    # At the worst all is kept as it is, with 5 bytes a field and 4 in all; no field lies wider than two bytes
    # where 10 bits do.
    assert len(code) <= 1.6 * rows.nbytes + 100
    np.testing.assert_array_equal(codec.unpack(code, stream), rows)
    for some in (slice(0, 1), slice(5, 40)):
        np.testing.assert_array_equal(codec.encode(logits[some], stream[some]), rows[some])
        decoded = codec.decode(rows[some], stream[some])
        assert decoded.dtype == np.float32
        np.testing.assert_array_equal(decoded, codec.decode(rows, stream)[some])


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i2", "<f2", "<f4", "<u4"])
@pytest.mark.parametrize("kind", ["constant", "ramp", "noise"])
def test_the_lossless_stage_is_lossless_and_never_larger(dtype, kind):
    rng = np.random.default_rng(0)
    shape = (50, 2, 7)
    numbers = {
        "constant": np.full(shape, 3),
        "ramp": np.arange(700).reshape(shape) % 200,
        "noise": np.frombuffer(rng.bytes(5600), np.uint64).reshape(shape) >> np.uint64(49),
    }[kind].astype(dtype)
    code = peers.smallest(numbers)
    found, rest = peers.expanded(code + b"next", dtype, shape)
    np.testing.assert_array_equal(found, numbers)
    assert rest == b"next" and len(code) <= 5 + numbers.nbytes


def test_bits_lie_lowest_first():
    layout = (Field("a", "u1", 1), Field("q", "<u2", 3, bits=10))
    rows = peers.write({"a": np.full((1, 2, 1), 7), "q": np.array([[[1, 2, 1023], [512, 0, 3]]])}, layout)
    value = 1 | 2 << 10 | 1023 << 20
    assert rows[0, :5].tobytes() == bytes([7]) + value.to_bytes(4, "little") and rows.shape == (1, 10)
    np.testing.assert_array_equal(peers.read(rows, layout)["q"], [[[1, 2, 1023], [512, 0, 3]]])


# --- top k


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("make", "k", "error"),
    [
        (lambda *more: peers.fkd(CLASSES, *more), 5, 1e-5),
        (lambda *more: peers.apple(CLASSES, *more), 10, 1e-5),
        # float16 rounds p by a factor of 1 ± 2^-11, and by up to 2^-25 where it is below 2^-14.
        (lambda *more: peers.tinyvit(CLASSES, 10, *more), 10, 2**-11 + 1e-5),
        (lambda *more: peers.tinyvit(CLASSES, 100, *more), 100, 2**-11 + 1e-5),
    ],
)
def test_top_k_keeps_the_k_largest_probabilities(make, k, error, temperature, logits, stream):
    p = softmax(logits, temperature)
    order = np.argsort(-p, axis=2)
    top, rest = order[..., :k], order[..., k:]
    kept = np.take_along_axis(p, top, axis=2)

    codec = make(temperature, "uniform")
    taught = softmax(codec.decode(codec.encode(logits, stream), stream), temperature)
    # The kept mass is off by error times itself, and where that takes it beyond 1 all are scaled back by as much again.
    found = np.take_along_axis(taught, top, axis=2)
    np.testing.assert_allclose(found, kept, rtol=2 * error, atol=1e-7)
    others = np.take_along_axis(taught, rest, axis=2)
    np.testing.assert_allclose(others - others[..., :1], 0, atol=1e-9)
    # What rounding moves in the kept mass, the others share; below 1e-8 nothing is told apart.
    np.testing.assert_allclose(others.sum(axis=2), 1 - kept.sum(axis=2), atol=2 * error + k * 2**-25 + 1e-8 * CLASSES)

    codec = make(temperature, "zero")
    taught = softmax(codec.decode(codec.encode(logits, stream), stream), temperature)
    scaled = kept / kept.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(np.take_along_axis(taught, top, axis=2), scaled, rtol=2 * error, atol=1e-6)
    assert (np.take_along_axis(taught, rest, axis=2) == 0).all()


def test_probabilities_stored_at_1_are_tempered_by_decoding(logits, stream):
    """Kept classes keep their ratios at any T, up to float32."""
    codec = peers.fkd(CLASSES, temperature=1.0, tail="zero")
    taught = softmax(codec.decode(codec.encode(logits, stream), stream), 4.0)
    p = softmax(logits, 4.0)
    kept = np.where(np.argsort(np.argsort(-p, axis=2), axis=2) < 5, p, 0)
    # Probabilities below 1e-8 are taken for it.
    clear = (softmax(logits, 1.0) > 1e-8) | (kept == 0)
    clear = clear.all(axis=2)
    assert clear.mean() > 0.5
    np.testing.assert_allclose(taught[clear], (kept / kept.sum(axis=2, keepdims=True))[clear], rtol=1e-4, atol=1e-9)


def test_views_differ_in_their_parameters_and_streams_in_theirs(logits, stream):
    codec = peers.tinyvit(CLASSES, 10)
    seeds = peers.read(codec.encode(logits, stream), codec.layout)["seed"]
    assert seeds.dtype == np.dtype("<i4") and seeds.min() >= 0 and len(np.unique(seeds)) == seeds.size
    crop = peers.read(peers.fkd(CLASSES).encode(logits, stream), peers.fkd(CLASSES).layout)["crop"]
    assert crop.min() >= 0 and crop.max() < 1 and crop.std() == pytest.approx(12**-0.5, rel=0.1)


# --- the others


def test_distillkit_is_exact_where_the_curve_fits(stream):
    """Log-probabilities that are a + b t + c sqrt(t) of their rank survive; the first is rounded to 8 bits."""
    rng = np.random.default_rng(1)
    rank = np.arange(CLASSES - 1)
    one = np.concatenate([[2.0], 1 - 0.02 * rank - 0.3 * np.sqrt(rank)])
    order = np.array([[rng.permutation(CLASSES) for _ in range(2)] for _ in range(96)])
    logits = one[order].astype(np.float32)
    codec = peers.DistillKit(CLASSES, tail="uniform", temperature=1.0)
    decoded = codec.decode(codec.encode(logits, stream), stream)
    log_p = np.log(softmax(logits, 1.0))
    first, kept = order == 0, (order > 0) & (order < 50)
    np.testing.assert_allclose(decoded[kept], log_p[kept], atol=1e-4)
    np.testing.assert_allclose(decoded[first], log_p[first], rtol=2**-8)


def test_random_sampling_is_unbiased(logits, stream):
    """Mean of share over R streams: its error has variance p (1 - p) / (draws R), so z = error / sd is standard
    normal but for the discreteness of rare classes. Over 1000 classes |z| > 5 has a probability below 1e-3 in all,
    where 30 draws are expected or more; rarer ones are taken together. The mean of z² is 1 ± sqrt(2/1000) times 5."""
    repeats, draws = 2000, 100
    codec = peers.Sampled(CLASSES, draws)
    same = np.repeat(logits[:1], repeats, axis=0)
    streams = np.random.default_rng(5).integers(0, 1 << 64, repeats, np.uint64)
    decoded = codec.decode(codec.encode(same, streams), streams)
    shares = softmax(decoded, 4.0)
    p = softmax(logits[0], 4.0)
    error = shares.mean(axis=0) - p
    z = error / np.sqrt(p * (1 - p) / (draws * repeats))
    assert np.abs(z[p * draws * repeats >= 30]).max() < 5
    assert (z**2).mean() == pytest.approx(1, abs=5 * math.sqrt(2 / 1000))
    assert abs(z.mean()) < 5 / math.sqrt(z.size)
    # Views and rows draw on their own: the variance of a view's share is that of independent draws.
    assert (shares.var(axis=0) / (p * (1 - p) / draws)).mean() == pytest.approx(1, abs=0.05)


def test_random_sampling_gives_whole_shares_and_depends_on_the_stream(logits, stream):
    codec = peers.Sampled(CLASSES, 100)
    rows = codec.encode(logits, stream)
    assert (codec.encode(logits, stream + np.uint64(1)) != rows).any(axis=1).all()
    decoded = codec.decode(rows, stream)
    taught = softmax(decoded, 4.0)
    counts = np.rint(taught * 100)
    np.testing.assert_allclose(taught * 100, counts, atol=1e-3)
    assert (counts.sum(axis=2) == 100).all() and ((counts == 0) == (decoded == ABSENT)).all()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_uniform_steps_err_by_half_a_step_at_most(bits, logits, stream):
    codec = peers.PerRow(CLASSES, bits)
    decoded = codec.decode(codec.encode(logits, stream), stream)
    # The step is rounded up to float16 (a factor of 1 + 2^-10 at most), after an offset rounded down by up to 2^-10
    # of its size, which widens the range; float32 adds 1e-5.
    low, high = logits.min(axis=2), logits.max(axis=2)
    step = (high - low + 2**-10 * np.abs(low)) * (1 + 2**-10) / (2**bits - 1)
    assert (np.abs(decoded - logits).max(axis=2) <= step / 2 + 1e-5).all()
    assert (np.abs(decoded - logits).max(axis=2) > 0.4 * step).mean() > 0.9


def test_a_constant_vector_survives_uniform_steps(stream):
    logits = np.full((96, 2, CLASSES), -1.25, np.float32)
    codec = peers.PerRow(CLASSES, 4)
    np.testing.assert_array_equal(codec.decode(codec.encode(logits, stream), stream), logits)


def test_dense_labels_are_half_precision(logits, stream):
    codec = peers.Dense(CLASSES)
    np.testing.assert_array_equal(codec.decode(codec.encode(logits, stream), stream), logits.astype(np.float16))
