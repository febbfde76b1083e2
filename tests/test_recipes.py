"""The recipes: every command that a header gives is one, and the whole job runs as the recipe says, two steps long."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml

from pipeline import cli
from pipeline.networks import models
from pipeline.networks import weights as weights_of
from pipeline.views import policy as policies

ROOT = Path(__file__).parents[1]
RECIPES = {
    path.stem: path
    for path in sorted((ROOT / "pipeline" / "recipes").glob("*.yaml"))
    if not path.stem.endswith("_policy")
}
FAST = ("digits", "cifar100_wrn_40_2_wrn_16_2")  # two families in 35 s; an ImageNet recipe takes 70
CLASSES = 10
SAMPLES = {"digits": 1_437, "cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
every_recipe = pytest.mark.parametrize("name", RECIPES)
each_in_its_time = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """Recipes name a policy file from the root of the repository."""
    monkeypatch.chdir(ROOT)


def header(name: str) -> str:
    lines = RECIPES[name].read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def commands(name: str) -> list[list[str]]:
    """The commands of a header, as a shell would split them."""
    text = header(name).replace("\\\n#", "")
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("#   pipeline ")]


def policy_of(name: str, section: dict) -> str:
    """A file lies beside the recipe."""
    beside = RECIPES[name].parent / section["policy"]
    return str(beside.relative_to(Path.cwd())) if beside.is_file() else section["policy"]


@every_recipe
def test_the_commands_of_the_header_are_commands_and_cover_every_section(name):
    sections = yaml.safe_load(RECIPES[name].read_text())
    assert sections.keys() <= cli.COMMANDS.keys()
    assert {"precompute-teacher", "train-student"} <= sections.keys()
    given = {}
    for command, *arguments in commands(name):
        assert (command == "prepare") or f"--config pipeline/recipes/{name}.yaml" in " ".join(arguments)
        given[command] = cli._parse(command, cli.COMMANDS[command][0], arguments)
    assert sections.keys() - {"verify"} <= given.keys()
    for command, options in sections.items():
        if "policy" in options:
            options["policy"] = policy_of(name, options)
        schema = cli.COMMANDS[command][0]
        parsed = given.get(command) or cli._parse(command, schema, ["--config", str(RECIPES[name]), "s", "--data", "d"])
        for key, value in options.items():
            assert getattr(parsed, key) == (tuple(value) if isinstance(value, list) else value), (command, key)


@every_recipe
def test_the_header_says_hardware_hours_store_and_result(name):
    text = header(name)
    for fact in ("# Follows ", "# Hardware: ", " hours", "# Store: ", "# Result: "):
        assert fact in text
    assert "# Result: not run.\n" in text + "\n" or "# Result: run on " in text


@every_recipe
def test_the_store_of_the_header_is_its_views_times_its_bytes_per_vector(name):
    """As `precompute-teacher --dry-run` counts it, to two digits."""
    text = header(name).replace("\n# ", " ")
    view, unit, whole, larger, views = re.search(
        r"Store: ([\d.]+) (\w+) per view, ([\d.]+) (\w+) for (\d+) views", text
    ).groups()
    vector, beside = (float(re.search(rf"([\d.]+) B {what}", text)[1]) for what in ("per vector", "beside"))
    expected = SAMPLES[name.split("_")[0]] * (2 * vector + beside)
    assert float(view) * UNITS[unit] == pytest.approx(expected, rel=0.025)
    assert float(whole) * UNITS[larger] == pytest.approx(int(views) * expected, rel=0.025)
    assert int(views) == yaml.safe_load(RECIPES[name].read_text())["precompute-teacher"]["views"]


@every_recipe
def test_a_student_meets_the_views_of_its_store_in_turn(name):
    """One view per epoch, and a teacher that is the store's own."""
    sections = yaml.safe_load(RECIPES[name].read_text())
    pass_, student = sections["precompute-teacher"], sections["train-student"]
    assert pass_["views"] == student["epochs"]
    assert {pass_["policy"], sections["evaluate"]["policy"]} == {student["policy"]}
    made_by = pass_.get("teacher") or sections["train-teacher"]["teacher"]
    assert made_by.split("@")[0] == student["teacher"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Samples -> a data set of so many synthetic photographs."""
    made = {}

    def prepared(samples: int) -> Path:
        if samples not in made:
            made[samples] = tmp_path_factory.mktemp("data") / str(samples)
            run("prepare", f"synthetic:{samples}", "--classes", CLASSES, "--out", made[samples])
        return made[samples]

    return prepared


def run(command: str, *arguments) -> None:
    assert cli.main([command, *map(str, arguments)]) == 0


def weights(network: str, path: Path) -> str:
    """NAME@PATH with random weights in it."""
    models.save_weights(models.create(network, CLASSES, seed=1).module, path)
    return f"{network}@{path}"


@each_in_its_time
def test_two_steps_as_the_recipe_says(name, data, tmp_path, monkeypatch, capsys):
    """Dry runs write nothing; teacher, store and student are made; what is exported answers like what was trained."""
    sections = yaml.safe_load(RECIPES[name].read_text())
    student, teacher = (sections["train-student"][key] for key in ("student", "teacher"))
    size = policies.load(policy_of(name, sections["train-student"])).base.size
    batch = 8 if size == 32 else 4
    images = data(2 * batch)
    shared = ("--config", RECIPES[name], "--data", images, "--batch-size", batch, "--device", "cpu")

    if "train-teacher" in sections:
        run("train-teacher", *shared, "--epochs", 1, "--out", tmp_path / "teacher")
    # Random weights: two steps at a recipe's full rate leave no sane ones.
    trained = weights(teacher, tmp_path / "teacher.safetensors")
    store = tmp_path / "labels.zarr"
    labelling = ("precompute-teacher", *shared, "--teacher", trained, "--views", 1, "--store", store)
    run(*labelling, "--dry-run")
    assert not store.exists()
    run(*labelling)

    exported = []
    save = weights_of.save
    monkeypatch.setattr(weights_of, "save", lambda module, *rest: (exported.append(module), save(module, *rest)))
    out = tmp_path / "student"
    learning = ("train-student", *shared, "--val", images, "--store", store, "--epochs", 1, "--out", out)
    run(*learning, "--dry-run")
    assert not out.exists()
    capsys.readouterr()
    run(*learning, "--log-steps", 1)
    assert "top-1" in capsys.readouterr().out
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2 + 1  # steps, and the epoch

    (module,) = exported
    family, _, of_timm = student.partition("/")
    path = str(out / "model.safetensors")
    if family == "timm":
        loaded = timm.create_model(of_timm, num_classes=CLASSES, checkpoint_path=path)
    else:
        loaded = models.create(f"{student}@{path}", CLASSES).module
    views = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        # Channels last, as the loop has it: the same convolutions, so the same bits.
        answers = [net.eval().to(memory_format=torch.channels_last)(views) for net in (module, loaded)]
    assert answers[0].shape == (3, CLASSES) and answers[0].isfinite().all()
    assert torch.equal(*answers)
    run("evaluate", *shared, "--model", f"{student}@{path}")
