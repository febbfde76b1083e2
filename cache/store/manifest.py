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
from cache.outside import anything, cut, numbers, record, require, text, whole

FORMAT = 3
FORMATS = (2, FORMAT)
"""Those that can be read: 2 has the codec's arrays in the manifest, w in full and a digest per view."""
_MAX_MAPPING = 1 << 20  # characters of JSON; a codec may have far more, and bounds them itself
_MAX_CLASS_LIST = 64 << 20
_MAX_CHUNK_BYTES = 1 << 31
_MAX_BLOCKS = 1 << 22  # each is a handful of files
_FIX = "correct the option it comes from, or make a damaged store again with precompute-teacher"
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
        for said, value in kl.items() if isinstance(kl, dict) else ():
            with contextlib.suppress(ValueError):
                if type(value) is float and value >= 0 and 0 < (at := float(said)) < math.inf:
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
        known = type(attributes["format"]) is int and attributes["format"] in FORMATS
        fix = "read the store with the version that wrote it"
        require(known, attributes["format"], f"{where}: unknown format", fix, " or ".join(map(str, FORMATS)))
        fields = record(attributes, f"{where}: fields", _FIX, _FIELDS, _OPTIONAL)
        if fields["format"] > 2:
            fields["codec"] = codecs.join(fields["codec"], arrays or {}, f"{where}: codec")
        else:
            require("energy" not in fields, True, f"{where}: energy", _FIX, "nothing in a store of format 2")
        said, crc = fields.pop("crc32"), _crc({key: value for key, value in attributes.items() if key != "crc32"})
        manifest = cls(**fields)
        _check_bounds(manifest, where)
        require(said == crc, said, f"{where}: crc32", _FIX, f"{crc}")
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
                f"the store has another {_told(path)}", found=_told(found), expected=_told(wanted), fix=_FIXES[name]
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


def _dict(value: Any, where: str, fix: str | None, most: int | None = None) -> dict:
    """A mapping of at most so many characters of JSON."""
    require(isinstance(value, dict), value, where, fix, "a mapping")
    if most is not None and (size := len(json.dumps(value))) > most:
        raise UserError(where, found=f"{size} characters", expected=f"at most {most}", fix=fix)
    return value


def _seed(value: Any, where: str, fix: str | None) -> int:
    good = isinstance(value, str) and len(value) <= 20 and value.isdecimal() and str(int(value)) == value
    good = good and int(value) < 1 << 64
    return int(require(good, value, where, fix, "a text, the decimal digits of an unsigned 64-bit number"))


def _true(value: Any, where: str, fix: str | None) -> bool:
    return require(value is True, value, where, fix, "true, or nothing")


_name, _small = (text, 1, 4096), (_dict, 1 << 20)  # a codec may have far more, and bounds it itself
_FIELDS = {  # of the attributes: their checks and bounds
    "dataset": _name,
    "samples": (whole, 1, 1 << 40),
    "classes": (whole, 1, codecs.MAX_CLASSES),
    "teacher": _name,
    "teacher_weights": _name,
    "mean": (numbers, 3, -1e6, 1e6),
    "std": (numbers, 3, 1e-6, 1e6),
    "seed": (_seed,),
    "views": (whole, 1, 1 << 16),
    "size": (whole, 1, 1 << 16),
    "block_rows": (whole, 1, 1 << 20),
    **dict.fromkeys(("policy", "base", "decoder", "versions", "fidelity"), _small),
    "codec": (_dict,),
    "class_list": (_dict, 64 << 20),
    "teacher_size": (whole, 1, 1 << 16),
    "energy": (_true,),
    **dict.fromkeys(("format", "crc32"), (anything,)),
}
_OPTIONAL = ("class_list", "teacher_size", "energy")


def _check_bounds(manifest: Manifest, where: str) -> None:
    """Values that are each in range may still ask for absurd arrays together."""
    codec = codecs.from_config(manifest.codec, f"{where}: codec")
    chunk_bytes = min(manifest.block_rows, manifest.samples) * codec.row_bytes
    blocks, rows = manifest.views * manifest.blocks, f"{where}: block_rows"
    expected = f"{manifest.classes}, the number of classes"
    require(codec.classes == manifest.classes, codec.classes, f"{where}: codec.classes", _FIX, expected)
    most = f"at most {_MAX_CHUNK_BYTES} bytes"
    require(chunk_bytes <= _MAX_CHUNK_BYTES, f"blocks of {chunk_bytes} bytes", rows, _FIX, most)
    require(blocks <= _MAX_BLOCKS, f"{blocks} blocks", rows, _FIX, f"at most {_MAX_BLOCKS}")


def _told(value: object) -> str:
    """One of two values that differ, on one line; a codec's basis would be millions of characters."""
    return cut(value if isinstance(value, str) and value.isprintable() else "none" if value is None else repr(value))


def _crc(attributes: dict) -> int:
    return zlib.crc32(json.dumps(attributes, sort_keys=True).encode())
