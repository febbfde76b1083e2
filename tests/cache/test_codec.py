"""Around the store: codecs within bounds derived here, the manifest that guards it, planes that leave it in order."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_store import manifest

import cache
from cache import Manifest, UserError
from cache import codec as codecs

NAMES = ("fp16", "int8")
U = 2.0**-24  # half a unit in the last place of float32, relative
TINY = 2.0**-142  # covers 128 roundings to float32's smallest number, 2⁻¹⁴⁹


@st.composite
def pairs(draw) -> np.ndarray:
    """f32 (B, 2, C): any encodable numbers, or realistic ones of any offset and spread."""
    shape = draw(st.integers(1, 5)), 2, draw(st.sampled_from([1, 2, 3, 10, 33, 257]))
    if draw(st.booleans()):
        return draw(hnp.arrays(np.float32, shape, elements=st.floats(-65504, 65504, width=32)))
    normal = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal(shape)
    return (normal * 10 ** draw(st.floats(-8, 3)) + draw(st.floats(-5e4, 5e4))).clip(-65504, 65504).astype(np.float32)


def keys(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64)


def round_trip(name: str, logits: np.ndarray) -> np.ndarray:
    codec = codecs.make(name, classes=logits.shape[2])
    rows = codec.encode(logits, keys(len(logits)))
    assert rows.shape == (len(logits), codec.row_bytes)
    assert rows.dtype == np.uint8
    decoded = codec.decode(rows, keys(len(logits)))
    assert decoded.shape == logits.shape
    assert decoded.dtype == np.float32
    return decoded


@settings(deadline=None)
@given(pairs())
def test_int8_is_off_by_half_a_step_and_the_rounding_of_float32(logits):
    """|decoded - x| ≤ s/2 + U·(2·(M - m) + 2·|o|) + TINY.

    m, M: a vector's exact extremes, s = (M - m) / 254, o = (M + m) / 2. Kept are s' and o' with |s' - s| ≤ U·s and
    |o' - o| ≤ U·|o|. Rounding (x - o') / s' costs s'/2; clipping to ±127 costs at most 127·|s' - s| + |o' - o|, for
    |x - o| ≤ 127·s. The decoder's product rounds by U·127·s', its sum by U·(|o'| + 127·s'). With 254·s = M - m that
    is s/2 + U·((M - m)·(1/508 + 1/2 + 1/2 + 1/2) + 2·|o|), and each of it may be a subnormal's rounding.
    """
    x = logits.astype(np.float64)
    low, high = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
    spread, middle = high - low, (high + low) / 2
    bound = spread / 508 + U * (2 * spread + 2 * np.abs(middle)) + TINY
    assert (np.abs(round_trip("int8", logits) - x) <= bound).all()


@settings(deadline=None)
@given(st.floats(-65504, 65504, width=32), st.sampled_from([1, 2, 10, 257]))
def test_int8_keeps_a_constant_vector_exactly(value, classes):
    logits = np.full((2, 2, classes), value, np.float32)
    np.testing.assert_array_equal(round_trip("int8", logits), logits)


@settings(deadline=None)
@given(pairs())
def test_fp16_is_ieee_half_precision(logits):
    """Python's own struct module packs the same bytes, and gives back the same numbers."""
    codec = codecs.make("fp16", classes=logits.shape[2])
    rows = codec.encode(logits, keys(len(logits)))
    for vectors, row, decoded in zip(logits, rows, codec.decode(rows, keys(len(logits))), strict=True):
        packed = struct.pack(f"<{vectors.size}e", *vectors.ravel().tolist())
        assert row.tobytes() == packed
        assert decoded.ravel().tolist() == list(struct.unpack(f"<{vectors.size}e", packed))


def test_an_int8_row_is_scales_offsets_and_steps():
    """Format 1, spelt out for whoever reads it without this package."""
    logits = np.array([[[-127, 0, 127], [1, 2, 255]]], np.float32)
    row = codecs.make("int8", classes=3).encode(logits, keys(1))[0].tobytes()
    # The augmented vector: offset 128, scale 1, so 1 is the lowest step and 2 the one above it.
    assert row == struct.pack("<2f2f3b3b", 1, 1, 0, 128, -127, 0, 127, -127, -126, 127)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_depends_on_its_own_pair_only(name):
    logits = np.random.default_rng(0).normal(0, 5, (7, 2, 33)).astype(np.float32)
    codec = codecs.make(name, classes=33)
    rows = codec.encode(logits, keys(7))
    alone = [codec.encode(logits[i : i + 1], keys(7)[i : i + 1])[0] for i in range(7)]
    np.testing.assert_array_equal(rows, alone)
    np.testing.assert_array_equal(
        codec.decode(np.asfortranarray(rows)[::-2], keys(7)[::-2]), codec.decode(rows, keys(7))[::-2]
    )


