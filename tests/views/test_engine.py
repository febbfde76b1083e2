"""The GPU loader's engine: what it calls and when, damage, two decoders at once, and what it asks of DALI and CUDA.

`test_loader` holds its pixels. Here the calls that would reach a GPU meet stand-ins, which refuse what DALI refuses.
"""

import dataclasses
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import engine, fake_dali, interpreter
from support.fake_dali import Pipeline, Torch
from support.images import jpeg
from support.tars import tar_of

from cache import UserError
from pipeline.data import dali, prepare
from pipeline.data.decode import decode
from pipeline.data.index import Index
from pipeline.views import mixing, on_gpu, plan
from pipeline.views.loader import Loader, _behind
from pipeline.views.policy import POLICIES, Mix, Policy

TESTS = Path(__file__).parents[1]
POLICY, SEED, SIZE = POLICIES["cifar10"], 7, 12
UNDECODABLE = b"\xff\xd8\xff\xdb\x00\x43 and no more"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Index:
    """60 JPEGs of 32 to 47 pixels a side."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    members = {}
    for number in range(60):
        members[f"{number:03d}.jpg"] = jpeg(rng, *map(int, rng.integers(32, 48, 2)))
        members[f"{number:03d}.cls"] = b"%d" % (number % 10)
    prepare.build(f"webdataset:{tar_of(folder / 's.tar', members)}", folder / "data", classes=10)
    return Index.open(folder / "data")


def batches(
    index: Index, decoder: str, max_bad: float = 0.001, size: int = SIZE, policy: Policy = POLICY
) -> tuple[list, Loader]:
    loader = Loader(index, policy, threads=2, decoder=decoder, max_bad=max_bad)
    requests = plan.requests(index, policy, SEED, plan.cut(1, index.good, size))
    return list(loader.batches(requests, digests=True)), loader


def by_row(found: list) -> dict[int, tuple]:
    return {int(row): tuple(digest) for batch in found for row, digest in zip(batch.rows, batch.digests, strict=True)}


@pytest.fixture(scope="module")
def expected(small) -> dict[int, tuple]:
    """By the CPU's half."""
    return by_row(batches(small, "cpu")[0])


# --- over DALI's CPU decoder


def test_a_batch_is_decoded_while_the_one_before_it_is_planned(small, expected, monkeypatch):
    """Batch k + 1 is fed and scheduled before batch k is waited for and planned, and then batch k - 1 is waited for."""
    engine.on_the_host(monkeypatch)
    calls: list[str] = []

    def traced(where, name: str, what: str, inner=None):
        inner, number = inner or getattr(where, name), count()

        def call(*arguments):
            calls.append(f"{what} {next(number)}")
            return inner(*arguments)

        monkeypatch.setattr(where, name, call)

    traced(on_gpu._Decoders, "schedule", "feed and schedule")
    traced(on_gpu._Decoders, "take", "take")
    traced(on_gpu.jda_gpu, "pairs", "plan and launch", engine.pairs)
    traced(on_gpu._Engine, "finished", "hand out")
    found, _ = batches(small, "gpu")
    assert by_row(found) == expected
    assert calls == [
        *["feed and schedule 0"],
        *["feed and schedule 1", "take 0", "plan and launch 0"],
        *["feed and schedule 2", "take 1", "plan and launch 1", "hand out 0"],
        *["feed and schedule 3", "take 2", "plan and launch 2", "hand out 1"],
        *["feed and schedule 4", "take 3", "plan and launch 3", "hand out 2"],
        *["take 4", "plan and launch 4", "hand out 3"],
        *["hand out 4"],
    ]


@pytest.mark.parametrize("decoder", ["gpu", "gpu-both"])
def test_an_undecodable_image_is_skipped_by_name_and_harms_no_other(small, expected, decoder, monkeypatch, capfd):
    """Two in one batch, one in the next, which DALI has begun by then; the batches are those of a clean run."""
    engine.on_the_host(monkeypatch)
    bad, read = [13, 20, 25], Index.read
    monkeypatch.setattr(Index, "read", lambda self, row: UNDECODABLE if row in bad else read(self, row))
    for _ in range(5):  # what DALI's threads write after a failure would hit one run or another
        found, loader = batches(small, decoder, max_bad=0.1)
        assert [len(batch.rows) for batch in found] == [12, 10, 11, 12, 12]
        assert by_row(found) == {row: digest for row, digest in expected.items() if row not in bad}
        assert set(loader.skipped.causes) == set(bad)
    assert "sample '013'" in (err := capfd.readouterr().err) and "cannot be decoded: " in err


