"""RandAugment: so many ops one after the other, drawn uniformly and with replacement, as Pillow applies them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import mixing, pillow
from timm.data.auto_augment import LEVEL_TO_ARG

from cache import UserError
from kernels import jda
from pipeline.views import drawing, policy
from pipeline.views.policy import POLICIES

SHIPPED = policy.load(str(Path(policy.__file__).parents[1] / "recipes" / "imagenet_randaugment_policy.yaml"))
OPS = SHIPPED.table[:14]
TIMM = {
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing", "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip


def test_the_shipped_magnitudes_are_timms_at_level_9():
    """Up to their sign, and the 1 that factors are counted from."""
    assert [op.name for op in OPS] == list(TIMM) and SHIPPED.table == OPS * 2
    for op in OPS:
        (found,) = (LEVEL_TO_ARG[TIMM[op.name]] or (lambda *_: (0.0,)))(9, {})
        found = found - 1 if op.name in ("color", "contrast", "brightness", "sharpness") else found
        assert abs(found) == pytest.approx(op.magnitude, abs=1e-12), op


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_views_are_those_ops_in_that_order_by_pillow(layers):
    """200 images a number of layers: 0 bytes differ from operations that whole numbers of Python draw."""
    chosen = dataclasses.replace(SHIPPED, table=OPS[2:12] * layers, layers=layers, probability=0.7)
    rng = np.random.default_rng(layers)
    keys = rng.integers(0, 2**64, 200, dtype=np.uint64)
    drawn = drawing.draw(5, keys, 3, np.full(200, 9), np.full(200, 11), chosen, 8)
    twice = 0
    for key, view in zip(keys.tolist(), drawn, strict=True):
        image = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        expected = Image.fromarray(image)
        fires, which = mixing.words(5, key, 3, 0x200), mixing.words(5, key, 3, 0x280)
        numbers = [which[layer] * 10 >> 32 for layer in range(layers)]
        fired = [layer for layer in range(layers) if fires[layer] < round(0.7 * 2**32)]
        for layer in fired:
            op, minus = OPS[2:12][numbers[layer]], bool(int(view["signs"]) >> 10 * layer + numbers[layer] & 1)
            expected = pillow.operation(expected, op.name, op.magnitude, minus)
        twice += len({numbers[layer] for layer in fired}) < len(fired)
        found = jda.apply(image, chosen.table, int(view["mask"]), int(view["signs"]))
        np.testing.assert_array_equal(found, np.asarray(expected))
    assert (twice > 5) == (layers > 1)


def test_every_op_comes_as_often():
    """56,000 draws of a layer, half of which fire: 2,000 of each op within 4.5 deviations, whatever the other's."""
    drawn = drawing.draw(1, np.arange(56000, dtype=np.uint64), 0, np.full(56000, 40), np.full(56000, 40), SHIPPED)
    bits = drawn["mask"][:, None] >> np.arange(28) & 1
    assert np.abs(bits.sum(0) - 2000).max() < 4.5 * 2000**0.5
    first, second = bits[:, :14], bits[:, 14:]
    assert first.sum(1).max() == second.sum(1).max() == 1
    assert np.abs(first.T @ second - 56000 / 28**2).max() < 5 * (56000 / 28**2) ** 0.5


def test_a_policy_of_layers_survives_json():
    config = json.loads(json.dumps(SHIPPED.to_config()))
    assert policy.from_config(config) == SHIPPED and config["layers"] == 2 and len(config["ops"]) == 14
    assert "layers" not in POLICIES["imagenet"].to_config()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (3, "expected 1 to 32 operations, got 42; fix: correct ops, or take fewer layers"),
        (-1, "layers; found -1, expected a whole number"),
        (2.0, r"layers; found 2\.0, expected a whole number"),
        (True, "layers; found True"),
        (10**9, "layers; found 1000000000"),
    ],
)
def test_wrong_layers_are_named(layers, message):
    with pytest.raises(UserError, match=message) as caught:
        policy.from_config(SHIPPED.to_config() | {"layers": layers}, "mine.yaml")
    assert "\n" not in str(caught.value)
