"""Whatever bytes a tar, an index, a weights file or YAML hold, reading them gives a value or one short line.

FUZZ_SECONDS is the time for each reader, 20 by default; run with -s to see the counts. Inputs are valid files with
edits in them; sums that a reader checks first are mended in some of them, so that edits reach what lies behind.
"""

import io
import json
import os
import resource
import shutil
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from support.images import encode
from support.tars import tar_of
from torch import nn

from cache.errors import UserError
from pipeline import cli
from pipeline.config import TrainStudent
from pipeline.data import classes as class_lists
from pipeline.data import prepare
from pipeline.data.classes import Classes
from pipeline.data.index import Index
from pipeline.data.ledger import Ledger
from pipeline.data.sources import tars
from pipeline.networks import weights
from pipeline.views import policy

SECONDS = float(os.environ.get("FUZZ_SECONDS", 20))
LONGEST = 2400  # characters of an error's line
pytestmark = pytest.mark.slow

NUMBERS = [
    bytes(8),
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"99999999999",
    b"-1",
    b"0",
    b"1e309",
    b"NaN",
    b"{",
    b"[" * 999,
]


@st.composite
def edited(draw, wholes: list[bytes]) -> bytes:
    """One of `wholes` after one to five edits."""
    data = draw(st.sampled_from(wholes))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 700)))
        piece = draw(st.sampled_from(NUMBERS) | st.binary(max_size=12))
        match draw(st.sampled_from(["put", "put", "put", "insert", "remove", "cut", "repeat", "move", "splice"])):
            case "put":
                data = data[:at] + piece + data[at + len(piece) :]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "remove":
                data = data[:at] + data[to:]
            case "cut":
                data = data[:at]
            case "repeat":
                data = data[:to] + data[at:]
            case "move":
                data = data[:at] + data[to:] + data[at:to]
            case "splice":
                data = data[:at] + draw(st.sampled_from(wholes))[at:]
    return data


class Tally:
    """What came of the inputs."""

    def __init__(self):
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0

    def read(self, reader: Callable[[], object]) -> None:
        start = time.process_time()
        try:
            reader()
        except UserError as error:
            line = str(error)
            assert line.isprintable() and len(line) <= LONGEST, line
            self.outcomes["refused"] += 1
        else:
            self.outcomes["read"] += 1
        self.slowest = max(self.slowest, time.process_time() - start)


def fuzz(name: str, inputs: st.SearchStrategy, read: Callable[[object, Tally], None]) -> None:
    """Draw `inputs` until the time is over; then memory may not have passed 2 GB."""
    tally, end, rounds = Tally(), time.monotonic() + SECONDS, 0
    while time.monotonic() < end:

        @seed(rounds)
        @settings(
            max_examples=300,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def draw(value):
            if time.monotonic() < end:
                read(value, tally)

        draw()
        rounds += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    said = ", ".join(f"{count:,} {outcome}" for outcome, count in tally.outcomes.items())
    print(f"\n{name}: {said}; slowest {tally.slowest:.2f} CPU s; peak {peak / 1e9:.2f} GB")
    assert tally.outcomes["read"] and tally.outcomes["refused"] and peak < 2e9


def picture(format: str) -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), format)


def members() -> dict[str, bytes]:
    found = {}
    for number, format in enumerate(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "PPM", "BMP"]):
        extension = {"JPEG": "jpg", "TIFF": "tif"}.get(format, format.lower())
        found[f"a/{number}.{extension}"] = picture(format)
        found[f"a/{number}.{'json' if number % 2 else 'cls'}"] = b'{"label": 1}' if number % 2 else b"2"
    return found


