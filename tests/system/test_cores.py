"""How many cores a process counts on: those that its affinity, its container's quota and its neighbours leave."""

import math
import os

import pytest

from pipeline.system import cores
from pipeline.views import on_cpu

V1 = "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/\n"


def tree(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 0.5),
        (  # a group above is the tighter one
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/host/path\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),  # seen from inside
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            math.inf,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, math.inf),
    ],
)
def test_a_quota_is_read_from_both_versions(tmp_path, files, expected):
    assert cores.quota(tree(tmp_path, files)) == expected


@pytest.fixture
def process(monkeypatch):
    """A process with an affinity, started by another one with an affinity, in an environment."""

    def make(mine: set[int], parent: set[int], **environment) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: parent if pid == os.getppid() else mine)
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_CPUS_ON_NODE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))

    return make


NODE = set(range(64))


@pytest.mark.parametrize(
    ("mine", "parent", "environment", "expected"),
    [
        ({3, 4}, NODE, {}, [3, 4]),
        (NODE, NODE, {"LOCAL_WORLD_SIZE": 8, "LOCAL_RANK": 3}, list(range(24, 32))),
        # the launcher has bound each rank: its cores are not divided again
        (set(range(24, 32)), NODE, {"LOCAL_WORLD_SIZE": 8, "LOCAL_RANK": 3}, list(range(24, 32))),
        # bound to a memory node that four ranks share
        (set(range(32, 64)), NODE, {"LOCAL_WORLD_SIZE": 8, "LOCAL_RANK": 5}, list(range(40, 48))),
        # srun, through a script of its own on the same cores
        ({8, 9}, {8, 9}, {"LOCAL_WORLD_SIZE": 4, "LOCAL_RANK": 1, "SLURM_CPUS_ON_NODE": 8}, [8, 9]),
        # torchrun in a SLURM job of half a node
        (
            set(range(32)),
            set(range(32)),
            {"LOCAL_WORLD_SIZE": 4, "LOCAL_RANK": 1, "SLURM_CPUS_ON_NODE": 32, "TORCHELASTIC_RUN_ID": "x"},
            list(range(8, 16)),
        ),
        ({1, 2}, {1, 2}, {"LOCAL_WORLD_SIZE": 4, "LOCAL_RANK": 3}, [2]),  # more ranks than cores
    ],
)
def test_ranks_divide_cores_once(process, tmp_path, mine, parent, environment, expected):
    process(mine, parent, **environment)
    assert (cores.share(tmp_path), cores.own(tmp_path)) == (len(expected), expected)


@pytest.mark.parametrize(
    ("quota", "environment", "expected"),
    [("250000 100000", {}, 3), ("50000 100000", {}, 1), ("800000 100000", {"LOCAL_WORLD_SIZE": 4}, 2)],
)
def test_a_quota_limits_threads_and_names_no_cores(process, tmp_path, quota, environment, expected):
    root = tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota})
    process(NODE, NODE, **environment)
    assert (cores.share(root), cores.own(root)) == (expected, [])


@pytest.mark.parametrize("allowed", [{0, 1, 2, 3}, {5, 7, 9, 11}])
def test_the_loaders_of_two_ranks_take_disjoint_cores_or_none(process, monkeypatch, allowed):
    monkeypatch.setattr(cores, "quota", lambda root: math.inf)
    taken = []
    for rank in range(2):
        process(allowed, allowed, LOCAL_WORLD_SIZE=2, LOCAL_RANK=rank)
        taken += on_cpu.cores(2)
    assert taken == sorted(allowed)
    assert list(on_cpu.cores(3)) == []
