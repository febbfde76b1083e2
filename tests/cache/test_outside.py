"""Whatever comes from outside, a check gives a value within its bounds or one line, and no other exception."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache import UserError, outside

HUGE = 10**5000
NUMBERS = st.integers() | st.integers(-5, 5) | st.floats() | st.sampled_from([2**32, 2**63, 10**4000, True, False])
TEXTS = st.text() | st.sampled_from(["size", "word", "nan", "a\nb", "\x1b[2J", "\ud800", "x" * 10**5])
ANY = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def one_of(*kinds: type):
    return lambda value: type(value) in kinds


CHECKS = {  # check and bounds -> what it has to give
    (outside.whole, -3, 4): lambda v: type(v) is int and -3 <= v <= 4,
    (outside.number, -3, 4.5): lambda v: type(v) in (int, float) and -3 <= v <= 4.5,
    (outside.numbers, 2, -3, 4): lambda v: len(v) == 2 and all(type(x) is float and -3 <= x <= 4 for x in v),
    (outside.text, 1, 5): lambda v: type(v) is str and 1 <= len(v) <= 5,
    (outside.text, 0, 5, True): lambda v: type(v) is str and len(v) <= 5 and v.isprintable(),
    (outside.kind, int): one_of(int),
    (outside.kind, str): one_of(str),
    (outside.strings,): lambda v: type(v) is list and all(type(x) is str for x in v),
    (outside.listed,): one_of(list),
    (outside.nullable, outside.whole, 0, 9): lambda v: v is None or (type(v) is int and 0 <= v <= 9),
}
FIELDS = {"size": (outside.whole, 0, 9), "word": (outside.nullable, outside.strings)}


def checked(value: object, check, *bounds):
    """What a check gives, or None for an error of one short line, which names the place."""
    try:
        return True, check(value, "file: key", "mend it", *bounds)
    except UserError as error:
        line = str(error)
        assert line.startswith("file: key") and line.isprintable() and len(line) < 900, line
        assert "fix: " in line
        return False, None


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check[0].__name__)
@settings(deadline=None, max_examples=60)
@given(value=ANY)
@example(value=[1, 2.5])
@example(value=True)
@example(value=[True, 1])
@example(value=math.nan)
@example(value=[math.inf, 0])
@example(value="word")
def test_a_check_gives_what_is_within_its_bounds_or_one_line(check, value):
    good, found = checked(value, *check)
    if good:
        assert found == (tuple(value) if check[0] is outside.numbers else value)
        assert CHECKS[check](found)
    else:
        assert not acceptable(check, value)


@pytest.mark.parametrize("value", [HUGE, -HUGE, [HUGE, 1], {"size": HUGE}, {HUGE: 1}], ids=range(5))
def test_no_check_prints_a_number_of_thousands_of_digits(value):
    for check in (*CHECKS, (outside.mapping, FIELDS), (outside.record, FIELDS)):
        if check[0] is not outside.listed and check != (outside.kind, int):
            assert checked(value, *check) == (False, None)


def acceptable(check, value) -> bool:
    """What a check must not refuse; `numbers` takes a list, and makes floats of whole numbers."""
    if check[0] is not outside.numbers:
        return CHECKS[check](value)
    return type(value) is list and len(value) == 2 and all(type(x) in (int, float) and -3 <= x <= 4 for x in value)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(["size", "word", "other", "x" * 10**5]), ANY) | ANY)
@example({"size": 1})
@example({"size": 1, "word": None})
def test_mappings_take_their_fields_and_nothing_else(value):
    for check, more, needed in ((outside.mapping, (), ()), (outside.mapping, ("size",), ("size",))):
        good, found = checked(value, check, FIELDS, more)
        expected = isinstance(value, dict) and set(needed) <= value.keys() <= FIELDS.keys()
        assert good == (expected and fields_good(value)) and (not good or found == value)
    for optional in ((), ("word",)):
        good, found = checked(value, outside.record, FIELDS, optional)
        expected = isinstance(value, dict) and FIELDS.keys() - set(optional) <= value.keys() <= FIELDS.keys()
        assert good == (expected and fields_good(value)) and (not good or found == value)


def fields_good(value: dict) -> bool:
    size, word = value.get("size", 0), value.get("word")
    named = word is None or (type(word) is list and all(type(each) is str for each in word))
    return type(size) is int and 0 <= size <= 9 and named


def test_errors_name_the_key_and_what_it_should_be():
    fields = {"base": (outside.record, FIELDS), "layers": (outside.whole, 0, 32)}
    for value, line in (
        ({"layres": 1}, "p: unknown key layres; expected base, layers; fix: did you mean layers?"),
        ({"layers": 33}, "p: layers; found 33, expected a whole number in [0, 32]; fix: f"),
        ({"layers": HUGE}, "p: layers; found a number of 16,610 bits, expected a whole number in [0, 32]; fix: f"),
        ({"layers": "7"}, "p: layers; found '7', expected a whole number in [0, 32]; fix: f"),
        ({"layers": "many"}, "p: layers; found many, expected a whole number in [0, 32]; fix: f"),
        ({"base": 5}, "p: base; found 5, expected a mapping of size, word; fix: f"),
        (
            {"base": {"size": 1}},
            "p: base; found keys ['size'], missing ['word'], expected a mapping of size, word; fix: f",
        ),
        (
            {"base": {"size": 1, "word": 0}},
            "p: base: word are not all strings; found 0, expected a list of strings; fix: f",
        ),
        ([], "p; found list, expected a mapping with base, layers; fix: f"),
    ):
        with pytest.raises(UserError) as caught:
            outside.mapping(value, "p", "f", fields)
        assert str(caught.value) == line


@settings(deadline=None, max_examples=100)
@given(st.binary() | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.just(b"[" * 10**5))
@example(b"9" * 5000)
@example(b"\xff")
@example(b'{"a": [1, NaN]}')
def test_a_document_is_json_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "document.json"
    path.write_bytes(data)
    try:
        found = outside.document(path, "that file", "mend it", 10**5)
    except UserError as error:
        assert str(error).startswith("cannot parse that file; found ") and str(error).isprintable()
        with pytest.raises((ValueError, RecursionError)):
            json.loads(data)
    else:
        assert repr(found) == repr(json.loads(data))


def test_a_file_beyond_its_bound_or_out_of_reach_is_not_parsed(tmp_path):
    (tmp_path / "f").write_bytes(b" " * 9 + b"1")
    assert outside.document(tmp_path / "f", "that file", "mend it", 10) == 1
    for path, most, line in (
        ("f", 9, "that file is too large; found more than 9 bytes; fix: mend it"),
        ("none", 9, "cannot read that file; found No such file or directory; fix: mend it"),
        ("", 9, "cannot read that file; found Is a directory; fix: mend it"),
    ):
        with pytest.raises(UserError) as caught:
            outside.document(tmp_path / path, "that file", "mend it", most)
        assert str(caught.value) == line
