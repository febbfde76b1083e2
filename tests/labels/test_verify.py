"""Verifying a store: a whole one passes, and each cause of harm, brought about for real, is named, and no other."""

import base64
import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.passes import network, teacher_pass
from support.tars import tar_of

import cache
from cache import Block, Store, UserError
from pipeline import cli
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.labels.judge import Judge
from pipeline.networks import models

CODECS = ("fp16", "int8", "subspace")
CAUSES = ("wrong data set", "label row damaged", "pixels differ", "teacher differs", "wrong codec")


@pytest.fixture(scope="module")
def loud(digits, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("loud") / "loud.safetensors"
    models.save_weights(network(digits), path)
    return f"cifar/resnet8@{path}"


@pytest.fixture(scope="module")
def stores(digits, loud, tmp_path_factory) -> Callable[[str], Path]:
    """Codec -> a store of two views in three blocks each."""
    folder = tmp_path_factory.mktemp("stores")

    def make(codec: str) -> Path:
        store = folder / codec
        return store if store.exists() else teacher_pass(digits, loud, store, codec=codec)

    return make


@pytest.fixture
def verified(capsys, digits):
    """Run the command: exit code, {cause: lines}, stdout and stderr."""

    def run(store: Path, *more, data: Path = digits):
        capsys.readouterr()
        try:
            code = cli.main(["verify", str(store), "--data", str(data), "--device", "cpu", *map(str, more)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        lines = {cause: [line for line in err.splitlines() if line.startswith(f"{cause}: ")] for cause in CAUSES}
        return code, {cause: found for cause, found in lines.items() if found}, out, err

    return run


def rewritten(store: Path, to: Path, change: Callable[[Store, int, int, Block], tuple] | None = None, **fields) -> Path:
    """A store with other fields in its manifest and other blocks, all checksums right."""
    old = cache.open(store)
    new = cache.create(to, dataclasses.replace(old.manifest, **fields), old.status, old.key_hash)
    for view in range(old.manifest.views):
        for block in range(old.manifest.blocks):
            read = old.read_block(view, block)
            rows, weight, digest = change(old, view, block, read) if change else read[:3]
            new.write_block(view, block, rows, weight, digest)
    return to


def unlike(store: Store, view: int, block: int) -> tuple[int, int]:
    """Two rows of a block whose labels and w differ much, whatever this processor's network says."""
    start, stop = store.block_range(block)
    encoded, weight = store.load_plane(view).gather(rows := np.arange(start, stop))
    labels = store.codec.decode(encoded, store.dither_keys(view, rows)).reshape(len(rows), -1)
    distance = np.linalg.norm(labels[:, None] - labels, axis=2) * np.abs(weight[:, None] - weight)
    one, other = sorted(np.unravel_index(distance.argmax(), distance.shape))
    return int(rows[one]), int(rows[other])


def exchanged(*names: str, rows: tuple[int, int], view: int = 1):
    """A change that swaps some arrays of two rows, but for the dither keys: a store takes no others."""

    def change(store: Store, at: int, block: int, read: Block) -> tuple:
        start, stop = store.block_range(block)
        if at == view and start <= rows[0] < stop:
            ours = [row - start for row in rows]
            for name in names:
                array = getattr(read, name)
                array = array[:, 16:] if name == "codes" and store.codec.packed else array
                assert (array[ours[0]] != array[ours[1]]).any(), "a swap that changes nothing"
                array[ours] = array[ours[::-1]]
        return read[:3]

    return change


def places(lines: list[str]) -> set[tuple[str, ...]]:
    """(view, row) of each line."""
    return {tuple(line.split(": ")[1].replace(",", "").split(" ")[1:4:2]) for line in lines}


# --- nothing wrong


@pytest.mark.parametrize("codec", CODECS)
def test_a_whole_store_passes(stores, loud, verified, codec):
    code, found, out, err = verified(stores(codec), "--teacher", loud, "--fraction", 1, "--batch-size", 13)
    assert (code, found, err) == (0, {}, "")
    assert "360 of 360" in out and "6 of 6" in out and "none" in out
    kl = float(out.split("KL(T = 4) of the labels │")[1].split()[0])
    slope = float(out.split("slope of the labels")[1].split("│")[1])
    assert kl < {"fp16": 1e-6, "int8": 1e-3, "subspace": 0.07}[codec] and abs(slope - 1) < 0.02


def test_the_labels_fixture_passes_without_a_teacher(labels, verified):
    code, found, out, _ = verified(labels)
    assert (code, found) == (0, {})
    assert "64 of 360" in out and "not compared" in out


def exact(conv2d):
    """The convolution of a library that sums without an error, and rounds once."""

    def convolution(x, weight, *rest, **options):
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        with torch.autocast("cpu", enabled=False):
            return conv2d(x.to(dtype).double(), weight.to(dtype).double(), *rest, **options).to(dtype)

    return convolution


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_another_library_is_within_the_noise(digits, loud, verified, tmp_path, monkeypatch, precision):
    """Its teacher pass has other last bits, as on another machine."""
    store = tmp_path / "s.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", exact(torch.nn.functional.conv2d))
        teacher_pass(digits, loud, store, codec="int8", precision=precision)
    code, found, out, _ = verified(store, "--teacher", loud, "--fraction", 1, "--precision", precision)
    assert (code, found) == (0, {})
    assert "│ 0 in w" not in out, "the other library did not change a bit, so this tests nothing"


def test_a_rounding_on_edge_is_explained_and_another_label_is_not(stores):
    """Two answers a millionth apart whose codes differ: either may have been stored for the other."""
    store = cache.open(stores("subspace"))
    judge = Judge(store, SimpleNamespace(device=torch.device("cpu"), precision="fp32"))  # type: ignore[arg-type]
    judge._noise, judge._sums = 1e-5, {"rows": 1, "error": 0.01, "flips": 0.0}
    stream = store.dither_keys(0, np.arange(1))

    def decoded(logits):
        found = store.codec.decode(store.codec.encode(logits[None].astype(np.float32), stream), stream)[0]
        return found - found.mean(axis=-1, keepdims=True)

    low, high = 4 * np.random.default_rng(0).standard_normal((2, 2, 10))
    other = decoded(high)
    while np.abs(high - low).max() > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if (decoded(middle) != decoded(low)).any() else (middle, high)
    assert np.abs(decoded(low) - decoded(high)).max() > 0.5
    for one, two in ((low, high), (high, low)):
        assert judge._explained(one.astype(np.float32), stream[0], decoded(two))
        assert not judge._explained(one.astype(np.float32), stream[0], other)


def test_missing_blocks_are_no_damage(stores, loud, verified, tmp_path):
    store = shutil.copytree(stores("int8"), tmp_path / "s.zarr")
    (store / "commit/c/1/2").unlink()
    code, found, out, _ = verified(store, "--teacher", loud, "--fraction", 1)
    assert (code, found) == (0, {}) and "5 of 6; 1 are missing" in out and "308 of 360" in out
    shutil.rmtree(store / "commit/c")
    code, _, _, err = verified(store)
    assert code == 2 and "holds no labels yet" in err


def test_skipped_samples_are_counted(stores, loud, verified, tmp_path):
    def skip(store, view, block, read):
        read.weight[3], read.codes[3], read.digest[3] = np.nan, 0, 0
        return read[:3]

    store = rewritten(stores("subspace"), tmp_path / "s.zarr", skip)
    code, found, out, _ = verified(store, "--teacher", loud, "--fraction", 1)
    assert (code, found) == (0, {}) and "6 of those drawn" in out and "354 of 360" in out


def test_quarantined_samples_are_left_out(digits, loud, verified, tmp_path):
    members = samples(digits, range(80))
    members[next(iter(members))] = b"broken"
    tar_of(tmp_path / "some.tar", members)
    prepare.build(f"webdataset:{tmp_path}/some.tar", tmp_path / "data", classes=10)
    teacher_pass(tmp_path / "data", loud, tmp_path / "s.zarr", views=1, codec="int8")
    code, found, out, _ = verified(tmp_path / "s.zarr", "--teacher", loud, "--fraction", 1, data=tmp_path / "data")
    assert (code, found) == (0, {}) and "79 of 79" in out


# --- each cause


@pytest.mark.parametrize(
    ("codec", "array"),
    [*((codec, "pairs") for codec in CODECS), *(("int8", array) for array in ("weight", "digest", "commit"))],
)
def test_a_flipped_bit_is_a_damaged_block(stores, loud, verified, tmp_path, codec, array):
    """Verification goes on with the other blocks, and their labels."""
    store = shutil.copytree(stores(codec), tmp_path / "s.zarr")
    file = store / array / "c/1/0" / ("0" if array == "pairs" else "")
    data = bytearray(file.read_bytes())
    data[random.Random(codec + array).randrange(len(data))] ^= 4
    file.write_bytes(data)
    code, found, out, _ = verified(store, "--teacher", loud, "--fraction", 1)
    assert code == 1 and found.keys() == {"label row damaged"}
    assert "296 of 360" in out and "5 of 6; 0 are missing" in out
    (line,) = found["label row damaged"]
    assert "view 1, block 0" in line


@pytest.mark.parametrize(
    ("codec", "arrays"),
    [
        *((codec, ("codes",)) for codec in CODECS),
        *(("subspace", arrays) for arrays in (("weight",), ("digest",), ("codes", "weight", "digest"))),
    ],
)
def test_swapped_rows_are_damaged_rows(stores, loud, verified, tmp_path, digits, codec, arrays):
    rows = unlike(cache.open(stores(codec)), 1, 1)
    store = rewritten(stores(codec), tmp_path / "s.zarr", exchanged(*arrays, rows=rows))
    code, found, _, _ = verified(store, "--teacher", loud, "--fraction", 1)
    assert code == 1 and found.keys() == {"label row damaged"}
    assert places(found["label row damaged"]) == {("1", str(row)) for row in rows}
    key = Index.open(digits).key(rows[0])
    assert f"view 1, row {rows[0]}, key '{key}', block 1: " in found["label row damaged"][0]


def test_another_teacher_is_named_with_the_right_one(stores, digits, loud, verified, tmp_path):
    path = tmp_path / "other.safetensors"
    models.save_weights(network(digits, 1.1), path)
    code, found, out, _ = verified(stores("int8"), "--teacher", f"cifar/resnet8@{path}")
    assert code == 1 and found.keys() == {"teacher differs"}
    (line,) = found["teacher differs"]
    for weights in (loud, f"cifar/resnet8@{path}"):
        assert models.create(weights, 10).fingerprint in line
    assert "64 of 360" in out, "pixels are verified none the less"
    code, found, _, _ = verified(stores("int8"), "--teacher", "cifar/resnet14@" + loud.partition("@")[2])
    assert code == 2, "weights that do not fit the network are a wrong option"


@pytest.mark.parametrize(("codec", "nudge", "rows"), [*((codec, 1e-3, 60) for codec in CODECS), ("fp16", 1e-4, 30)])
def test_a_nudged_teacher_is_found_by_w(stores, digits, verified, tmp_path, codec, nudge, rows):
    """Weights off by a thousandth, which the manifest vouches for: only w knows. Labels are not blamed on the codec."""
    module = network(digits)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.mul_(1 + nudge * torch.randn_like(parameter))
    models.save_weights(module, tmp_path / "nudged.safetensors")
    fingerprint = models.fingerprint(module.state_dict())
    store = rewritten(stores(codec), tmp_path / "s.zarr", teacher_weights=fingerprint)
    code, found, out, _ = verified(store, "--teacher", f"cifar/resnet8@{tmp_path / 'nudged.safetensors'}")
    assert code == 1 and found.keys() == {"teacher differs"}
    assert len(found["teacher differs"]) == 21 and found["teacher differs"][-1].endswith(" more")
    assert int(out.split("teacher differs: ")[1].split()[0]) >= rows, "of 64"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("scale", lambda scale: scale * np.float32(1.5)),
        ("scale", lambda scale: scale * np.float32(1.03)),
        ("basis", lambda basis: -basis),
        ("basis", lambda basis: basis[::-1]),
        ("mean", lambda mean: mean + np.linspace(-3, 3, 10, dtype=np.float32)),
    ],
)
def test_another_codec_is_named(stores, loud, verified, tmp_path, field, change):
    subspace = stores("subspace")
    codec = cache.open(subspace).codec
    array = codec.array(field)
    data = np.ascontiguousarray(change(array), array.dtype).tobytes()
    config = codec.config | {field: base64.b64encode(data).decode()}
    store = rewritten(subspace, tmp_path / "s.zarr", codec=config)
    code, found, _, _ = verified(store, "--teacher", loud, "--fraction", 1)
    assert code == 1 and found.keys() == {"wrong codec"}


