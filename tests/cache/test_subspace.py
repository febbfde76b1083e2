"""The `subspace` code against float64 decoders and dither written here, from the documented format alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace import (
    TYPES,
    coded,
    codes,
    coefficients,
    dither,
    dither_bytes,
    fields,
    header,
    integers,
    reference_decode,
    resolved,
    streams,
    text,
    with_coefficients,
)

from cache import UserError
from cache import codec as codecs
from cache.codec import entropy, subspace

# Dither


@pytest.mark.parametrize("key", [0, 1, 0x0123456789ABCDEF, 2**64 - 1])
def test_the_dither_is_philox_in_strided_order(key):
    for dims in range(1, 71):
        for view in range(2):
            found = np.full(dims, 99, np.uint8)
            entropy.dither(np.uint64(key), view, found)
            np.testing.assert_array_equal(found, dither_bytes(key, view, dims))


def test_dither_bytes_lie_where_the_format_says():
    """Of 40 coefficients three calls: byte j of call k belongs to coefficient 3 j + k. Words from Random123's vectors.

    The known answer of counter 0 and key 0 is 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    """
    found = np.empty(40, np.uint8)
    entropy.dither(np.uint64(0), 0, found)
    assert found[::3].tobytes() == bytes.fromhex("d5e82766 8dc569e1 4cac57bc d8db009b")[:14]


# Rows


@settings(deadline=None, max_examples=60)
@given(codes(), st.integers(0, 2**32), st.integers(0, 6))
def test_decoding_is_that_of_the_format(codec, seed, count):
    """Whatever integers the rows hold: with the rows' own keys, or others that stand in for them."""
    rng = np.random.default_rng(seed)
    used = codec.wide + (codec.dims - codec.wide) // 2  # an odd nibble's other half is padding
    views = np.zeros((count, 2, codec.segment), np.uint8)
    views[..., :used] = rng.integers(0, 256, (count, 2, used))
    views[..., used : used + (codec.dims - codec.wide) % 2] = rng.integers(0, 16)
    own, others = streams(count, seed), streams(count, seed + 1)
    rows = np.hstack([header(own), views.reshape(count, 2 * codec.segment)])
    for stream, decoded in ((own, codec.decode(rows)), (others, codec.decode(rows, others))):
        expected, bound = reference_decode(codec, rows, stream)
        assert decoded.dtype == np.float32
        assert decoded.shape == (count, 2, codec.classes)
        assert (np.abs(decoded - expected) <= bound).all()


@settings(deadline=None, max_examples=60)
@given(codes(), st.integers(0, 2**32), st.integers(0, 6))
def test_encoding_rounds_the_coefficient_plus_its_dither(codec, seed, count):
    """q = floor(x + u + 1/2), clipped; but for an x that float32 takes for its neighbour, within 1e-3 of a tie.

    Off the trellis, that is; test_trellis.py has the others.
    """
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.uniform(-3, 5, (count, 2, 1)))
    logits = with_coefficients(codec, spread * rng.normal(size=(count, 2, codec.dims)))
    stream = streams(count, seed)
    rows = codec.encode(logits, stream)
    assert rows.shape == (count, codec.row_bytes)
    np.testing.assert_array_equal(rows[:, :16], header(stream))
    found = integers(rows, codec.dims, codec.wide)
    wide = np.arange(codec.dims) < codec.wide
    exact = coefficients(codec, logits) + dither(stream, codec.dims) + 0.5
    low, high = (
        np.floor(exact + slack).clip(np.where(wide, -128, -8), np.where(wide, 127, 7)) for slack in (-1e-3, 1e-3)
    )
    alone = np.arange(codec.dims) >= np.array(codec.trellis)[:, None]
    assert ((low <= found) & (found <= high))[:, alone].all()