@pytest.mark.parametrize(("name", "expected"), [("fp16", 4000), ("int8", 2016)])
def test_bytes_of_a_pair_of_1000_classes(name, expected):
    assert codecs.make(name, classes=1000).row_bytes == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [(0, 0, 0), (2, 1, 9)])
@pytest.mark.parametrize(
    ("value", "fact"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite"), (65520, "beyond"), (-1e30, "beyond")],
)
def test_logits_that_no_codec_could_keep_are_refused(name, where, value, fact):
    logits = np.zeros((3, 2, 10), np.float32)
    logits[where] = value
    with pytest.raises(UserError, match=rf"{fact}.*1 of 3 samples.*fix:"):
        codecs.make(name, classes=10).encode(logits, keys(3))


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_half_is_kept(name):
    logits = np.array([[[65504, -65504], [-65504, -65504]]], np.float32)
    np.testing.assert_array_equal(round_trip(name, logits), logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_json_and_decides_equality(name):
    codec = codecs.make(name, classes=10)
    assert codec.config == {"name": name, "format": 1, "classes": 10}
    assert codecs.from_config(json.loads(json.dumps(codec.config))) == codec
    assert codecs.make(name, classes=11) != codec
    assert len({codecs.make(other, classes=10) for other in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        (None, "None, expected a mapping of name, format, classes"),
        ([], r"\[\], expected a mapping"),
        ({}, "expected a mapping"),
        ({"name": "int8", "classes": 10}, "'classes', 'name'"),
        ({"name": "int8", "format": 1}, "'format', 'name'"),
        ({"name": "int8", "format": 1, "classes": 10, "bits": 3}, "'bits'"),
        ({"name": "int4", "format": 1, "classes": 10}, "unknown name; found 'int4', expected fp16 or int8"),
        ({"name": ["int8"], "format": 1, "classes": 10}, "unknown name"),
        ({"name": "int8", "format": 2, "classes": 10}, "unknown format of int8; found 2, expected 1"),
        ({"name": "int8", "format": True, "classes": 10}, "unknown format"),
        ({"name": "int8", "format": 1, "classes": 0}, "classes; found 0"),
        ({"name": "int8", "format": 1, "classes": -1}, "classes"),
        ({"name": "int8", "format": 1, "classes": 2**20 + 1}, "classes"),
        ({"name": "int8", "format": 1, "classes": 10.0}, "classes"),
        ({"name": "int8", "format": 1, "classes": "10"}, "classes"),
        ({"name": "fp16", "format": 1, "classes": True}, "classes"),
        ({"name": "fp16", "format": 1, "classes": None}, "classes"),
    ],
)
def test_a_hostile_config_is_refused(config, fact):
    with pytest.raises(UserError, match=f"codec.*{fact}.*fix: "):
        codecs.from_config(config)


# Manifest


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_a_manifest_survives_json(seed, numbers):
    made = manifest(seed=seed, mean=tuple(numbers[:3]), std=tuple(numbers[3:]))
    text = json.dumps(made.to_attributes())
    assert Manifest.from_attributes(json.loads(text)) == made
    # A reader that has only doubles sees the same manifest.
    assert Manifest.from_attributes(json.loads(text, parse_int=lambda digits: int(float(digits)))) == made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("format", value) for value in (0, 1, 4, "2", True, None)),
        *((field, value) for field in ("samples", "classes", "views", "size", "block_rows") for value in (0, -1, 1.0)),
        *((field, value) for field in ("samples", "classes", "views", "size", "block_rows") for value in ("5", True)),
        *(("samples", value) for value in (2**40 + 1, 10**30, None, [])),
        *(("classes", value) for value in (2**20 + 1, 6)),
        ("views", 65537),
        ("block_rows", 2**20 + 1),
        *((field, value) for field in ("dataset", "teacher", "teacher_weights") for value in ("", "x" * 5000, 7, None)),
        *((field, value) for field in ("mean", "std") for value in (None, 0.5, [0.5] * 2, [0.5] * 4, ["0.5"] * 3)),
        *((field, [0.5, 0.5, value]) for field in ("mean", "std") for value in (np.nan, np.inf, 10**400, True, None)),
        *(("std", [0.5, 0.5, value]) for value in (0, -0.2)),
        *((field, value) for field in ("policy", "base", "decoder", "codec", "versions") for value in (None, [], "x")),
        *(("seed", value) for value in (7, "-1", "", "07", "1e3", "٣", "9" * 5000, str(2**64), None)),
        *(("codec", value) for value in ({}, {"name": "int8", "format": 1, "classes": 6})),
        ("crc32", 0),
    ],
)
def test_a_hostile_field_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"{field}.*; found .*expected "):
        Manifest.from_attributes({**manifest().to_attributes(), field: value})


