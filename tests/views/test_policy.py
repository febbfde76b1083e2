"""Policies hold the paper's numbers; custom ones are checked value by value."""

import json

import numpy as np
import pytest
import yaml

from cache import UserError
from kernels.jda.ops import TABLES
from pipeline.views import policy as policies
from pipeline.views.policy import POLICIES, from_config, load

# The paper's tables with magnitudes as printed, to the digits printed.
PRINTED = {
    "cifar10": (
        0.5,
        "invert; rotate 6.667; shear_y 0.26667; posterize 4; autocontrast; color 0.3; sharpness 0.9; equalize;"
        "contrast 0.7; translate_y 0.151057; brightness 0.6; solarize 199.11; translate_x 0.151057; shear_x 0.26667",
    ),
    "cifar100": (
        0.3,
        "autocontrast; contrast 0.3; posterize 8; solarize 142.22; translate_y 0.402820; shear_x 0.16667;"
        "brightness 0.3; shear_y 0; translate_x 0.050352; sharpness 0.5; invert; color 0.4; equalize; rotate 10",
    ),
    "imagenet": (
        0.2,
        "posterize 4; solarize 113.78; equalize; posterize 5; equalize; equalize; solarize 170.67; posterize 6;"
        "rotate 10; equalize; rotate 26.667; rotate 30; equalize; invert; color 0.4; rotate 26.667; color 0.8;"
        "sharpness 0.7; shear_x 0.16667; color 0; equalize; solarize 113.78; invert; color 0.4; equalize",
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_tables_are_the_papers(name):
    probability, text = PRINTED[name]
    policy = POLICIES[name]
    assert policy.probability == probability
    items = [item.split() for item in text.split(";")]
    assert [op.name for op in policy.table] == [item[0] for item in items]
    for op, item in zip(policy.table, items, strict=True):
        printed = item[1] if len(item) > 1 else "0"
        digits = len(printed.partition(".")[2])
        assert round(op.magnitude, digits) == float(printed), op


def test_base_transforms_are_the_papers():
    imagenet, cifar = POLICIES["imagenet"], POLICIES["cifar100"]
    assert (imagenet.base.size, imagenet.base.scale, imagenet.base.ratio) == (
        224,
        (0.08, 1.0),
        (3 / 4, 4 / 3),
    )
    assert (cifar.base.size, cifar.base.pad, cifar.base.flip) == (32, 4, True)
    assert cifar.mean == POLICIES["cifar10"].mean == (0.5071, 0.4867, 0.4408)
    assert cifar.std == (0.2675, 0.2565, 0.2761)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_survives_json(name):
    config = json.loads(json.dumps(POLICIES[name].to_config()))
    assert from_config(config) == POLICIES[name]
    assert config == POLICIES[name].to_config()


def test_identities_keep_their_place_in_the_mask():
    assert [len(TABLES[name]) for name in ("cifar10", "cifar100", "imagenet")] == [14, 14, 25]


def test_the_papers_share_of_untouched_views():
    """P(no effective op): 1.4 % on cifar100 (three identities), 0.47 % on imagenet (one), from p alone."""
    effective = {"cifar100": 12, "imagenet": 24}
    identities = {("posterize", 8.0), ("shear_y", 0.0), ("color", 0.0)}
    for name, count in effective.items():
        assert sum(tuple(op) not in identities for op in TABLES[name]) == count
    np.testing.assert_allclose(0.7**12, 0.014, atol=5e-4)
    np.testing.assert_allclose(0.8**24, 0.0047, atol=5e-5)


def test_a_custom_policy_from_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("probability: 0.4\nops: [[rotate, 10], invert, [shear_x, 0.2]]\nbase: {size: 48, pad: 2}\n")
    policy = load(str(path))
    assert policy.name == "mine"
    assert [tuple(op) for op in policy.table] == [("rotate", 10.0), ("invert", 0.0), ("shear_x", 0.2)]
    assert (policy.base.size, policy.base.pad) == (48, 2)


def test_the_shipped_digits_policy_loads():
    from pipeline.demo import POLICY

    assert load(POLICY).base.flip is False


GOOD = {"probability": 0.5, "ops": "cifar10", "base": {"size": 32}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": "cifar11"}, "unknown op table; found cifar11; fix: did you mean cifar10"),
        ({"ops": [["rotat", 3]]}, "unknown op; found rotat; fix: did you mean rotate"),
        ({"ops": [["rotate", 300]]}, r"expected a magnitude of rotate in \[0, 45\], got 300"),
        ({"ops": [["rotate", float("nan")]]}, "magnitude of rotate; found"),
        ({"ops": 3}, "ops; found int, expected a list"),
        ({"ops": []}, "expected 1 to 32 operations, got 0"),
        ({"probability": 1.5}, r"probability; found \[1.5\]"),
        ({"probability": "x"}, "probability; found"),
        ({"base": {"size": 0}}, "size; found 0, expected a whole number"),
        ({"base": {"size": True}}, "size; found True"),
        ({"base": {"size": 32, "scale": [1, 0.5]}}, "low before high"),
        ({"base": {"size": 32, "flip": 2}}, "flip; found 2, expected true or false"),
        ({"base": {}}, "missing key size"),
        ({"std": [0, 1, 1]}, "std; found"),
        ({"probabilty": 0.5}, "unknown key probabilty; .*did you mean probability"),
    ],
)
def test_a_wrong_custom_policy_is_named(change, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(UserError, match=message):
        load(str(path))


def test_unreadable_and_unsafe_policies(tmp_path):
    with pytest.raises(UserError, match=r"unknown policy imagnet; .*did you mean imagenet"):
        load("imagnet")
    with pytest.raises(UserError, match=r"cannot read policy .*; found No such file"):
        load(str(tmp_path / "no.yaml"))
    path = tmp_path / "evil.yaml"
    path.write_text("!!python/object/apply:os.system ['touch %s']" % (tmp_path / "ran"))
    with pytest.raises(UserError, match="cannot parse policy"):
        load(str(path))
    assert not (tmp_path / "ran").exists()
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="found list, expected a mapping"):
        policies.load(str(path))