def test_a_partner_that_cannot_be_decoded_costs_its_sample_and_no_other(small, monkeypatch):
    engine.on_the_host(monkeypatch)
    policy = dataclasses.replace(POLICY, mix=Mix(cutmix_alpha=1.0))
    expected, read = by_row(batches(small, "cpu", policy=policy)[0]), Index.read
    drawn = mixing.draw(small.records, small.good, SEED, 1, policy)
    assert (drawn["partner"] >= 0).mean() > 0.9
    bad = 13
    monkeypatch.setattr(Index, "read", lambda self, row: UNDECODABLE if row == bad else read(self, row))
    lost = {bad, *np.flatnonzero(drawn["partner"] == bad).tolist()}
    assert len(lost) == 2
    for decoder in ("cpu", "gpu"):
        found, loader = batches(small, decoder, 0.1, policy=policy)
        assert by_row(found) == {row: digest for row, digest in expected.items() if row not in lost}
        assert set(loader.skipped.causes) == {bad}


def test_too_many_undecodable_images_end_the_run(small, monkeypatch):
    engine.on_the_host(monkeypatch)
    monkeypatch.setattr(Index, "read", lambda self, row: UNDECODABLE)
    with pytest.raises(
        UserError, match=r"; found 1, the last: cannot read sample [^;]*: cannot be decoded: [^;]*, expected"
    ):
        batches(small, "gpu")


def test_a_failure_that_no_image_explains_is_the_decoders(small, monkeypatch):
    engine.on_the_host(monkeypatch)
    take = dali.Batches.take

    def failing(self, stream):
        found = take(self, stream)
        if len(found) > 1:
            raise RuntimeError("out of memory")
        return found

    monkeypatch.setattr(dali.Batches, "take", failing)
    with pytest.raises(UserError, match="cannot decode a batch, but each of its images; found out of memory"):
        batches(small, "gpu")


def test_a_larger_batch_than_the_first_finds_room(small, expected, monkeypatch):
    engine.on_the_host(monkeypatch)
    sizes = [1, 3, 2, 20, 4, 30]
    parts = [(1, part) for part in np.split(small.good, np.cumsum(sizes)[:-1])]
    loader = Loader(small, POLICY, threads=2, decoder="gpu")
    found = list(loader.batches(plan.requests(small, POLICY, SEED, parts), digests=True))
    assert [len(batch.rows) for batch in found] == sizes and by_row(found) == expected


def test_both_decoders_share_by_key_whatever_the_batch(small, monkeypatch):
    keys = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    share = (dali.route("gpu-both", keys) == 0).mean()
    assert abs(share - dali.ENGINE_SHARE) < 4 * np.sqrt(0.65 * 0.35 / len(keys))  # four standard deviations
    assert not dali.route("gpu", keys).any() and not dali.route("gpu-hw", keys).any()

    engine.on_the_host(monkeypatch)
    sent: list[dict] = [{}, {}]
    schedule = dali.Batches.schedule
    for size, seen in zip((12, 7), sent, strict=True):

        def noted(self, encoded, engines=[], seen=seen):  # noqa: B006
            if self not in engines:
                engines.append(self)
            seen.update({data: engines.index(self) for data in encoded})
            schedule(self, encoded)

        with monkeypatch.context() as patch:
            patch.setattr(dali.Batches, "schedule", noted)
            batches(small, "gpu-both", size=size)
    routes = dali.route("gpu-both", small.records["key_hash"])
    assert len(set(routes)) == 2
    # Engines are numbered in the order of their first batch.
    assert sent[0] == sent[1] == {small.read(i): int(routes[i] != routes[0]) ^ int(routes[0]) for i in range(60)}


@pytest.mark.parametrize("decoder", ["cpu", "gpu", "gpu-both"])
def test_several_views_of_one_decode_are_those_of_a_decode_each(small, decoder, monkeypatch):
    """In the order of the views, with a bad image in none of them."""
    engine.on_the_host(monkeypatch)
    read = Index.read
    monkeypatch.setattr(Index, "read", lambda self, row: UNDECODABLE if row == 30 else read(self, row))
    loader = Loader(small, POLICY, threads=2, decoder=decoder, max_bad=0.1)
    found = list(loader.batches(plan.requests(small, POLICY, SEED, plan.cut((4, 1, 9), small.good, 25)), digests=True))
    assert [len(batch.rows) for batch in found] == [25] * 3 + [24] * 3 + [10] * 3
    for number, view in enumerate((4, 1, 9)):
        alone = Loader(small, POLICY, threads=2, max_bad=0.1)
        one = alone.batches(plan.requests(small, POLICY, SEED, plan.cut(view, small.good, 25)), digests=True)
        for batch, expected in zip(found[number::3], one, strict=True):
            assert batch.rows.tolist() == expected.rows.tolist() and (batch.digests == expected.digests).all()
            assert (batch.images == expected.images).all()


