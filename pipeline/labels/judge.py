"""Are stored labels those of a teacher? Its noise, its code's rounding, damage and other teachers told apart.

The teacher's noise is measured by running it twice: the second time in another order, in other batches, and with every
pixel off by what sums of some thousand products differ by in another order. Other batches alone would not do: on a CPU
they seldom change a bit, whereas w moves by up to 3e-6 (bf16: 2e-3) between oneDNN and plain convolutions. Neither w
nor this module sees a factor on all logits as another teacher: that looks like another code.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

from cache import Store
from cache.codec.fidelity import divergences
from kernels.reference import cosine_weight
from pipeline.networks.teacher import Said, Teacher
from pipeline.views.batch import Batch

DAMAGED, TEACHER, CODEC = "label row damaged", "teacher differs", "wrong codec"

_T = 4.0
_UNIT = {"fp32": 2.0**-18, "bf16": 2.0**-13}  # sqrt(4096) roundings of 2^-24; from 2^-13 on bf16 gets no noisier
_TF32 = 2.0**-10  # of convolutions on a GPU, which the teacher pass may have had, or this run
_MARGIN = 4.0  # on the largest difference of two runs: a third may differ more
_ULPS = 2.0**-20  # a step of the stored w, twice what rounding to it may be off by
_ENERGY_STEP = 2.0**-8  # of the stored energy, twice what rounding to it may be off by
_GAP = 16.0  # between the largest w that moved with the others' and one that moved alone
_PROBES = 64
_NEAR = 0.25  # of the code's own error: one coefficient of a hundred that is rounded the other way
_APART = 2.0  # times the code's error: no rounding takes a label further from the answer, another sample's is further
_ALLOWED_KL = 1e-3  # nats, beyond twice what the manifest says

_SEEN = np.dtype(
    [
        ("view", "i8"),
        ("row", "i8"),
        ("stored", "f4"),  # w
        ("now", "f4"),
        ("noise", "f4"),  # of w, between two runs
        ("distance", "f8"),  # rms between the stored labels and what the code makes of the teacher's answer
        ("far", "?"),  # further than rounding can be
        ("error", "f8"),  # rms between the stored labels and the teacher's answer
        ("own", "f8"),  # rms between what the code makes of the teacher's answer, and the answer
        ("energy", "f4"),  # by how much the stored energy of either view is off; 0 in a store without
        ("energy_noise", "f4"),  # of it, between two runs
        ("kl", "f8"),  # at T = 4, of the stored labels from the teacher's, nats; NaN: they are no numbers
    ]
)


class Judge:
    """Looks at rows in groups; concludes once it has seen all."""

    def __init__(self, store: Store, teacher: Teacher):
        made_on = str(store.manifest.versions.get("device", teacher.device.type)).partition(":")[0]
        self._unit = _UNIT[teacher.precision]
        if made_on != teacher.device.type:
            self._unit = max(self._unit, _TF32)
        self._store, self._teacher = store, teacher
        self._generator = torch.Generator().manual_seed(0)
        self._rng = np.random.default_rng(0)
        self._seen: list[np.ndarray] = []
        self._noise = 0.0  # of a logit
        self._moved = 0.0  # what is coded, a logit or a feature
        self._sums: defaultdict[str, float] = defaultdict(float)

    def look(self, view: int, batch: Batch, codes: np.ndarray, weight: np.ndarray, energy: np.ndarray) -> None:
        """Enter rows: their pixels, whose digests agree, their stored codes u8 (B, row_bytes), w f32 (B,) and energy
        f32 (B, 2), or (B, 0) in a store without.

        Raises UserError for a teacher whose logits no code takes.
        """
        codec, dither_keys = self._store.codec, self._store.dither_keys(view, batch.rows)
        said, noisy = self._teacher.said(batch), self._again(batch)
        (logits, coded), (again, recoded) = ([part.cpu().numpy() for part in parts] for parts in (said, noisy))
        seen = np.empty(len(batch.rows), _SEEN)
        seen["view"], seen["row"], seen["stored"], seen["now"] = view, batch.rows, weight, _w(logits)
        seen["noise"] = np.abs(seen["now"] - _w(again))
        now, then = (_energy(said)[:, : energy.shape[1]] for said in (logits, again))
        seen["energy"] = np.abs(now - energy).max(axis=1, initial=0)
        seen["energy_noise"] = np.abs(now - then).max(axis=1, initial=0)
        self._noise = max(self._noise, float(np.abs(logits - again).max()))
        self._moved = max(self._moved, float(np.abs(coded - recoded).max()))
        true = _centred(logits)
        expected, moved = (
            _centred(codec.decode(codec.encode(given, dither_keys), dither_keys)) for given in (coded, recoded)
        )
        with np.errstate(all="ignore"):  # a damaged row may hold infinities
            stored = _centred(codec.decode(codes, dither_keys))
            seen["distance"], seen["error"] = _rms(stored - expected), _rms(stored - true)
        seen["own"] = _rms(expected - true)
        finite = (np.abs(stored) < 1e30).all(axis=(1, 2))  # NaN compares false
        seen["kl"] = np.nan
        seen["kl"][finite] = divergences(true[finite], stored[finite], _T).mean(axis=1)
        for name, value in {
            "rows": len(true),
            "error": np.square(seen["own"]).sum(),
            "flips": np.square(expected - moved).mean(axis=(1, 2)).sum(),
            "product": (true * stored)[finite].sum(),
            "energy": np.square(true[finite]).sum(),
        }.items():
            self._sums[name] += float(value)
        seen["far"] = ~(seen["distance"] <= self._near())
        for i in np.flatnonzero(seen["far"]):
            seen["far"][i] = not self._explained(coded[i], dither_keys[i], stored[i])
        self._seen.append(seen)

    def conclude(self) -> Iterator[tuple[str, str, int, int]]:
        """Whatever noise does not explain: cause, what it is, view and row."""
        seen = np.concatenate([np.empty(0, _SEEN), *self._seen])
        off, floor = _off(seen), self._floor(seen)
        differs = ~(off <= floor)
        if differs.any():
            # Another teacher moves every w. If it hardly differs, only the most moved of them leave the noise, and they
            # follow on the others without a gap. Damage moves some rows, and leaves the others.
            most = float(np.median(off)) > _MARGIN * float(np.median(seen["noise"])) + _ULPS
            alone = ~(off[differs] <= _GAP * off[~differs].max(initial=0))
            moved = most or (~alone).sum() >= alone.sum()
            for one in seen[differs]:
                what = f"w is {one['now']:.8g} now, {one['stored']:.8g} in the store, and the noise {floor:.2g}"
                what += "" if most else "; w of most rows agrees"
                yield TEACHER if moved else DAMAGED, what, int(one["view"]), int(one["row"])
            if moved:
                return
        yield from self._compare_labels(seen[~differs])
        floor = _MARGIN * float(seen["energy_noise"].max(initial=0)) + _ENERGY_STEP
        for one in seen[~differs & ~(seen["energy"] <= floor)]:
            what = f"w agrees, but the energy is off by {one['energy']:.3g}, and the noise {floor:.2g}"
            yield DAMAGED, what, int(one["view"]), int(one["row"])

    def facts(self) -> dict:
        """For the summary."""
        sums, seen = self._sums, np.concatenate([np.empty(0, _SEEN), *self._seen])
        if not len(seen):
            return {}
        return {
            "noise floor": f"{self._floor(seen):.2g} in w, {_MARGIN * self._noise:.2g} in a logit",
            "largest difference": f"{_off(seen).max():.2g} in w",
            "KL(T = 4) of the labels": f"{seen['kl'][~np.isnan(seen['kl'])].mean():.4g} nats"
            if sums["energy"]
            else "-",
            "slope of the labels": f"{sums['product'] / sums['energy']:.4f}" if sums["energy"] else "-",
        }

    def _compare_labels(self, seen: np.ndarray) -> Iterator[tuple[str, str, int, int]]:
        """What is wrong with the labels of rows whose w agrees.

        A code with other parameters rounds some coefficients otherwise, in few rows if its parameters differ little.
        Such a row is no damaged one: its labels are not what this code makes of the teacher's answer, but as near to
        the answer as a code brings them. Labels of another sample are further away. A code that differs much makes
        most rows far. If it cannot say what the teacher says at all, stored labels and what it makes of the teacher's
        answer may still agree: that leaves the KL divergence.
        """
        if not len(seen):
            return
        far, ratio, kl = seen["far"], seen["distance"] / self._scale(), seen["kl"][~seen["far"]]
        foreign = ~(
            seen["error"] <= _APART * np.maximum(self._scale(), seen["own"])
        )  # not the answer's, however rounded
        promised = self._store.manifest.fidelity.get("kl")
        promised = promised.get(f"{_T:g}") if isinstance(promised, dict) else None
        allowed = 2 * promised + _ALLOWED_KL if isinstance(promised, float) else math.inf
        unfit = len(kl) > 1 and kl.mean() - 3 * kl.std() / math.sqrt(len(kl)) > allowed
        wrong = unfit or far.mean() > 0.5 or (far & ~foreign).sum() >= (far & foreign).sum()
        name = self._store.manifest.codec["name"]
        for one, times in zip(seen, ratio, strict=True):
            if one["far"] or (unfit and one["kl"] > allowed):
                what = f"w agrees, but the labels are {times:.2g} times the error of {name} from where the teacher's"
                what += f" answer leads, and {one['kl']:.2g} nats of KL(T = 4) from the answer; "
                what += "so are most rows'" if wrong else "those of most rows are right"
                yield CODEC if wrong else DAMAGED, what, int(one["view"]), int(one["row"])

    def _again(self, batch: Batch) -> Said:
        """What the teacher says once more, as its arithmetic elsewhere might have them."""
        images = batch.images.flip(1).float()
        noise = 2 * torch.rand(images.shape, generator=self._generator) - 1
        images = images * (1 + self._unit * noise.to(images.device))
        parts = images.split(len(batch.rows) // 3 + 1, dim=1)
        said = [self._teacher.said(Batch(batch.rows, batch.labels, part, None)) for part in parts]
        return Said(*(torch.cat(part).flip(0) for part in zip(*said, strict=True)))

    def _floor(self, seen: np.ndarray) -> float:
        """What w may be off by."""
        return _MARGIN * float(seen["noise"].max(initial=0)) + _ULPS

    def _scale(self) -> float:
        """The code's own error, rms of a logit over all rows so far, and the teacher's noise."""
        return math.sqrt(self._sums["error"] / self._sums["rows"]) + _MARGIN * self._noise + 1e-12

    def _near(self) -> float:
        """How far labels may be from what the code makes of the teacher's answer without being looked at closer."""
        return _NEAR * self._scale() + _MARGIN * math.sqrt(self._sums["flips"] / self._sums["rows"])

    def _explained(self, coded: np.ndarray, dither_key: np.uint64, stored: np.ndarray) -> bool:
        """Do answers f32 (2, C or F) within the noise of these lead to the stored logits?

        A coefficient on the edge between two steps may be rounded either way; of few coefficients that is far.
        """
        reach = _MARGIN * self._moved + float(np.spacing(np.abs(coded).max()))
        near = (coded + self._rng.uniform(-reach, reach, (_PROBES, *coded.shape))).astype(np.float32)
        dither_keys = np.full(_PROBES, dither_key)
        decoded = _centred(self._store.codec.decode(self._store.codec.encode(near, dither_keys), dither_keys))
        with np.errstate(all="ignore"):
            return bool(_rms(decoded - stored).min() <= self._near())


def _off(seen: np.ndarray) -> np.ndarray:
    """f64 (n,), by how much w differs."""
    return np.abs(seen["now"].astype(np.float64) - seen["stored"])


def _w(logits: np.ndarray) -> np.ndarray:
    """f32 (B,), as the teacher pass computes it."""
    pair = torch.from_numpy(logits).double()
    return cosine_weight(pair[:, 0], pair[:, 1]).float().numpy()


def _energy(logits: np.ndarray) -> np.ndarray:
    """f64 (B, 2)."""
    return -torch.from_numpy(logits).double().logsumexp(2).numpy()


def _centred(logits: np.ndarray) -> np.ndarray:
    """f64; some codecs keep no mean."""
    logits = logits.astype(np.float64)
    return logits - logits.mean(axis=-1, keepdims=True)


def _rms(errors: np.ndarray) -> np.ndarray:
    """(B, 2, C) -> (B,)."""
    return np.sqrt(np.square(errors).mean(axis=(1, 2)))
