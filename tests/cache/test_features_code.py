"""One row for features and logits: what the store keeps of a teacher's last layer."""

import base64
import json

import numpy as np
import pytest
from support.features import CLASSES, WIDTH, draw, fitted, head
from support.stores import chunk, framed, manifest
from support.subspace import U, reference_decode

import cache
from cache import UserError
from cache import codec as codecs
from cache.codec import features


@pytest.fixture(scope="module")
def codec():
    return fitted()


def exact(weight: np.ndarray, bias: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The head's logits, f64."""
    return given.astype(np.float64) @ weight.astype(np.float64).T + bias


def kl(true: np.ndarray, other: np.ndarray, temperature: float = 4.0) -> float:
    p, q = (np.exp(logits / temperature) for logits in (true, other))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


def test_logits_are_the_heads_of_the_decoded_features(codec):
    """Both against the format's own text in float64, within float32's rounding of sums."""
    given, stream = draw(40, 1), np.arange(40, dtype=np.uint64) + 2**40
    rows = codec.encode(given, stream)
    expected, off = reference_decode(codec.code, rows, stream)
    assert (np.abs(codec.features(rows, stream) - expected) <= off).all()
    weight, bias = codec.head
    np.testing.assert_array_equal(weight, head()["weight"])
    size = np.abs(expected) @ np.abs(weight.T) + np.abs(bias)
    bound = off @ np.abs(weight.T) + (WIDTH + 2) * U * size
    decoded = codec.decode(rows, stream)
    assert decoded.shape == (40, 2, CLASSES)
    assert (np.abs(decoded - exact(weight, bias, expected)) <= bound).all()
    np.testing.assert_array_equal(codec.unpack(codec.pack(rows, stream), stream), rows)


def test_features_are_kept_without_bias(codec):
    """Over 4,000 dithers the mean is the truth, to five standard errors, of features that are nowhere centred."""
    given = draw(1, 2)
    stream = np.arange(4000, dtype=np.uint64)
    rows = codec.encode(np.repeat(given, len(stream), axis=0), stream)
    for decoded, true in (
        (codec.features(rows, stream), given[0]),
        (codec.decode(rows, stream), exact(*codec.head, given[0])),
    ):
        error = decoded.std(axis=0, dtype=np.float64) / np.sqrt(len(stream))
        assert (np.abs(decoded.mean(axis=0, dtype=np.float64) - true) <= 5 * error + 1e-4).all()
    assert np.abs(given.mean()) > 0.5


@pytest.mark.parametrize("budget", [0.002, 0.02])
def test_the_budget_is_shared_by_the_logits_kl_and_the_features_noise(budget):
    """On pairs that the code has not seen."""
    codec, unseen, stream = fitted(budget), draw(2000, 3), np.arange(2000, dtype=np.uint64)
    rows = codec.encode(unseen, stream)
    decoded = codec.features(rows, stream).astype(np.float64)
    share = np.square(decoded - unseen).sum() / np.square(unseen - unseen.mean(axis=(0, 1), dtype=np.float64)).sum()
    assert features.noise(codec, unseen, rows, stream) == pytest.approx(share, rel=1e-3)
    spent = kl(exact(*codec.head, unseen), exact(*codec.head, decoded))
    assert spent + budget * share / features.NOISE == pytest.approx(budget, rel=0.08)
    assert 0 < share < features.NOISE and 0 < spent < budget


def test_directions_that_the_head_does_not_feel_are_kept_all_the_same():
    """A head of two classes feels one direction of 24: that of their difference."""
    codec = codecs.fit("features", draw(512), **head(2), kl=0.02)
    unseen, stream = draw(500, 3), np.arange(500, dtype=np.uint64)
    rows = codec.encode(unseen, stream)
    assert features.noise(codec, unseen, rows, stream) < features.NOISE


def test_a_config_survives_json_and_decides_equality(codec):
    again = codecs.from_config(json.loads(json.dumps(codec.config)))
    assert again == codec and again.config == codec.config
    assert fitted(0.01) != codec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": 0}, "classes; found 0"),
        ({"classes": 8}, "weight; found"),
        ({"code": {"name": "int8", "format": 1, "classes": WIDTH}}, "code; found"),
        ({"code": 5}, "code; found 5"),
        ({"bias": 7}, "bias; found int"),
        ({"bias": base64.b64encode(np.full(CLASSES, np.nan, "<f4").tobytes()).decode()}, "bias; found a value"),
        ({"more": 1}, "found"),
        ({"format": 2}, "unknown format of features"),
    ],
)
def test_a_hostile_config_is_refused_by_the_name_of_the_key(codec, change, words):
    with pytest.raises(UserError, match=words):
        codecs.from_config({**codec.config, **change})


@pytest.mark.parametrize("bad", [np.nan, 1e6])
def test_features_that_no_code_keeps_are_refused(codec, bad):
    given = draw(4)
    given[2, 1, 3] = bad
    with pytest.raises(UserError, match=r"a teacher's feature is .*1 of 4 samples"):
        codec.encode(given, np.arange(4, dtype=np.uint64))


def test_too_few_pairs_are_refused():
    with pytest.raises(UserError, match=r"too few pairs.*found 63.*leave --features out"):
        codecs.fit("features", draw(63), **head(), kl=0.02)


# Stores


@pytest.fixture
def store(codec, tmp_path):
    made = manifest(classes=CLASSES, samples=30, views=2, block_rows=20, codec=codec.config)
    made = cache.create(tmp_path / "labels.zarr", made, np.zeros(30, np.uint8), np.arange(30, dtype=np.uint64))
    for view, block in made.missing_blocks():
        at = slice(*made.block_range(block))
        rows = codec.encode(draw(30, view)[at], made.dither_keys(view, at))
        made.write_block(
            view, block, rows, np.ones(len(rows), np.float32), np.zeros((len(rows), 2), np.uint32), (0.0, 1.0)
        )
    return made


def test_a_store_keeps_the_code_and_the_head_beside_its_rows(store, codec, tmp_path):
    """As zarr arrays, whose metadata says which axes are features; copied and pruned with it."""
    copy = cache.copy(store, tmp_path / "copy.zarr")
    for found in (cache.open(store.path), copy, cache.prune(copy, 1)):
        assert found.codec == codec
        plane = found.load_plane(0)
        np.testing.assert_array_equal(plane.codes, codec.encode(draw(30, 0), found.dither_keys(0, slice(None))))
    axes = json.loads((store.path / "codec/weight/zarr.json").read_bytes())["dimension_names"]
    assert axes == ["class", "feature"]
    header = json.loads((store.path / "zarr.json").read_bytes())["attributes"]["codec"]
    assert header.keys() == {"name", "format", "classes", "code", "head"}
    assert chunk(store.path, "codec/weight", 0, 0).read_bytes() == framed(head()["weight"].tobytes())


def test_a_head_that_is_not_the_stores_is_refused(store):
    other = head()["weight"] * 2
    chunk(store.path, "codec/weight", 0, 0).write_bytes(framed(other.tobytes()))
    with pytest.raises(UserError, match="codec: head; found"):
        cache.open(store.path)
    chunk(store.path, "codec/weight", 0, 0).write_bytes(head()["weight"].tobytes() + b"\0\0\0\0")
    with pytest.raises(UserError, match="is damaged: array codec/weight"):
        cache.open(store.path)