@pytest.mark.parametrize("size", [7.4, 9, 126, 128, 200, 255, 257, 1000, 30000])
def test_coefficients_out_of_range_are_clipped_not_wrapped(size):
    codec = coded(30, 21, 10, scale=np.full(21, 2e-3))
    signs = np.random.default_rng(0).choice([-1, 1], (8, 2, 21))
    found = integers(codec.encode(with_coefficients(codec, signs * size), streams(8)), 21, 10)
    limit = np.where(np.arange(21) < 10, 127, 7)
    nearest = np.where(signs > 0, np.minimum(size, limit), -np.minimum(size, limit + 1))
    assert (np.abs(found - nearest) <= 1).all()
    if size > 128:
        np.testing.assert_array_equal(found, nearest)


def test_a_row_depends_on_its_own_pair_and_key_only():
    """Batches of other sizes sum a product in another order, which may turn a tie. So here are none.

    u + 1/2 is an odd multiple of 1/512, so an x that is an odd multiple of 1/1024 is 1/1024 away from any tie.
    """
    codec = coded(100, 60, 20, scale=np.full(60, 0.01))
    x = (2 * np.rint(np.random.default_rng(0).normal(0, 1500, (37, 2, 60))) + 1) / 1024
    logits, stream = with_coefficients(codec, x), streams(37)
    rows = codec.encode(logits, stream)
    for size in (1, 2, 3, 7, 36):
        parts = [slice(start, start + size) for start in range(0, 37, size)]
        np.testing.assert_array_equal(rows, np.concatenate([codec.encode(logits[p], stream[p]) for p in parts]))
        decoded = np.concatenate([codec.decode(rows[p], stream[p]) for p in parts])
        expected, bound = reference_decode(codec, rows, stream)
        assert (np.abs(decoded - expected) <= bound).all()
    turned = np.asfortranarray(rows)[::-2], stream[::-2]
    np.testing.assert_array_equal(rows[::-2], codec.encode(logits[::-2], stream[::-2]))
    assert (np.abs(codec.decode(*turned) - expected[::-2]) <= bound[::-2]).all()


def test_another_key_or_view_gives_other_rows():
    codec = coded(beta=np.full(24, 256))
    logits = with_coefficients(codec, np.repeat(np.random.default_rng(0).normal(size=(1, 1, 24)), 2, axis=1))
    rows = np.concatenate([codec.encode(logits, np.array([key], np.uint64)) for key in (0, 1, 2**32, 2**63)])
    assert len({view.tobytes() for view in rows[:, 16:].reshape(8, -1)}) == 8


@pytest.mark.parametrize("name", codecs.NAMES)
def test_no_pairs_are_no_rows(name):
    codec = coded() if name == "subspace" else codecs.make(name, classes=40)
    rows = codec.encode(np.zeros((0, 2, 40), np.float32), streams(0))
    assert rows.shape == (0, codec.row_bytes)
    assert codec.decode(rows, streams(0)).shape == (0, 2, 40)
    assert codec.unpack(codec.pack(rows, streams(0)), streams(0)).shape == rows.shape


