"""A recipe says each thing once and of the right kind, or is refused in one line that names the key."""

import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import UserError
from pipeline import cli
from pipeline.config import TrainTeacher, recipe_flags, yaml_file
from pipeline.views import policy as policies

BILLION = "a0: &a0 [1,1,1]\n" + "\n".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}1]" for i in range(1, 9))


def flags(path, text: str) -> list[str]:
    path.write_text(text)
    return recipe_flags(path, "train-teacher", TrainTeacher, tuple(cli.COMMANDS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 1\nlr: 2\nepochs: 3\n", "has a key twice; found epochs in lines 1 and 3; fix: keep one"),
        ("train-teacher:\n  epochs: 1\n  'epochs': 3\n", "found epochs in lines 2 and 3"),
        ("evaluate: {}\nevaluate: {}\n", "found evaluate in lines 1 and 2"),
        ("batch-size: 4\nbatch_size: 2\n", "has a key twice; found batch-size and batch_size"),
        ("train-teacher: {batch-size: 4, batch_size: 2}", "found batch-size and batch_size"),
        ("jda: 'no'", ": jda; found 'no', expected true or false"),
        ("jda: 1", ": jda; found 1, expected true or false"),
        ("wandb: no", ": wandb; found false, expected a value; fix: put it in quotes"),
        ("epochs: [1, 2]", ": epochs; found a list, expected a value"),
        ("epochs: {a: 1}", ": epochs; found a dict, expected a value"),
        ("epochs:", ": epochs; found nothing, expected a value"),
        ("milestones: [1, yes]", ": milestones; found true, expected a value"),
        ("val: &a [*a]", "found a value that holds itself"),
        (
            "a0: &a0 [1,1,1]\n" + "\n".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}1]" for i in range(1, 9)),
            "found over 20,000 values",
        ),
        ("[" * 5000, "cannot parse recipe"),
        ("epochs: !!int ''", "cannot parse recipe"),
        ("epochs: 2026-99-99", "cannot parse recipe"),
        ("epochs: " + "9" * 5000, "cannot parse recipe"),
        ("- 3", "found list, expected a mapping"),
        ("#" * (1 << 20) + "\n", "is too large"),
    ],
)
def test_a_recipe_that_is_not_clear_is_refused_by_its_key(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        flags(tmp_path / "r.yaml", text)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_a_recipe_leaves_open_is_left_open(tmp_path):
    path = tmp_path / "r.yaml"
    assert flags(path, "# epochs: 1\n") == flags(path, "") == flags(path, "train-teacher:\n") == []
    assert flags(path, "epochs: 1\ntrain-teacher: {epochs: 2}") == ["--epochs", "2"]
    assert flags(path, "batch-size: 1\ntrain-teacher: {batch_size: 2}") == ["--batch-size", "2"]
    assert flags(path, "evaluate: &shared {lr: 1}\ntrain-teacher: {<<: *shared, lr: 2}") == ["--lr", "2"]
    assert flags(path, "jda: false\nmilestones: [1, 2]\n") == ["--no-jda", "--milestones", "1", "2"]


def test_a_policy_file_says_each_thing_once_too(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("probability: 0.5\nops: cifar10\nbase: {size: 32, size: 64}\n")
    with pytest.raises(UserError, match=r"policy .*p.yaml has a key twice; found size in lines 3 and 3"):
        policies.load(str(path))


def test_a_pipe_or_a_folder_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="found no regular file"):
            yaml_file.read(path, "recipe")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--jda", "no"], "no after --jda"),
        (["--epochs", "x"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--schedule", "x"], "--schedule"),
        (["--no-epochs"], "--no-epochs"),
    ],
)
def test_a_flag_that_is_not_clear_is_refused_by_its_name(arguments, named, capsys):
    code = cli.main(["train-teacher", "--data", "d", "--teacher", "t", "--out", "o", *arguments])
    said = capsys.readouterr().err
    assert (
        code == 2 and named in said and said.count("\n") == 1 and said.endswith("see pipeline train-teacher --help\n")
    )
    assert len(said) < 400


# Texts near to recipes and policies: their words, YAML's signs, and noise.
WORDS = ["epochs", "batch-size", "jda", "milestones", "train-teacher", "policy", "base", "size", "ops", "<<", "null"]
SIGNS = [
    ": ",
    "\n",
    "- ",
    "  ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "&a ",
    "*a",
    "!!int ",
    "!!timestamp ",
    "'",
    '"',
    "|",
    "#",
    "---",
]
parts = st.sampled_from(WORDS + SIGNS + ["1", "0.5", "yes", "1e9", "2026-01-01", "\t", "\ufeff"]) | st.text(max_size=3)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
trees = st.dictionaries(st.sampled_from(WORDS), values, max_size=5).map(lambda tree: yaml.safe_dump(tree).encode())
texts = st.lists(parts, max_size=30).map("".join).map(lambda text: text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("examples", [100, pytest.param(100_000, marks=pytest.mark.slow)])
def test_whatever_a_file_holds_is_read_or_refused_in_one_line(tmp_path, examples):
    path = tmp_path / "any.yaml"

    @settings(max_examples=examples, deadline=None)
    @given(texts | trees | st.binary(max_size=200))
    def check(content):
        path.write_bytes(content)
        as_recipe = lambda: recipe_flags(path, "train-teacher", TrainTeacher, ("evaluate",))  # noqa: E731
        for read in (as_recipe, lambda: policies.load(str(path))):
            try:
                read()
            except UserError as error:
                assert len(" ".join(str(error).split())) < 3000

    check()