def checksummed(data: bytes) -> bytes:
    """A tar whose every header has the sum that it should."""
    blocks = [bytearray(data[at : at + 512]) for at in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and len(block) == 512:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def test_tars(tmp_path):
    tar_of(tmp_path / "whole.tar", members())
    tar_of(tmp_path / "long.tar", {f"{'long/' * 40}{name}": data for name, data in members().items()})
    wholes = [(tmp_path / name).read_bytes().rstrip(b"\0") + bytes(1024) for name in ("whole.tar", "long.tar")]
    path = tmp_path / "x.tar"

    def read(value, tally: Tally) -> None:
        data, sums, build = value
        path.write_bytes(checksummed(data) if sums else data)
        if build:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            tally.read(lambda: prepare.build(f"webdataset:{path}", tmp_path / "out", threads=1))
            return
        ledger = Ledger()

        def scan() -> None:
            with path.open("rb") as file:
                tars.scan(file, "x.tar", ledger)
            ledger.close()

        tally.read(scan)

    inputs = st.tuples(edited(wholes), st.booleans(), st.integers(0, 7).map(lambda number: number == 7))
    fuzz("tars", inputs, read)


def test_indexes(tmp_path):
    tar_of(tmp_path / "whole.tar", members())
    prepare.build(f"webdataset:{tmp_path}/whole.tar", tmp_path / "data", threads=1)
    names = ["index.npy", "dataset.json", "quarantine.jsonl", "../whole.tar"]
    whole = {name: (tmp_path / "data" / name).read_bytes() for name in names}

    def read(value, tally: Tally) -> None:
        name, data = value
        (tmp_path / "data" / name).write_bytes(data)

        def open_and_read() -> None:
            index = Index.open(tmp_path / "data")
            for row in index.good.tolist()[:20]:
                index.key(row), index.read(row)

        tally.read(open_and_read)
        (tmp_path / "data" / name).write_bytes(whole[name])

    def of(name: str) -> st.SearchStrategy:
        return st.tuples(st.just(name), edited([whole[name]]))

    fuzz("indexes", st.one_of(*map(of, names)), read)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def checkpoints() -> list[bytes]:
    torch.manual_seed(0)
    state = network().state_dict()
    contents = [
        state,
        {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "epoch": 3, "name": "é"},
        {"state_dict_ema": {key: tensor.half() for key, tensor in state.items()}, "metric": np.float64(1)},
    ]
    files = []
    for content in contents:
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            files.append(file.getvalue())
    return [*files, safetensors.torch.save(state, {"mean": "[0, 0, 0]", "classes": json.dumps({"count": 4})})]


@st.composite
def edited_weights(draw, wholes: list[bytes]) -> bytes:
    """A file with edits; or a zip with edits in one of its files, or safetensors in their header, else whole."""
    if draw(st.booleans()):
        return draw(edited(wholes))
    data = draw(st.sampled_from([whole for whole in wholes if whole[:2] == b"PK" or whole[8:9] == b"{"]))
    if data[8:9] == b"{":
        size = struct.unpack("<Q", data[:8])[0]
        header = draw(edited([data[8 : 8 + size]]))
        return struct.pack("<Q", len(header)) + header + data[8 + size :]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(files, key=lambda name: not name.endswith("data.pkl"))))
    files[name] = draw(edited([files[name]]))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def test_weights(tmp_path):
    path, module = tmp_path / "w", network()

    def read(value, tally: Tally) -> None:
        data, start = value
        path.write_bytes(data)

        def load() -> None:
            found = weights.read(str(path))
            weights.numbers(found, "mean")
            fitted = weights.fit(found, module.state_dict(), "network", Classes(4), ("1.",), start=start)
            weights.load(module, fitted)

        tally.read(load)

    fuzz("weights", st.tuples(edited_weights(checkpoints()), st.booleans()), read)


RECIPE = b"""# a comment
out: run
epochs: 3
batch-size: 4
data: &where ~/set
val: *where
sync_bn: no
train-student: {student: cifar/resnet8, loss: ccd, temperature: 4.0, store: "s.zarr"}
"""
POLICY = (
    b"name: tiny\nprobability: 0.2\nops: [[rotate, 30], solarize, [color, 0.9]]\nbase: {size: 32, scale: [0.2, 1]}\n"
)
WORDS = st.sampled_from(
    [
        *("epochs", "data", "ops", "base", "size", "name", ":", "-", "{", "}", "[", "]", ",", "&a", "*a", "<<", "?"),
        *("|", ">", "%YAML", "---", "...", "'", '"', "\\x", "#", "0x1f", "1e999", ".nan", "0o7", "~", "no", "é"),
        *("!!int", "!!python/name:os.system", "!!binary", "!!set", "2026-99-99", "1_000", "--help", "-1"),
        *(": ", "- ", ", ", "\n", "\n  ", "\t", "\0"),
    ]
)


def test_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    texts = st.lists(WORDS | st.text(max_size=4), max_size=40).map(
        lambda words: "".join(words).encode(errors="replace")
    )
    readers: list[Callable[[], object]] = [
        lambda: cli._parse("train-student", TrainStudent, ["--config", str(path)]),
        lambda: policy.load(str(path)),
        lambda: class_lists.read_map(path),
        lambda: class_lists.read_list(path),
    ]

    def read(value: object, tally: Tally) -> None:
        assert isinstance(value, bytes)
        path.write_bytes(value)
        for reader in readers:
            tally.read(reader)

    fuzz("yaml", edited([RECIPE, POLICY, b"ant: red\nbee: green\n"]) | texts, read)