def test_a_codec_that_loses_more_than_the_manifest_says_is_named(stores, loud, verified, tmp_path):
    """Stored and re-made labels agree to the bit; they are just not what the teacher says."""
    fidelity = cache.open(stores("subspace")).manifest.fidelity
    store = rewritten(stores("subspace"), tmp_path / "s.zarr", fidelity=fidelity | {"kl": {"4": 0.005}})
    code, found, _, _ = verified(store, "--teacher", loud)
    assert code == 1 and found.keys() == {"wrong codec"}


@pytest.mark.parametrize("labels_too", [False, True])
def test_another_view_is_other_pixels(stores, loud, verified, tmp_path, labels_too):
    """The labels of other pixels are not laid on the teacher or the codec."""

    def change(store, view, block, read):
        other = store.read_block(1, block)
        return (*(other if labels_too else read)[:2], other.digest)

    store = rewritten(stores("int8"), tmp_path / "s.zarr", change)
    code, found, out, _ = verified(store, "--teacher", loud, "--fraction", 1)
    assert code == 1 and found.keys() == {"pixels differ"}
    assert "pixels differ: 180" in out, "those of view 0"
    assert {view for view, _ in places(found["pixels differ"][:-1])} == {"0"}


def samples(data: Path, order, key: Callable[[int], str] | None = None, label: int = 0) -> dict[str, bytes]:
    index = Index.open(data)
    members = {}
    for row in order:
        name = key(row) if key else index.key(row)
        members[f"{name}.jpg"] = index.read(row)
        members[f"{name}.cls"] = str((index.records["label"][row] + label) % 10).encode()
    return members


