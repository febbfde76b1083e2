"""What a store was made from: everything that decides its bytes, and the refusal of whatever contradicts it."""

import contextlib
import dataclasses
import json
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache import codec as codecs
from cache.errors import UserError

FORMAT = 3
FORMATS = (2, FORMAT)
"""Those that can be read: 2 has the codec's arrays in the manifest, w in full and a digest per view."""
_MAX_TEXT = 4096
_MAX_MAPPING = 1 << 20  # characters of JSON; a codec may have far more, and bounds them itself
_MAX_CLASS_LIST = 64 << 20
_SHOWN = 80
_MAX_CHUNK_BYTES = 1 << 31
_MAX_SIDE = 1 << 16
_MAX_BLOCKS = 1 << 22  # each is a handful of files

_WHOLE = {  # field -> smallest and largest value
    "samples": (1, 1 << 40),
    "classes": (1, codecs.MAX_CLASSES),
    "views": (1, 1 << 16),
    "size": (1, _MAX_SIDE),
    "teacher_size": (1, _MAX_SIDE),
    "block_rows": (1, 1 << 20),
}
_TEXTS = ("dataset", "teacher", "teacher_weights")
_OPTIONAL = {"class_list", "teacher_size", "energy"}
_MAPPINGS = ("policy", "base", "decoder", "codec", "versions", "fidelity")

