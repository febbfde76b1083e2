"""Photographs whose classes a real teacher names: its own top class of each is the label.

A student's top-1 is then its agreement with the teacher. Students and teacher see the same pixels, the teacher resized
to `real.SIZE`, when it names classes, when it answers for a store and when it judges: so agreement and KL do not blame
a student for details that it was never shown.
"""

import dataclasses
from pathlib import Path

import numpy as np

from bench.claims import processes
from bench.claims.data import Trial, derive, key, pool
from bench.labels import real
from cache import UserError
from pipeline.config import Bench, Machine
from pipeline.data.classes import Classes
from pipeline.data.index import Index
from pipeline.networks.placed import Placed, placed
from pipeline.system import device as devices
from pipeline.views.policy import Policy

_LOGITS = "teacher"


def opened(chosen: Trial, config: Bench, work: Path) -> tuple[Trial, Index, Index]:
    """The trial with its teacher as NAME@WEIGHTS, photographs to learn from, as many as it says, and all to judge by;
    weights and labels are made in `work` if they are not there. Raises UserError."""
    data, val = (Index.open(path, part) for path, part in zip(real.parts(config), ("train", "val"), strict=True))
    if data.fingerprint == val.fingerprint:
        raise UserError("--val has the photographs of --data", found=val.path, fix="prepare others")
    network = real.network(chosen.teacher)
    machine = Machine(threads=config.threads)
    teacher = placed(network, devices.pick(machine), "fp32", chosen.policy, chosen.teacher_size)
    weights = work / f"{chosen.teacher}-{network.fingerprint[:16]}.safetensors"
    if not weights.exists():
        work.mkdir(parents=True, exist_ok=True)
        teacher.save(weights)
    # Chosen before they have these labels: most classes have a few images, and one of each would be too many.
    few = pool(data, chosen.samples, work)
    made, held = (labelled(index, teacher, chosen.policy, work, machine) for index in (few, val))
    return dataclasses.replace(chosen, teacher=f"{network.name}@{weights}"), made, held


def labelled(index: Index, teacher: Placed, policy: Policy, work: Path, machine: Machine) -> Index:
    """The good samples of a data set under the teacher's top classes, as one of their own, with its logits; made in
    `work` if it is not there."""
    about = [index.fingerprint, teacher.network.fingerprint, teacher.size, policy.to_config()["base"]]
    folder = work / f"photographs-{key(*about)}"
    if not folder.exists():
        logits = processes.answers(teacher, index, policy, machine)
        records = np.array(index.records[index.good])
        records["label"] = logits.argmax(1)
        source = f"{index.path}, labelled by {teacher.network.name}"
        derive(index, records, Classes(teacher.network.classes), source, folder, **{_LOGITS: logits})
    return Index.open(folder)


def judged_by(index: Index) -> Path | None:
    """The teacher's logits of the samples of a data set that was `labelled`, f32 (N, C) in the order of its rows."""
    path = index.path / f"{_LOGITS}.npy"
    return path if path.exists() else None