@pytest.mark.parametrize(
    "stream", [np.zeros(2, np.uint64), np.zeros(4, np.uint64), np.zeros(3, np.int64), np.zeros((3, 1), np.uint64)]
)
def test_keys_must_be_one_u64_a_row(stream):
    codec = coded()
    rows = codec.encode(np.zeros((3, 2, 40), np.float32), streams(3))
    for call in (
        lambda: codec.encode(np.zeros((3, 2, 40), np.float32), stream),
        lambda: codec.decode(rows, stream),
        lambda: codec.pack(rows, stream),
        lambda: codec.decode(rows[:, 1:], streams(3)),
        lambda: codec.pack(rows.astype(np.int8), streams(3)),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_logits_that_no_codec_could_keep_are_refused():
    for value in (np.nan, np.inf, -65520):
        with pytest.raises(UserError, match=r"logit.*1 of 3 samples"):
            coded().encode(
                np.insert(np.zeros((3, 2, 39), np.float32), 5, [[value, 0]] + [[0, 0]] * 2, axis=2), streams(3)
            )


# Noise


SAMPLES = 20000


@pytest.fixture(scope="module")
def repeated() -> dict:
    """One pair of logits under many keys; coefficients of all fractions, half of them much below a step."""
    codec = coded(wide=12, beta=[256] * 8 + [0, 1, 40, 200] * 4)
    x = np.random.default_rng(1).normal(size=(2, 24)) * np.where(np.arange(24) % 2, 0.1, 2.0)
    logits = np.repeat(with_coefficients(codec, x[None]), SAMPLES, axis=0)
    stream = np.arange(SAMPLES, dtype=np.uint64)
    rows = codec.encode(logits, stream)
    truth = coefficients(codec, logits[:1])[0]
    decoded = np.stack([resolved(codec, codec.decode(rows, key)) for key in (stream, stream + np.uint64(1))])
    right, wrong = decoded - truth
    fraction, beta = truth % 1, fields(codec)["beta"]
    # Of e = q - beta u - x, with f the fraction of x: Var q = f (1 - f), Cov(q, u) = f (1 - f) / 2, Var u = 1 / 12.
    variance = fraction * (1 - fraction) * (1 - beta) + beta**2 / 12
    return {"right": right, "wrong": wrong, "variance": variance, "beta": beta}


def test_the_mean_over_keys_is_the_truth(repeated):
    """Within five standard errors and the 1/512 step that 256 levels of dither leave."""
    bound = 5 * np.sqrt(repeated["variance"] / SAMPLES) + 1 / 512
    assert (np.abs(repeated["right"].mean(axis=0)) <= bound).all()


def test_the_noise_is_that_of_the_documented_dither(repeated):
    """e is at most 1 in size, so a mean of e² has a variance of at most Var e / n; and again 256 levels."""
    found = (repeated["right"] ** 2).mean(axis=0)
    assert (np.abs(found - repeated["variance"]) <= 5 * np.sqrt(repeated["variance"] / SAMPLES) + 1 / 256).all()
    whole = repeated["beta"] == 1  # Schuchman's condition: uniform, whatever the logits
    assert np.abs(found[whole] * 12 - 1).max() < 0.03


def test_errors_of_rows_views_and_coefficients_are_uncorrelated(repeated):
    errors = repeated["right"] / repeated["right"].std(axis=0)
    together = errors.reshape(SAMPLES, 48)
    following = np.roll(together, 1, axis=0)
    for product in (together.T @ together / SAMPLES - np.eye(48), together.T @ following / SAMPLES):
        assert np.abs(product).max() <= 5 / np.sqrt(SAMPLES)


def test_another_rows_dither_makes_far_more_noise(repeated):
    """f (1 - f) + beta² / 12 instead: it must be the right key."""
    whole = repeated["beta"] == 1
    right, wrong = ((repeated[name][:, whole] ** 2).mean() for name in ("right", "wrong"))
    assert wrong > 2 * right


# Config


def test_the_formats_are_told_apart():
    """Of codes by their config's, and of stores by their header's."""
    for version, beside, another in ((1, 2, 3), (3, 3, 1), (4, 4, 1)):
        codec = coded(version=version)
        assert codec.config["format"] == version
        assert subspace.split(codec)[0]["format"] == beside
        for other in (0, 2, 5, 1.0, "3", None, True):
            with pytest.raises(UserError, match=r"unknown format of subspace; found .* expected 1 or 3 or 4"):
                codecs.from_config({**codec.config, "format": other})
        with pytest.raises(UserError, match=r"codec: "):
            codecs.from_config({**codec.config, "format": another})


@pytest.mark.parametrize("version", [1, 3, 4])
def test_a_config_survives_json_and_decides_equality(version):
    codec = coded(seed=1, version=version)
    again = codecs.from_config(json.loads(json.dumps(codec.config)))
    assert again == codec
    assert hash(again) == hash(codec)
    assert set(codec.config) == {"name", "format", "classes", "dims", "trellis", "wide", *TYPES}
    for name in TYPES:
        assert coded(seed=1, version=version, **{name: np.ones_like(fields(codec)[name])}) != codec
    assert coded(seed=1, version=version, wide=9) != codec
    same = fields(codec) | {"beta": fields(codec)["beta"] * 256}
    assert coded(seed=1, version=version, trellis=0, **same) == codec
    assert coded(seed=1, version=version, trellis=1, **same) != codec


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("classes", value) for value in (1, 0, 39, 41, 2**20 + 1, 10**400, 40.0, "40", None, True)),
        *(("dims", value) for value in (0, -1, 23, 25, 41, 5000, 2**40, 24.0, "24", None, True, [24])),
        *(("wide", value) for value in (-1, 25, 10**400, 8.0, None, False)),
        *(("trellis", [7, value]) for value in (-1, 25, 10**400, 8.0, None, False, [7])),
        *(("trellis", value) for value in ([], [7], [7, 7, 7], 7, None, "77", {"a": 1, "b": 2})),
        *((key, value) for key in TYPES for value in ("", None, 7, b"AAAA", [], {}, "A" * 8, "A" * 10**6, "é" * 128)),
        *((key, "?" * len(coded().config[key])) for key in TYPES),
        *((key, coded().config[key][:-4] + "A===") for key in TYPES),
        *((key, coded().config[key][:-4] + "\n\n\n\n") for key in TYPES),
        *(("mean", text("<f4", 0, bad, count=40)) for bad in (np.nan, np.inf, -np.inf, 2e6, -2e6)),
        *(("scale", text("<f4", 1, bad, count=48)) for bad in (np.nan, np.inf, 0, -1, 1e-13, 2e6)),
        *(("beta", text("<u2", 256, bad, count=48)) for bad in (257, 1024, 1025, 65535)),
        *(("spread", text("<i4", 1, bad, count=48)) for bad in (0, -1, 2**20 + 1, 2**31 - 1)),
    ],
)
def test_a_hostile_config_is_refused_by_the_name_of_the_key(key, value):
    with pytest.raises(UserError) as caught:
        codecs.from_config({**coded().config, key: value}, "store/codec")
    message = str(caught.value)
    named = {"classes": ("classes", "mean"), "dims": ("dims", "basis")}.get(key, (key,))
    assert message.startswith(tuple(f"store/codec: {name}; found " for name in named))
    assert "expected" in message
    assert "fix: " in message
    assert len(message) < 400
    assert message.isprintable()