NEEDED = [field.name for field in dataclasses.fields(Manifest) if field.default is dataclasses.MISSING]


@pytest.mark.parametrize("field", [*NEEDED, "crc32"])
def test_a_missing_field_is_refused(field):
    attributes = manifest().to_attributes()
    del attributes[field]
    with pytest.raises(UserError, match=f"missing .*{field}|not that of a store"):
        Manifest.from_attributes(attributes)


def test_what_is_not_a_manifest_is_refused():
    for attributes in (None, [], "x", {}):
        with pytest.raises(UserError, match="not that of a store of soft labels"):
            Manifest.from_attributes(attributes)
    with pytest.raises(UserError, match=r"unknown.*extra"):
        Manifest.from_attributes({**manifest().to_attributes(), "extra": 1})


@pytest.mark.parametrize(
    ("sizes", "fact"),
    [
        ({"samples": 2**40, "block_rows": 1}, "block_rows; found '2199023255552 blocks'"),
        ({"samples": 2**40, "classes": 2**20, "block_rows": 2**20}, "block_rows; found 'blocks of .* bytes'"),
    ],
)
def test_sizes_that_are_absurd_together_are_refused(sizes, fact):
    codec = codecs.make("int8", classes=sizes.get("classes", 5)).config
    with pytest.raises(UserError, match=fact):
        Manifest.from_attributes(manifest(**sizes, codec=codec).to_attributes())


def test_any_changed_value_is_found_by_the_checksum():
    """Values that stay within range: another seed, another probability deep inside the policy."""
    attributes = manifest().to_attributes()
    for changed in (
        {"seed": "7"},
        {"mean": [0.485, 0.456, 0.407]},
        {"policy": {**attributes["policy"], "probability": 0.3}},
    ):
        with pytest.raises(UserError, match="crc32"):
            Manifest.from_attributes({**attributes, **changed})


OTHERS = {
    "dataset": "d2",
    "samples": 51,
    "classes": 6,
    "teacher": "vgg",
    "teacher_weights": "w2",
    "teacher_size": 224,
    "mean": (0.0, 0.456, 0.406),
    "std": (1.0, 0.224, 0.225),
    "policy": {},
    "base": {},
    "size": 64,
    "seed": 2**64 - 2,
    "views": 3,
    "decoder": {},
    "codec": codecs.make("fp16", classes=5).config,
    "block_rows": 25,
    "energy": True,
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_contradiction_names_field_values_and_fix(field):
    with pytest.raises(
        UserError, match=rf"store has another {field}(\.\w+)?; found .*, expected .*; fix: .*store"
    ) as caught:
        cache.check(manifest(), **manifest(**{field: OTHERS[field]}).identity())
    if not isinstance(OTHERS[field], dict | tuple):
        assert f"found {getattr(manifest(), field) or 'none'}, expected {OTHERS[field]};" in str(caught.value)


def test_a_contradiction_deep_in_a_mapping_is_named_by_its_path():
    policy = manifest().policy
    for changed, path in (
        ({**policy, "probability": 0.3}, r"policy\.probability; found 0\.2, expected 0\.3;"),
        ({**policy, "ops": [["invert", 0.0], ["rotate", 7.0]]}, r"policy\.ops\.1\.1; found 6\.66.*, expected 7\.0;"),
        ({**policy, "ops": [["invert", 0.0]]}, r"policy\.ops\.1; found .*, expected nothing;"),
        ({**policy, "gamma": 1}, r"policy\.gamma; found nothing, expected 1;"),
    ):
        with pytest.raises(UserError, match=path):
            cache.check(manifest(), policy=changed)


def test_the_first_contradiction_is_named_and_agreement_is_silent():
    with pytest.raises(UserError, match="another dataset"):
        cache.check(manifest(), views=9, dataset="d2", seed=1)
    cache.check(manifest(), **manifest(versions={"numpy": "3"}).identity())
    cache.check(manifest(), mean=[0.485, 0.456, 0.406], policy=json.loads(json.dumps(manifest().policy)))
    assert set(manifest().identity()) == set(OTHERS)


# Planes
