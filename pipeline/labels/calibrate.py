"""Which code keeps a teacher's labels: the cheapest unbiased one within the budget, measured before the pass."""

import time
from dataclasses import dataclass

import numpy as np

from cache import UserError, philox
from cache import codec as codecs
from cache.codec import Features, features
from cache.codec.fidelity import TEMPERATURE, Fidelity, measure
from pipeline.config import PrecomputeTeacher
from pipeline.data.index import Index
from pipeline.labels.agreement import Agreement, agreement
from pipeline.networks.teacher import Teacher
from pipeline.system import device as devices
from pipeline.system.terminal import progress
from pipeline.views import plan
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy

_MOST, _LEAST, _SHARE = 8192, 1024, 16  # pairs that are looked at: a sixteenth of the data, within these bounds
_HELD_OUT = 8  # every eighth of them measures the code and is not fitted to


@dataclass(frozen=True)
class Calibration:
    codec: codecs.Codec
    fidelity: Fidelity
    """On pairs that the code has not seen."""
    budget: float | None
    """Nats of KL at `temperature` per vector; None for a code that was not fitted to one."""
    temperature: float
    pairs_per_second: float
    """Of loader and teacher together."""
    agreement: Agreement | None
    """Of the teacher with the labels, on the original views; None where samples have none."""
    feature_noise: float | None = None
    """Share of the features' variance; None without features."""

    def to_json(self) -> dict:
        """For the manifest's `fidelity`."""
        asked = {"budget": self.budget, "temperature": self.temperature}
        agreement = {"agreement": self.agreement.share} if self.agreement else {}
        noise = {} if self.feature_noise is None else {"feature_noise": self.feature_noise}
        return self.fidelity.to_json() | asked | agreement | noise


def calibrate(config: PrecomputeTeacher, index: Index, policy: Policy, teacher: Teacher) -> Calibration:
    """Let the teacher look at random pairs of view 0, and choose and measure the code. Nothing is written."""
    logits, coded, rows, rate = _look(config, index, policy, teacher)
    cut = max(len(rows) - max(len(rows) // _HELD_OUT, 1), 1)
    rest = slice(min(cut, len(rows) - 1), None)  # a single pair has to serve for both
    budget, temperature = config.kl_budget or codecs.DEFAULT_BUDGET, config.temperature or TEMPERATURE
    if head := teacher.head:
        codec = features.fit(coded[:cut], head.weight, head.bias, budget, temperature)
    elif config.codec == "auto":
        codec = codecs.auto(logits[:cut], budget, temperature)
    elif config.codec == "subspace":
        codec = codecs.fit("subspace", logits[:cut], kl=budget, temperature=temperature)
    else:
        codec = codecs.make(config.codec, classes=index.classes)
    dither_keys = philox.dither_keys(config.seed, index.records["key_hash"][rows[rest]], 0)
    fitted = config.codec in ("auto", "subspace")
    codes = codec.encode(coded[rest], dither_keys)
    fidelity = measure(codec, logits[rest], dither_keys, codes, temperature)
    noise = features.noise(codec, coded[rest], codes, dither_keys) if isinstance(codec, Features) else None
    agrees = None if index.class_list.unlabelled else agreement(logits[:, 0], index.records["label"][rows])
    return Calibration(codec, fidelity, budget if fitted else None, temperature, rate, agrees, noise)


def pairs(samples: int) -> int:
    """Pairs that are looked at, of a data set of so many samples."""
    return min(samples, max(_LEAST, min(_MOST, samples // _SHARE)))


def _look(config, index: Index, policy: Policy, teacher: Teacher) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Logits f32 (n, 2, C), what is coded, and rows i64 (n,) of random pairs, in random order; pairs per second."""
    good = index.good
    count = pairs(len(good))
    rng = np.random.default_rng(config.seed)
    rows = np.sort(rng.choice(good, count, replace=False))

    loader = Loader(
        index,
        policy,
        threads=devices.threads(config),
        decoder=devices.decoder(config.decoder, teacher.device),
        max_bad=config.max_bad,
    )
    batches = loader.batches(plan.requests(index, policy, config.seed, plan.cut(0, rows, config.batch_size)))
    logits, coded, seen, marks = [], [], [], []
    with progress("calibration", count, "pairs") as advance:
        for batch, said in teacher.answers(batches):
            logits.append(said.logits.cpu().numpy())
            coded.append(said.coded.cpu().numpy() if teacher.head else logits[-1])
            seen.append(batch.rows)
            marks.append(time.perf_counter())
            advance(len(batch.rows))
    if not seen:
        raise UserError("no sample can be read", found=f"{count} tried", fix="check the shards")
    timed = sum(map(len, seen[1:]))  # the first batch pays for the start
    rate = timed / (marks[-1] - marks[0]) if timed else 0.0
    order = rng.permutation(sum(map(len, seen)))
    whole = np.concatenate(logits)[order]
    given = np.concatenate(coded)[order] if teacher.head else whole
    return whole, given, np.concatenate(seen)[order], rate