_ELSEWHERE = "or run precompute-teacher into another store"
_FIXES = {  # the fields that are compared; `versions` and `fidelity` are for information
    "dataset": f"point --data at the data set the store was made for, {_ELSEWHERE}",
    "samples": f"point --data at the data set the store was made for, {_ELSEWHERE}",
    "classes": f"point --data at the data set the store was made for, {_ELSEWHERE}",
    "teacher": f"name the teacher that made the store, {_ELSEWHERE}",
    "teacher_weights": f"give the weights that made the store, {_ELSEWHERE}",
    "teacher_size": f"give the store's --teacher-size, {_ELSEWHERE}",
    "mean": f"take the teacher and the policy that made the store, {_ELSEWHERE}",
    "std": f"take the teacher and the policy that made the store, {_ELSEWHERE}",
    "policy": f"take the policy that made the store, {_ELSEWHERE}",
    "base": f"take the policy that made the store, {_ELSEWHERE}",
    "size": f"take the policy that made the store, {_ELSEWHERE}",
    "seed": f"give the store's --seed, {_ELSEWHERE}",
    "views": f"give the store's --views, {_ELSEWHERE}",
    "decoder": f"decode as the store's maker did (--decoder), {_ELSEWHERE}",
    "codec": f"give the store's --codec, {_ELSEWHERE}",
    "energy": "run precompute-teacher --energy into another store",
    "block_rows": f"give the store's --block-rows, {_ELSEWHERE}",
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that decides a store's bytes. Mappings hold plain JSON values (lists, not tuples)."""

    dataset: str
    """Fingerprint of the data set."""
    samples: int
    """N, quarantined ones included."""
    classes: int
    """C."""
    teacher: str
    teacher_weights: str
    """Fingerprint of the teacher's weights."""
    mean: tuple[float, ...]
    """What the teacher's input was normalised with, in units of the pixel range [0, 1]."""
    std: tuple[float, ...]
    policy: dict
    """The JDA policy with every number it uses."""
    base: dict
    """The base transform."""
    seed: int
    """Of the views; u64."""
    views: int
    """V."""
    size: int
    """Side of the views in pixels."""
    decoder: dict
    """Who decoded the images, and how."""
    codec: dict
    """Config of the codec."""
    block_rows: int
    """Rows of a block, the unit of commit and resume."""
    versions: dict
    """Of libraries and machine; informative, never compared."""
    fidelity: dict = dataclasses.field(default_factory=dict)
    """What the codec was measured to lose; informative, never compared."""
    class_list: dict | None = None
    """Names of the classes and what numbered them, as who made the store keeps them; old stores have none."""
    teacher_size: int | None = None
    """Side in pixels that the teacher saw each view resized to; None: as it is."""
    energy: bool | None = None
    """True: the energies of the teacher's logits are kept beside w; None: they are not."""
    format: int = FORMAT

    @property
    def blocks(self) -> int:
        """Blocks per view; the last one may be short."""
        return -(-self.samples // self.block_rows)

    @property
    def temperature(self) -> float:
        """The lowest that the labels are meant for, as `fidelity` has it: the KL budget is for it."""
        value: Any = self.fidelity.get("temperature")
        return float(value) if type(value) in (int, float) and 0 < value < math.inf else 4.0

    def noise(self, temperature: float) -> float | None:
        """Nats of KL that the code adds to a label at a temperature, between those that were measured; None: not known.

        Below the lowest temperature measured it is that one's, which is too little.
        """
        kl = self.fidelity.get("kl")
        found = {}
        for text, value in kl.items() if isinstance(kl, dict) else ():
            with contextlib.suppress(ValueError):
                if type(value) is float and value >= 0 and 0 < (at := float(text)) < math.inf:
                    found[at] = value
        if not found:
            return None
        at = sorted(found)
        return float(np.interp(math.log(temperature), np.log(at), [found[t] for t in at]))

    def identity(self) -> dict:
        """The fields that two runs filling one store must agree on."""
        return {name: getattr(self, name) for name in _FIXES}

    def header(self) -> dict:
        """What the attributes say of the codec, whose arrays lie beside them."""
        return self.codec if self.format == 2 else codecs.split(self.codec)[0]

    def to_attributes(self) -> dict:
        """JSON-safe, with a checksum; `from_attributes` gives an equal manifest."""
        attributes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        attributes["codec"] = self.header()
        # Readers that keep numbers as doubles would round a seed.
        attributes |= {"mean": list(self.mean), "std": list(self.std), "seed": str(self.seed)}
        for name in _OPTIONAL:
            if attributes[name] is None:
                del attributes[name]
        return {**attributes, "crc32": _crc(attributes)}

    @classmethod
    def from_attributes(
        cls, attributes: object, where: str = "manifest", arrays: dict[str, np.ndarray] | None = None
    ) -> "Manifest":
        """A manifest from JSON values of any origin, and the codec's arrays that `codecs.array_shapes` asks for.

        Raises UserError naming the field, what it is and should be.
        """
        if not isinstance(attributes, dict) or "format" not in attributes:
            raise UserError(f"{where}: not that of a store of soft labels", fix="check --store")
        if type(attributes["format"]) is not int or attributes["format"] not in FORMATS:
            raise UserError(
                f"{where}: unknown format",
                found=shown(attributes["format"]),
                expected=" or ".join(map(str, FORMATS)),
                fix="read the store with the version that wrote it",
            )
        _check_fields(attributes, where)
        numbers = {name: tuple(float(value) for value in attributes[name]) for name in ("mean", "std")}
        fields = {name: value for name, value in attributes.items() if name != "crc32"}
        codec = fields["codec"]
        if attributes["format"] > 2:
            codec = codecs.join(codec, arrays or {}, f"{where}: codec")
        manifest = cls(**{**fields, **numbers, "seed": int(attributes["seed"]), "codec": codec})
        _check_bounds(manifest, where)
        if attributes["crc32"] != _crc(fields):
            raise _wrong(where, "crc32", attributes["crc32"], _crc(fields))
        return manifest


def check(manifest: Manifest, **expected) -> None:
    """Raise UserError for the first field, in the manifest's order, that contradicts what the caller knows.

    `expected` holds fields by name; tuples and lists are the same, mappings are compared key by key.
    """
    assert expected.keys() <= _FIXES.keys(), expected.keys() - _FIXES.keys()
    for name in (name for name in _FIXES if name in expected):
        if differing := difference(name, getattr(manifest, name), expected[name]):
            path, found, wanted = differing
            raise UserError(
                f"the store has another {shown(path)}", found=shown(found), expected=shown(wanted), fix=_FIXES[name]
            )


def difference(path: str, found: object, expected: object) -> tuple[str, object, object] | None:
    """Where two JSON values first differ: its path and both values there."""
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return None if found == expected else (path, found, expected)
    for key in (*found, *(key for key in expected if key not in found)):
        if inner := difference(f"{path}.{key}", found.get(key, "nothing"), expected.get(key, "nothing")):
            return inner
    return None


def _check_fields(attributes: dict, where: str) -> None:
    names = {field.name for field in dataclasses.fields(Manifest)} | {"crc32"}
    if attributes.keys() | _OPTIONAL != names:
        unknown = shown(sorted(map(str, attributes.keys() - names)))
        raise UserError(
            f"{where}: fields",
            found=f"unknown {unknown}, missing {sorted(names - attributes.keys() - _OPTIONAL)}",
            expected="exactly those of its format",
            fix="make the store again with precompute-teacher",
        )
    for name, (low, high) in _WHOLE.items():
        if name not in attributes:  # an optional one
            continue
        value = attributes[name]
        if type(value) is not int or not low <= value <= high:
            raise _wrong(where, name, value, f"a whole number in [{low}, {high}]")
    for name in _TEXTS:
        value = attributes[name]
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
            raise _wrong(where, name, value, f"a text of 1 to {_MAX_TEXT} characters")
    for name in _MAPPINGS:
        if not isinstance(attributes[name], dict):
            raise _wrong(where, name, attributes[name], "a mapping")
        if name != "codec" and (size := len(json.dumps(attributes[name]))) > _MAX_MAPPING:
            raise _wrong(where, name, f"{size} characters", f"at most {_MAX_MAPPING}")
    if attributes.get("energy", True) is not True or ("energy" in attributes and attributes["format"] == 2):
        raise _wrong(where, "energy", attributes["energy"], "true, in a store of format 3, or nothing")
    listed = attributes.get("class_list")
    if "class_list" in attributes and not isinstance(listed, dict):
        raise _wrong(where, "class_list", listed, "a mapping")
    if (size := len(json.dumps(listed))) > _MAX_CLASS_LIST:
        raise _wrong(where, "class_list", f"{size} characters", f"at most {_MAX_CLASS_LIST}")
    for name, low in (("mean", -1e6), ("std", 1e-6)):
        value = attributes[name]
        good = isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) for v in value)
        if not good or not all(low <= v <= 1e6 for v in value):  # NaN compares false
            raise _wrong(where, name, value, f"three numbers in [{low:g}, 1e+06]")
    seed = attributes["seed"]
    good = isinstance(seed, str) and len(seed) <= 20 and seed.isdecimal()
    if not good or int(seed) >= 1 << 64 or str(int(seed)) != seed:
        raise _wrong(where, "seed", seed, "a text, the decimal digits of an unsigned 64-bit number")


