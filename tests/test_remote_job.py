"""The whole job on shards behind S3 and HTTP, through faults, gives what it gives on local ones."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.remote_servers import KINDS, hurry, serve

import cache
from pipeline.config import PrecomputeTeacher, TrainStudent
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels import precompute
from pipeline.training import train_student


def job(data, teacher, out, **options):
    """Store and student weights of a run on `data`."""
    common = {"data": data, "device": "cpu", "batch_size": 16, **options}
    store = out / "labels.zarr"
    precompute.run(PrecomputeTeacher(**common, teacher=teacher, store=store, views=2, policy=POLICY, block_rows=64))
    train_student.run(TrainStudent(**common, store=store, student="cifar/resnet8", out=out / "run", epochs=2, lr=0.05))
    return cache.open(store), load_file(out / "run" / "model.safetensors")


# HTTP differs in how shards are read, which test_remote.py looks at byte for byte.
@pytest.mark.parametrize("protocol", ["s3", pytest.param("http", marks=pytest.mark.slow)])
def test_store_and_student_are_those_of_local_shards(digits, teacher, tmp_path, monkeypatch, protocol):
    """A fifth of the requests fail in some way; the order of the samples decides the weights to the last bit."""
    hurry(monkeypatch)
    expected_store, expected = job(digits, teacher, tmp_path / "local")
    with serve(digits.parent, fault_rate=0.2) as servers:
        servers.faults.slow_s = 0.02
        prepare.build(f"webdataset:{getattr(servers, protocol)}/train.tar", tmp_path / "data", classes=10)
        assert Index.open(tmp_path / "data").fingerprint == Index.open(digits).fingerprint
        store, weights = job(tmp_path / "data", teacher, tmp_path / "remote", shard_cache=tmp_path / "cache")
        assert sum(servers.faults.made.values()) > 20 and len(servers.faults.made) == len(KINDS)
    for view in range(2):
        for name in ("codes", "weight", "digest"):
            np.testing.assert_array_equal(*(getattr(s.load_plane(view), name) for s in (store, expected_store)))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