def test_a_dither_wider_than_a_step_is_for_the_trellis_only():
    """Four steps there; what is not there would be decoded with a noise that no encoder made."""
    beta = np.where(np.arange(24) < np.array([[7], [4]]), 1024, 256).ravel()
    config = coded(trellis=(7, 4), beta=beta.reshape(2, 24)).config
    for at, bad in ((0, 1025), (6, 65535), (7, 257), (23, 1024), (24, 1025), (28, 257), (29, 1024)):
        other = np.where(np.arange(48) == at, bad, beta)
        with pytest.raises(UserError, match=r"store/codec: beta; found .*, expected "):
            codecs.from_config({**config, "beta": text("<u2", *other, count=48)}, "store/codec")
    for trellis in ([6, 4], [7, 3]):
        with pytest.raises(UserError, match="store/codec: beta; found "):
            codecs.from_config({**config, "trellis": trellis}, "store/codec")
    old = coded(trellis=7, version=1, beta=beta[:24]).config
    with pytest.raises(UserError, match="store/codec: beta; found "):
        codecs.from_config({**old, "trellis": 6}, "store/codec")


@pytest.mark.parametrize("key", [*subspace.CONFIG_KEYS, "name", "format", "extra"])
def test_a_config_of_other_keys_is_refused(key):
    config = dict(coded().config)
    config.pop(key, None)
    for other in (config, {**coded().config, key + "s" * 500: 1}):
        if other != coded().config:
            with pytest.raises(UserError, match="expected a mapping of") as caught:
                codecs.from_config(other)
            assert len(str(caught.value)) < 500
