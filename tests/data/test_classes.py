"""Class lists are numbered by a rule that is said, kept as a record, and compared before they are mixed."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data.readers.reader_image_folder import natural_key

from cache.errors import UserError
from pipeline.data import classes
from pipeline.data.classes import Classes, numbered, read_list, read_map

NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=8)
PLAIN = st.lists(st.from_regex(r"\A[a-c]{0,2}[0-9]{1,3}[a-c]?\Z"), min_size=1, max_size=8, unique_by=str.lower)


def named(*names: str) -> Classes:
    return Classes(len(names), names, "lexical")


def refused(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value) and "fix: " in str(caught.value)
    return str(caught.value)


@given(PLAIN)
def test_natural_order_is_timms_and_lexical_order_torchvisions(names):
    assert numbered(names, "natural").names == tuple(sorted(sorted(names), key=natural_key))
    assert numbered(names).names == tuple(sorted(names))
    assert classes.differ(names) == (numbered(names).names != numbered(names, "natural").names)


def test_a_file_numbers_the_classes_and_may_name_more_than_the_source_has(tmp_path):
    (tmp_path / "order.txt").write_bytes("\ufeffred\r\nblue\r\nhéron\r\n".encode())
    order = str(tmp_path / "order.txt")
    assert numbered(["blue", unicodedata.normalize("NFD", "héron")], order) == Classes(
        3, ("red", "blue", "héron"), "file"
    )
    assert "'green' in the source" in refused(numbered, ["blue", "green"], order)
    for text, words in (("", "empty line; found line 1"), ("a\n\nb", "line 2"), ("é\ne\u0301", "names a class twice")):
        (tmp_path / "order.txt").write_text(text)
        assert words in refused(read_list, order)
    assert "lexical or natural" in refused(numbered, ["a"], "naturel")
    (tmp_path / "order.txt").write_bytes(b"\xff")
    assert "UTF-8" in refused(read_list, order)


@given(NAMES, NAMES)
def test_lists_are_the_same_if_their_names_are_in_nfc(ours, theirs):
    """Against the plain comparison of normalised lists; the error names the first place that differs."""
    plain = [[unicodedata.normalize("NFC", name) for name in names] for names in (ours, theirs)]
    if plain[0] == plain[1]:
        named(*ours).require_same(named(*theirs), "--data", "--val")
        return
    with pytest.raises(UserError, match="--val has other classes than --data") as caught:
        named(*ours).require_same(named(*theirs), "--data", "--val")
    at = next(i for i in range(9) if plain[0][i : i + 1] != plain[1][i : i + 1])
    assert f"as class {at}" in str(caught.value)


def test_forms_of_one_name_are_equal_and_nameless_lists_are_compared_by_count():
    named("café").require_same(named("cafe\u0301"), "a", "b")
    named("a", "b").require_same(Classes(2), "a", "b")
    assert "found 3 classes, expected 2" in refused(named("a", "b").require_same, Classes(3), "a", "b")
    assert "found 'none'" not in refused(named("a", "b").require_same, named("a"), "a", "b")
    assert "--class-order" in refused(named("1", "10", "2").require_same, named("1", "2", "10"), "a", "b")
    assert "two classes have one name" in refused(numbered, ["é", "e\u0301"])


@given(NAMES | st.none(), st.sampled_from(["lexical", "natural", "file", "source", None]))
def test_a_record_survives_json(names, rule):
    found = Classes(len(names) if names else 7, tuple(names) if names else None, rule)
    assert Classes.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert Classes.from_json(json.dumps(found.to_json())) == found


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["count", "names", "rule"]), inner),
        max_leaves=6,
    )
)
def test_no_record_of_any_origin_escapes_as_another_error(record):
    try:
        found = Classes.from_json(record, "weights.safetensors")
    except UserError as error:
        assert "weights.safetensors" in str(error) and "\n" not in str(error)
    else:
        assert found.to_json() == (record if isinstance(record, dict) else json.loads(record))


def test_a_map_renames_and_renumbers_by_name(tmp_path):
    (tmp_path / "map.yaml").write_text("ant: red\nno: green\n1: blue\n")
    names = read_map(tmp_path / "map.yaml")
    assert names == {"ant": "red", "no": "green", "1": "blue"}
    mapped = named("1", "ant", "no").renamed(names)
    assert mapped.names == ("blue", "red", "green")
    assert mapped.numbers_in(named("blue", "green", "red"), "--val", "--data").tolist() == [0, 2, 1]
    assert np.array_equal(Classes(3).numbers_in(mapped, "--val", "--data"), [0, 1, 2])
    assert "found '1'" in refused(named("1", "ant", "no").numbers_in, mapped, "--val", "--data")
    assert "two classes one name" in refused(named("ant", "red").renamed, names)
    for text, words in (("", "mapping"), ("- a", "mapping"), ("a: [b]", "mapping"), ("a: b\na: c", "'a' twice")):
        (tmp_path / "map.yaml").write_text(text)
        assert words in refused(read_map, tmp_path / "map.yaml")
    (tmp_path / "map.yaml").write_text("a: b: c\n\t- {")
    assert "--class-map" in refused(read_map, tmp_path / "map.yaml")
