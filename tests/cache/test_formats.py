"""Labels of every released format stay readable for ever: frozen examples, written once by fixtures/make.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.subspace import reference_decode

from cache import codec as codecs
from cache.codec.subspace import Subspace

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_a_frozen_example_reads_as_it_did(path):
    """Pack and unpack are exact; decoding is, but for the rounding of float32."""
    frozen = json.loads(path.read_text())
    codec = codecs.from_config(frozen["config"])
    assert path.stem == f"{codec.config['name']}-{codec.config['format']}"
    assert codec.config == frozen["config"]
    stream = np.array([int(key) for key in frozen["stream"]], np.uint64)
    rows = np.frombuffer(bytes.fromhex("".join(frozen["rows"])), np.uint8).reshape(len(stream), -1)
    expected = np.array(frozen["decoded"], np.float32)
    for packed, keys in ((frozen["packed"], stream), (frozen["packed_with_keys"], None)):
        np.testing.assert_array_equal(codec.unpack(bytes.fromhex(packed), keys), rows)
        assert codec.pack(rows, keys).hex() == packed
    decoded = codec.decode(rows, stream)
    np.testing.assert_array_equal(codec.encode(np.array(frozen["logits"], np.float32), stream), rows)
    bound = 2 * reference_decode(codec, rows, stream)[1] if isinstance(codec, Subspace) else 0
    assert (np.abs(decoded.astype(np.float64) - expected) <= bound).all()


def test_every_codec_has_a_frozen_example():
    assert {path.stem.split("-")[0] for path in FIXTURES} == set(codecs.NAMES)


def test_the_frozen_subspace_has_bytes_and_nibbles_on_the_trellis_and_some_off_it():
    (path,) = (path for path in FIXTURES if path.stem.startswith("subspace"))
    config = json.loads(path.read_text())["config"]
    assert 0 < config["wide"] < config["trellis"] < config["dims"]