def test_an_image_decoded_in_the_background_keeps_its_memory():
    """The static executor would write the next batch over it."""
    rng = np.random.default_rng(0)
    images = [[jpeg(rng, 20, 10) for _ in range(3)] for _ in range(4)]
    pipeline = dali.Batches(3, 2, None, 0.0)
    pipeline.schedule(images[0])
    held = []
    for later in (*images[1:], images[0]):
        pipeline.schedule(later)
        held.append(pipeline.take(None))
    pipeline.close()
    for batch, encoded in zip(held, images, strict=True):
        for image, data in zip(batch, encoded, strict=True):
            np.testing.assert_array_equal(np.asarray(image), decode(data))


# --- where a GPU would differ


@pytest.fixture
def gpu(monkeypatch) -> Torch:
    return fake_dali.with_a_gpu(monkeypatch)


@pytest.mark.parametrize(("decoder", "engines"), dali.ENGINES.items())
def test_what_is_asked_of_dali_and_cuda(small, expected, gpu, decoder, engines):
    found, _ = batches(small, decoder)
    assert by_row(found) == expected
    assert [pipeline.settings for pipeline in Pipeline.made] == [dict(device_id=3, depth=2, affinity=False)] * len(
        engines
    )
    assert [how["no_copy"] for how in gpu.options if "no_copy" in how] == [True] * len(engines)
    images = [how for how in gpu.options if "device" in how]
    assert [(how["device"], how["hw_decoder_load"]) for how in images] == [("mixed", engine) for engine in engines]
    assert all(how["jpeg_fancy_upsampling"] and not how["adjust_orientation"] for how in images)
    for pipeline in Pipeline.made:  # but for what it starts with, in the order of the loader's stream
        assert pipeline.streams[:2] == [None, None] and set(pipeline.streams[2:]) == {77}
    # Each batch's pixels go to page-locked memory and its event is recorded on the stream; no batch is waited for
    # before the next one's kernels are on their way.
    launch = ["launch", "empty, pinned True", "event", "launched"]
    assert gpu.calls == [*launch, *[*launch, "waited"] * 4, "waited"]


def test_without_digests_no_pixel_leaves_the_gpu(small, gpu):
    loader = Loader(small, POLICY, threads=2, decoder="gpu")
    list(loader.batches(plan.requests(small, POLICY, SEED, plan.cut(1, small.good, SIZE))))
    assert "empty, pinned True" not in gpu.calls and gpu.calls.count("event") == 5


def test_memory_of_a_batch_waits_for_the_stream_that_it_is_handed_to(monkeypatch):
    """The loader's allocator would hand it out again to the loader's stream, which does not wait for the reader's."""
    read, batches = [], [SimpleNamespace(images=SimpleNamespace(is_cuda=True, device=3)) for _ in range(3)]
    for number, batch in enumerate(batches):
        batch.images.record_stream = lambda stream, number=number: read.append((number, stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the reader's on {device}")
    assert list(_behind(lambda: (batch for batch in batches))) == batches
    assert read == [(number, "the reader's on 3") for number in range(3)]


def test_without_gpu_and_interpreter_it_says_so(small, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU to decode on; found no CUDA device"):
        batches(small, "gpu")


def test_all_but_decoding_works_without_dali():
    """Tests marked gpu must be collected where it is missing, and a store's labels read."""
    code = "import sys; sys.modules['nvidia'] = None; sys.modules['nvidia.dali'] = None\n"
    code += "import support.datasets, pipeline.cli, pipeline.labels.verify, pipeline.views.on_gpu, bench.gpu_acceptance"
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


# --- with Triton's interpreter


@pytest.mark.parametrize("images", [2, pytest.param(36, marks=pytest.mark.slow)])
def test_engine_and_kernels_give_pillows_bytes_in_the_interpreter(images):
    """`interpreted_engine.py`, in a process whose kernels are interpreted."""
    interpreter.passes(TESTS / "views" / "interpreted_engine.py", ENGINE_IMAGES=str(images))