@pytest.mark.parametrize(
    ("order", "options", "how"),
    [
        ([0, 1, 2, 7, 4, 5, 6, 3, *range(8, 180)], {}, "1 pairs of rows are swapped, the first 3 and 7"),
        ([*range(5, 180), *range(5)], {}, "every sample stands 5 rows further on"),
        (np.random.default_rng(0).permutation(180), {}, "in another order"),
        (range(150), {}, "the first 150 keys agree, there are more or fewer"),
        (range(180), {"key": "stranger{:05d}".format}, "180 of 180 keys are foreign"),
        (range(180), {"label": 1}, "the first 180 keys agree, labels"),
    ],
)
def test_another_data_set_is_named_and_how_it_differs(stores, digits, verified, tmp_path, order, options, how):
    tar_of(tmp_path / "other.tar", samples(digits, order, **options))
    prepare.build(f"webdataset:{tmp_path}/other.tar", tmp_path / "other", classes=10)
    code, found, out, _ = verified(stores("int8"), data=tmp_path / "other")
    assert code == 1 and found.keys() == {"wrong data set"}
    (line,) = found["wrong data set"]
    assert how in line and "rows checked" not in out
    assert cache.open(stores("int8")).manifest.dataset in line


def test_a_disk_that_fails_is_no_damage(stores, verified, monkeypatch):
    def fail(*_):
        raise UserError("cannot read store", found="Input/output error")

    monkeypatch.setattr(Store, "read_block", fail)
    code, found, _, err = verified(stores("int8"))
    assert (code, found) == (2, {}) and "Input/output error" in err


# --- options


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--fraction", 0), "--fraction out of range"),
        (("--batch-size", 0), "--batch-size out of range"),
        (("--teacher", "cifar/resnet8"), "network cifar/resnet8 has no weights"),
        (("--teacher", "LOUD", "--precision", "bf16"), "give --precision fp32"),
    ],
)
def test_wrong_options_are_one_line(stores, loud, verified, more, message):
    code, _, _, err = verified(stores("int8"), *(loud if part == "LOUD" else part for part in more))
    assert code == 2 and message in err and err.count("\n") == 1


def test_the_share_and_the_seed_decide_the_rows(stores, verified, tmp_path):
    """A store whose every augmented view has another digest lists what was looked at."""

    def change(store, view, block, read):
        return read.codes, read.weight, read.digest + np.uint32(1)

    store = rewritten(stores("int8"), tmp_path / "s.zarr", change)
    seen = []
    for seed in (0, 0, 1):
        _, found, out, _ = verified(store, "--fraction", 0.25, "--seed", seed)
        assert "pixels differ: 90" in out
        seen.append(found["pixels differ"])
    assert seen[0] == seen[1] != seen[2]