def _check_bounds(manifest: Manifest, where: str) -> None:
    """Values that are each in range may still ask for absurd arrays together."""
    codec = codecs.from_config(manifest.codec, f"{where}: codec")
    if codec.classes != manifest.classes:
        raise _wrong(where, "codec.classes", codec.classes, f"{manifest.classes}, the number of classes")
    chunk_bytes = min(manifest.block_rows, manifest.samples) * codec.row_bytes
    if chunk_bytes > _MAX_CHUNK_BYTES:
        raise _wrong(where, "block_rows", f"blocks of {chunk_bytes} bytes", f"at most {_MAX_CHUNK_BYTES} bytes")
    if manifest.views * manifest.blocks > _MAX_BLOCKS:
        raise _wrong(where, "block_rows", f"{manifest.views * manifest.blocks} blocks", f"at most {_MAX_BLOCKS}")


def _wrong(where: str, name: str, found: object, expected: object) -> UserError:
    return UserError(
        f"{where}: {name}",
        found=shown(found if not isinstance(found, str) else repr(found)),
        expected=expected,
        fix="correct the option it comes from, or make a damaged store again with precompute-teacher",
    )


def shown(value: object) -> str:
    """A value of any origin on one line, of which a codec's basis would be millions of characters."""
    value = "none" if value is None else value
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}… ({len(text)} characters)"


def _crc(attributes: dict) -> int:
    return zlib.crc32(json.dumps(attributes, sort_keys=True).encode())
