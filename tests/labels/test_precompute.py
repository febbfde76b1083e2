"""The teacher pass: what it stores is what the teacher says, and a kill at any moment costs at most a block."""

import dataclasses
import io
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import pillow
from support.processes import before, finished, ranked, stopped, torchrun
from support.tars import tar_of

import cache
from cache import UserError, philox
from cache.store.objects import Files
from pipeline.config import PrecomputeTeacher
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels import calibrate, precompute
from pipeline.networks import models
from pipeline.views import drawing, on_cpu
from pipeline.views import policy as policies
from pipeline.views.loader import Loader


@pytest.fixture(scope="module")
def options(digits, teacher, tmp_path_factory) -> PrecomputeTeacher:
    return PrecomputeTeacher(
        data=digits,
        teacher=teacher,
        store=tmp_path_factory.mktemp("store") / "labels.zarr",
        views=3,
        policy=POLICY,
        codec="int8",
        seed=2**62 + 1,
        batch_size=16,
        block_rows=24,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(options) -> PrecomputeTeacher:
    """The store of an uninterrupted run."""
    precompute.run(options)
    return options


def test_a_store_that_another_process_makes_meanwhile_is_joined(options, tmp_path, monkeypatch):
    """It comes into being while this one calibrates."""
    ours = dataclasses.replace(options, store=tmp_path / "labels.zarr")
    measured = precompute.calibrate

    def meanwhile(*arguments):
        monkeypatch.setattr(precompute, "calibrate", measured)
        precompute.run(ours)
        return measured(*arguments)

    monkeypatch.setattr(precompute, "calibrate", meanwhile)
    precompute.run(ours)
    assert cache.open(ours.store).missing_blocks() == []


def contents(path: Path) -> dict[str, np.ndarray]:
    store = cache.open(path)
    planes = [store.load_plane(view) for view in range(store.manifest.views)]
    return {
        "pairs": np.stack([plane.codes for plane in planes]),
        "weight": np.stack([plane.weight for plane in planes]),
        "digest": np.stack([plane.digest for plane in planes]),
        "status": store.status,
    }


def files_of(store: Path, view: int, block: int) -> list[Path]:
    """The files of a block, all arrays."""
    return [path for path in store.glob(f"*/c/{view}/{block}*/**/*") if path.is_file()] + [
        path for path in store.glob(f"*/c/{view}/{block}") if path.is_file()
    ]


def assert_equal_stores(one: Path, other: Path) -> None:
    ours, theirs = contents(one), contents(other)
    for name, array in ours.items():
        np.testing.assert_array_equal(array.view(np.uint8), theirs[name].view(np.uint8), name)


def test_labels_are_what_the_teacher_says_of_pillows_pixels(whole):
    """Pillow makes the view, a plain forward pass the logits, float64 the cosine; int8 is off by half a step."""
    index, store, policy = Index.open(whole.data), cache.open(whole.store), policies.load(POLICY)
    network = models.create(whole.teacher, index.classes)
    network.module.eval()
    view = 2
    rows = index.good[::3]
    drawn = drawing.of(index.records, whole.seed, view, policy)
    encoded, weight = store.load_plane(view).gather(rows)
    decoded = store.codec.decode(encoded, philox.dither_keys(whole.seed, index.records["key_hash"][rows], view))
    for i, row in enumerate(rows):
        image = Image.open(io.BytesIO(index.read(row))).convert("RGB")
        augmented = pillow.jda(image, policy.table, int(drawn["mask"][row]), int(drawn["signs"][row]))
        pixels = [
            np.asarray(pillow.base(source, drawn["box"][row, s], bool(drawn["flip"][row, s]), 12, -1))
            for s, source in enumerate((image, augmented))
        ]
        with torch.inference_mode():
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
            logits = network.module((batch - 0.5) / 0.5).numpy()
        step = np.ptp(logits, axis=1, keepdims=True) / 254
        assert (np.abs(decoded[i] - logits) <= 0.5001 * step + 1e-4).all()
        o, a = logits.astype(np.float64)
        assert weight[i] == pytest.approx(1 + o @ a / np.linalg.norm(o) / np.linalg.norm(a), abs=1e-5)


def test_the_student_replays_the_teachers_pixels(whole):
    """Stored digests equal those of a shuffled pass in other batches, for every sample and view."""
    index, store, policy = Index.open(whole.data), cache.open(whole.store), policies.load(POLICY)
    rng = np.random.default_rng(0)
    for view, (batch, threads) in enumerate([(7, 1), (64, 2), (7, 2)]):
        seen, digest = 0, store.load_plane(view).digest
        requests = [
            (rows, drawing.of(index.records[rows], whole.seed, view, policy))
            for rows in np.array_split(rng.permutation(index.good), -(-len(index.good) // batch))
        ]
        for item in Loader(index, policy, threads=threads).batches(requests, digests=True):
            np.testing.assert_array_equal(cache.pair_digest(item.digests), digest[item.rows])
            seen += len(item.rows)
        assert seen == len(index.good)


@pytest.mark.parametrize("together", [2, 4])
def test_several_views_of_one_decode_give_the_same_store(whole, together, tmp_path, monkeypatch):
    """Bit for bit, resumed too; and a sample of 3 views is decoded once for as many of them as fall together."""
    decoded = []
    decode = on_cpu.decode
    monkeypatch.setattr(on_cpu, "decode", lambda data: [decoded.append(data), decode(data)][1])
    config = dataclasses.replace(whole, store=tmp_path / "labels.zarr", views_per_decode=together)
    precompute.run(config)
    assert_equal_stores(whole.store, config.store)
    samples = len(Index.open(whole.data).good)
    assert len(decoded) - samples == samples * -(-whole.views // together)  # all were looked at for the code, too
    for view, block in ((0, 1), (1, 1), (2, 0)):
        for path in files_of(config.store, view, block):
            path.unlink()
    precompute.run(config)
    assert_equal_stores(whole.store, config.store)


def test_a_finished_store_is_left_alone(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.store.rglob("*") if path.is_file()}
    precompute.run(whole)
    assert before == {path: path.stat().st_mtime_ns for path in whole.store.rglob("*") if path.is_file()}
    assert "none, all were there" in capsys.readouterr().out


def changed(options, **fields):
    return dataclasses.replace(options, **fields)


def test_sigkill_between_any_two_objects(whole, tmp_path, monkeypatch):
    """Rerun after each kill: the store equals the uninterrupted one, and committed blocks keep their files."""
    puts = []
    with monkeypatch.context() as patch:
        patch.setattr(Files, "_put", before(Files._put, lambda: puts.append(1)))
        precompute.run(changed(whole, store=tmp_path / "counted"))
    partial = 0
    for number in (1, len(puts) // 2, len(puts)):
        run = changed(whole, store=tmp_path / str(number))
        assert stopped(precompute.run, run, "put", number)
        kept = {}
        if cache.exists(run.store):
            missing = cache.open(run.store).missing_blocks()
            blocks = {(view, block) for view in range(whole.views) for block in range(blocks_of(whole))}
            assert missing, "the last object is a commit"
            partial += len(missing) < len(blocks)
            kept = {
                path: path.stat().st_mtime_ns
                for view, block in blocks - set(missing)
                for path in files_of(run.store, view, block)
            }
        finished(precompute.run, run)
        assert kept == {path: path.stat().st_mtime_ns for path in kept}
        assert_equal_stores(run.store, whole.store)
    assert partial == 2, "the kills never fell between two blocks"


def blocks_of(options: PrecomputeTeacher) -> int:
    return cache.open(options.store).manifest.blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed"),
        ({"policy": "cifar10"}, "mean|policy|base|size"),
        ({"codec": "fp16"}, "codec"),
        ({"kl_budget": 0.01}, "KL budget"),
        ({"temperature": 1.0}, "temperature"),
        ({"block_rows": 25}, "block_rows"),
    ],
)
def test_a_store_of_other_options_is_refused(whole, change, message):
    with pytest.raises(UserError, match=f"another ({message})"):
        precompute.run(changed(whole, **change))


@pytest.fixture(scope="module")
def coded(options, tmp_path_factory) -> PrecomputeTeacher:
    """A store of subspace codes."""
    store = tmp_path_factory.mktemp("coded") / "labels.zarr"
    coded = changed(options, codec="subspace", kl_budget=1e-5, store=store)
    precompute.run(coded)
    return coded


def test_more_views_are_added_to_a_store_and_the_old_ones_kept(coded, tmp_path):
    """A store of three views grown from one is the store of three."""
    store = tmp_path / "grown"
    precompute.run(changed(coded, views=1, store=store))
    kept = {path: path.stat().st_mtime_ns for block in range(blocks_of(coded)) for path in files_of(store, 0, block)}
    precompute.run(changed(coded, store=store))
    assert len(kept) > blocks_of(coded)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert_equal_stores(store, coded.store)


def test_a_store_grows_with_its_data_set(digits, coded, tmp_path):
    """Shards appended to the data: their rows are labelled, and a last block that was short anew."""
    index = Index.open(digits)
    for name, rows in (("a", range(100)), ("b", range(100, len(index)))):
        members = {f"{index.key(row)}.jpg": index.read(row) for row in rows}
        members |= {f"{index.key(row)}.cls": str(index.records["label"][row]).encode() for row in rows}
        tar_of(tmp_path / f"{name}.tar", dict(sorted(members.items())))
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "small", classes=10)
    prepare.build(f"webdataset:{tmp_path}/{{a,b}}.tar", tmp_path / "large", classes=10)
    grown = changed(coded, codec="int8", kl_budget=None, store=tmp_path / "grown")
    precompute.run(changed(grown, data=tmp_path / "small"))
    assert cache.open(grown.store).manifest.samples % grown.block_rows  # the last block is short
    precompute.run(changed(grown, data=tmp_path / "large"))
    precompute.run(changed(grown, data=tmp_path / "large", store=tmp_path / "whole"))
    assert_equal_stores(grown.store, tmp_path / "whole")
    with pytest.raises(UserError, match="another dataset"):
        precompute.run(changed(grown, data=tmp_path / "small"))


def test_a_dry_run_writes_nothing_and_says_what_the_pass_would_cost(coded, tmp_path, capsys):
    precompute.run(changed(coded, store=tmp_path / "s", dry_run=True))
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert not any(tmp_path.iterdir())
    assert f"pairs to compute {3 * len(Index.open(coded.data).good):,} " in said
    assert "subspace" in said and "pairs/s" in said
    assert "2 views for 16 epochs made " in said and "docs/choosing.md" in said  # of those measured; the job has 3


def test_the_manifest_keeps_what_the_code_loses(coded):
    """Budget and KL of pairs that the code was not fitted to, and a slope that says unbiased."""
    fidelity = cache.open(coded.store).manifest.fidelity
    assert fidelity["budget"] == 1e-5
    assert 3e-6 < fidelity["kl"]["4"] < 1.5e-5 and abs(fidelity["slope"] - 1) < 0.02


def test_blocks_that_the_code_does_not_suit_are_reported(coded, tmp_path, capsys, monkeypatch):
    """A code fitted to a tenth of the logits' size clips them: every block says so."""
    real = calibrate.codecs.fit
    monkeypatch.setattr(calibrate.codecs, "fit", lambda name, logits, **rest: real(name, 0.1 * logits, **rest))
    precompute.run(changed(coded, store=tmp_path / "s"))
    said = capsys.readouterr()
    count = 3 * blocks_of(coded)
    assert said.err.count("labels beyond the budget: view") == count
    assert f"{count}, the first view 0, block 0: " in " ".join(said.out.replace("│", " ").split())
    kl, slope = cache.open(tmp_path / "s").read_block(0, 0).fidelity
    assert kl > 1e-5 or abs(slope - 1) > 0.02


def _by_torchrun(words: list[str], world: int, said: Path) -> None:
    with open(said, "w") as file:
        done = subprocess.run(
            [*torchrun(world), "-m", "pipeline", *words],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start", [ranked, pytest.param(_by_torchrun, marks=pytest.mark.slow)])  # which takes 10 s more
def test_two_processes_fill_one_store(start, coded, tmp_path):
    """Every block is handed to one of them; the store is that of one process."""
    options = ("data", "teacher", "store", "views", "policy", "codec", "kl_budget", "seed", "batch_size", "block_rows")
    run = changed(coded, store=tmp_path / "s")
    flags = [f"--{name.replace('_', '-')}={getattr(run, name)}" for name in options]
    start(["precompute-teacher", *flags, "--device=cpu", "--threads=1"], 2, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    one, other = map(int, re.search(r"blocks by process\D+(\d+) \+ (\d+)", said).groups())
    assert one + other == 3 * blocks_of(coded)
    assert_equal_stores(run.store, coded.store)


def test_a_store_of_another_teacher_is_refused(whole, tmp_path):
    path = tmp_path / "other.safetensors"
    models.save_weights(models.create("cifar/resnet8", 10, seed=4).module, path)
    with pytest.raises(UserError, match=r"another teacher_weights"):
        precompute.run(changed(whole, teacher=f"cifar/resnet8@{path}"))


def test_a_teacher_without_weights_is_refused(whole, tmp_path):
    with pytest.raises(UserError, match="network cifar/resnet8 has no weights; expected cifar/resnet8@WEIGHTS"):
        precompute.run(changed(whole, teacher="cifar/resnet8", store=tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_non_finite_logits_are_refused(whole, tmp_path):
    network = models.create("cifar/resnet8", 10, seed=3).module
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    models.save_weights(network, tmp_path / "nan.safetensors")
    run = changed(whole, teacher=f"cifar/resnet8@{tmp_path / 'nan.safetensors'}", store=tmp_path / "s")
    with pytest.raises(UserError, match="finite"):
        precompute.run(run)
    assert not cache.exists(run.store)  # the calibration has met them
