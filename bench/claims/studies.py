"""What `bench.claims.suite` trains and compares: settings of students, and differences of their accuracies."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pipeline.training.methods import METHODS
from pipeline.views import policy as policies
from pipeline.views.policy import Policy

PLAIN, JDA = "without JDA", "with JDA"
"""What a teacher was trained on."""
FULL, ROTATE, NEAR, ONLY = "full", "rotate 30°", "near", "only "
"""Policies: as given; one operation that always fires, as some of a full policy's nearly always do; without the
operations of `FAR`; `ONLY` and the name of one operation, which fires half the time."""
FAR = ("invert", "solarize", "posterize")
"""Operations that make an image no camera would take; with them go rotations beyond 15°."""
FEW = 3
"""Seeds of what is not at the centre."""
TEMPERATURES = (1.0, 2.0, 4.0)
TIMES = (1, 3, 10)
PROBABILITIES = (0.0, 0.15, 0.3, 0.5)
SHARES = (0.25, 0.5, 0.75, 1.0)
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Setting:
    """A student but for its seed; `setting` makes them."""

    loss: str
    teacher: str = PLAIN
    policy: str = FULL
    share: float = 1.0
    """Of the training samples."""
    fraction: float = 0.5
    """Of augmented views."""
    views: int | None = None
    """Of its store, that the student takes in turn; None: one per epoch."""
    temperature: float = 4.0
    time: int = 1
    """Epochs, in those of the others."""

    @property
    def energy(self) -> bool:
        """Whether its store has to keep energies."""
        return "energy" in METHODS[self.loss].needs

    def __str__(self) -> str:
        parts = [self.loss]
        if self.teacher != PLAIN:
            parts.append(f"teacher {self.teacher}")
        if self.policy != FULL:
            parts.append(self.policy)
        if self.share != 1:
            parts.append(f"{self.share:.0%} of the data")
        if self.fraction != 0.5:
            parts.append(f"{self.fraction:.0%} augmented" if self.fraction else "originals alone")
        if self.views:
            parts.append(f"{self.views} view{'s' * (self.views > 1)}")
        if self.temperature != 4:
            parts.append(f"T = {self.temperature:g}")
        if self.time != 1:
            parts.append(f"{self.time} × the epochs")
        return ", ".join(parts)


def setting(loss: str, **changes) -> Setting:
    """The setting, or the one that is the same student under another name, so that it is trained once."""
    made = Setting(loss, **changes)
    if made.fraction == 0:
        made = dataclasses.replace(made, policy=FULL)
        if loss in ("ccd", "ccd-mean"):  # w weighs augmented views alone
            made = dataclasses.replace(made, loss="kd")
    return dataclasses.replace(made, teacher=PLAIN, temperature=4.0) if loss == "ce" else made


Contrast = tuple[tuple[Setting, float], ...]
"""Settings with their signs: what is tested is the signed sum of their accuracies, seed by seed."""


def less(one: Setting, other: Setting) -> Contrast:
    return (one, 1), (other, -1)


def more(one: Contrast, other: Contrast) -> Contrast:
    """The difference of two differences."""
    return one + tuple((which, -sign) for which, sign in other)


def mean(contrasts: Iterable[Contrast]) -> Contrast:
    every = list(contrasts)
    return tuple((which, sign / len(every)) for contrast in every for which, sign in contrast)


@dataclass(frozen=True)
class Study:
    settings: tuple[Setting, ...]
    contrasts: Mapping[str, Contrast]
    centre: bool = False
    """Whether its settings get all seeds; those of other studies get `FEW`."""


def losses() -> Study:
    names = ("ce", "kd", "ccd", "ccd-mean")
    ce, kd, ccd, fair = (setting(name) for name in names)
    contrasts = {
        "kd − ce": less(kd, ce),
        "ccd − ce": less(ccd, ce),
        "ccd − kd": less(ccd, kd),
        "ccd − ccd-mean": less(ccd, fair),
    }
    plain = {name: setting(name, fraction=0.0) for name in names}  # every kind of KD is then kd
    contrasts["kd − ce, originals alone"] = less(plain["kd"], plain["ce"])
    contrasts |= {f"{name} with JDA − originals alone": less(setting(name), plain[name]) for name in names}
    return Study(tuple(dict.fromkeys((ce, kd, ccd, fair, *plain.values()))), contrasts, centre=True)


def teacher() -> Study:
    """A teacher that was trained with JDA, against one that was not."""
    settings, contrasts, pairs = [], {}, []
    for name in ("kd", "ccd", "ccd-mean"):
        without, with_ = setting(name), setting(name, teacher=JDA)
        settings += [without, with_]
        pairs.append(less(with_, without))
        contrasts[f"{name}, teacher {JDA} − {PLAIN}"] = pairs[-1]
    contrasts[f"mean of the three, teacher {JDA} − {PLAIN}"] = mean(pairs)
    ccd, kd = setting("ccd", teacher=JDA), setting("kd", teacher=JDA)
    contrasts[f"ccd − kd, teacher {JDA}"] = less(ccd, kd)
    return Study(tuple(settings), contrasts)


def fraction() -> Study:
    made = {name: [setting(name, fraction=part) for part in FRACTIONS] for name in ("kd", "ccd")}
    contrasts = {}
    for name, settings in made.items():
        for part, mine in zip(FRACTIONS[1:], settings[1:], strict=True):
            contrasts[f"{name}, {part:.0%} − 0% augmented"] = less(mine, settings[0])
        contrasts[f"{name}, 50% − 100% augmented"] = less(settings[2], settings[-1])
    return Study(tuple(dict.fromkeys((*made["kd"], *made["ccd"]))), contrasts)


def few_shot() -> Study:
    settings, contrasts = [], {}
    gains: dict[str, list[Contrast]] = {}
    for share in SHARES:
        ce, kd, ccd = (setting(name, share=share) for name in ("ce", "kd", "ccd"))
        plain = setting("kd", share=share, fraction=0.0)
        settings += [ce, plain, kd, ccd]
        for name, contrast in (
            ("kd − ce", less(kd, ce)),
            ("ccd − ce", less(ccd, ce)),
            ("ccd − kd", less(ccd, kd)),
            ("kd with JDA − originals alone", less(kd, plain)),
        ):
            gains.setdefault(name, []).append(contrast)
    for name, found in gains.items():
        contrasts |= {f"{name}, {share:.0%} of the data": gain for share, gain in zip(SHARES, found, strict=True)}
        contrasts[f"{name}, {SHARES[0]:.0%} − 100% of the data"] = more(found[0], found[-1])
    return Study(tuple(settings), contrasts)


def policy(probability: float) -> Study:
    """`probability` is the full policy's own."""
    none, rotated, near = setting("ccd", fraction=0.0), setting("ccd", policy=ROTATE), setting("ccd", policy=NEAR)
    by_p = {p: setting("ccd", policy=FULL if p == probability else f"p = {p:g}") for p in PROBABILITIES}
    by_p[probability] = full = setting("ccd")
    crops = by_p[0.0]
    contrasts = {
        "full − originals alone": less(full, none),
        "full − two crops (p = 0)": less(full, crops),
        "full − rotation": less(full, rotated),
        "rotation − originals alone": less(rotated, none),
        "rotation − two crops (p = 0)": less(rotated, crops),
        "two crops (p = 0) − originals alone": less(crops, none),
        "near − originals alone": less(near, none),
        "near − two crops (p = 0)": less(near, crops),
        "near − full": less(near, full),
    }
    for p, mine in by_p.items():
        if 0 < p != probability:
            contrasts[f"p = {p:g} − full"] = less(mine, full)
    return Study((none, rotated, near, *(by_p[p] for p in sorted(by_p))), contrasts)


def others() -> Study:
    settings, contrasts = [], {}
    for name in ("kd", "dkd", "dist", "standardised", "dytkd", "triplet", "ida", "calibrated", "mjkd"):
        pairs, plain = setting(name), setting(name, fraction=0.0)
        settings += [plain, pairs]
        contrasts[f"{name} with JDA − originals alone"] = less(pairs, plain)
        if name != "kd":
            contrasts[f"{name} − kd, both with JDA"] = less(pairs, setting("kd"))
    return Study(tuple(settings), contrasts)


def methods() -> Study:
    """Every method of --loss that learns from stored logits, against the two that are always there."""
    kinds = {name: kind.needs for name, kind in METHODS.items()}
    names = [name for name, needs in kinds.items() if "logits" in needs and not needs & {"features", "attack"}]
    contrasts = {
        f"{name} − {reference}": less(setting(name), setting(reference))
        for reference in ("kd", "ccd")
        for name in names
        if name not in ("kd", reference)
    }
    return Study(tuple(setting(name) for name in names), contrasts)


def views(epochs: int) -> Study:
    """Few views that come again and again, against one per epoch, at equal steps."""
    settings, contrasts = [], {}
    for count in (2**k for k in range(epochs.bit_length()) if 2**k < epochs):
        pairs = []
        for name in ("kd", "ccd"):
            settings.append(few := setting(name, views=count))
            pairs.append(less(few, setting(name)))
            contrasts[f"{name}, {count} − {epochs} views"] = pairs[-1]
        contrasts[f"mean of both, {count} − {epochs} views"] = mean(pairs)
    return Study((*settings, setting("kd"), setting("ccd")), contrasts, centre=True)


def long() -> Study:
    """Does more training ask for more views?"""
    settings, pairs = [], []
    for factor in TIMES[:2]:
        one, every = setting("kd", views=1, time=factor), setting("kd", time=factor)
        settings += [one, every]
        pairs.append(less(one, every))
    contrasts = {f"kd, 1 − all views, {factor} ×": pair for factor, pair in zip(TIMES[:2], pairs, strict=True)}
    contrasts[f"kd, 1 − all views, {TIMES[1]} × − 1 ×"] = more(pairs[1], pairs[0])
    return Study(tuple(settings), contrasts)


def operations(names: Iterable[str]) -> Study:
    """Which operations of the policy help: each by itself."""
    crops = setting("ccd", policy="p = 0")
    alone = [setting("ccd", policy=ONLY + name) for name in dict.fromkeys(names)]
    contrasts = {f"{which.policy} − two crops (p = 0)": less(which, crops) for which in alone}
    return Study((crops, *alone), contrasts)


def temperature() -> Study:
    settings, contrasts = [], {}
    for name in ("kd", "ccd"):
        made = {t: setting(name, temperature=t) for t in TEMPERATURES}
        settings += made.values()
        contrasts |= {f"{name}, T = {t:g} − {4:g}": less(made[t], made[4.0]) for t in TEMPERATURES if t != 4}
    return Study(tuple(settings), contrasts)


def time() -> Study:
    """Few samples, trained for longer: does what JDA gains there grow with time?"""
    settings, contrasts, gains = [], {}, {}
    for factor in TIMES:
        plain, kd, ccd = (
            setting(loss, share=SHARES[0], time=factor, fraction=part)
            for loss, part in (("kd", 0.0), ("kd", 0.5), ("ccd", 0.5))
        )
        settings += [plain, kd, ccd]
        gains[factor] = less(kd, plain)
        contrasts[f"kd with JDA − originals alone, {factor} ×"] = gains[factor]
        contrasts[f"ccd − kd, {factor} ×"] = less(ccd, kd)
    contrasts[f"kd with JDA − originals alone, {TIMES[-1]} × − 1 ×"] = more(gains[TIMES[-1]], gains[1])
    return Study(tuple(settings), contrasts)


STUDIES: tuple[str, ...] = (
    "losses", "views", "long", "policy", "few-shot", "temperature", "teacher", "others", "methods", "fraction",
    "time", "operations",
)  # fmt: skip
"""In the order of their worth: what is cut short has whole studies."""


def studies(names: Iterable[str], policy_: Policy, epochs: int, both: bool) -> dict[str, Study]:
    """By name; `epochs` of a student, `both`: whether there is a teacher trained with JDA."""
    makes: dict[str, Callable[[], Study]] = {
        "losses": losses,
        "views": lambda: views(epochs),
        "long": long,
        "policy": lambda: policy(policy_.probability),
        "few-shot": few_shot,
        "temperature": temperature,
        "teacher": teacher,
        "others": others,
        "methods": methods,
        "fraction": fraction,
        "time": time,
        "operations": lambda: operations(op.name for op in policy_.table),
    }
    return {name: makes[name]() for name in names if both or name != "teacher"}


def seeds_of(chosen: Mapping[str, Study], seeds: int) -> dict[Setting, int]:
    """How many seeds each setting gets, in the order of the studies."""
    counts: dict[Setting, int] = {}
    for study in chosen.values():
        for which in study.settings:
            counts[which] = max(counts.get(which, 0), seeds if study.centre else min(seeds, FEW))
    return counts


def policy_of(chosen: str, full: Policy) -> Policy:
    """The policy that a setting names."""
    if chosen == FULL:
        return full
    config = full.to_config()
    ops = config["ops"]
    if chosen == ROTATE:
        changes = {"name": "rotate", "probability": 1.0, "ops": [["rotate", 30.0]]}
    elif chosen == NEAR:
        kept = [op for op in ops if op[0] not in FAR and not (op[0] == "rotate" and op[1] > 15)]
        changes = {"name": "near", "ops": kept}
    elif chosen.startswith(ONLY):
        name = chosen.removeprefix(ONLY)
        changes = {"name": name, "probability": 0.5, "ops": [op for op in ops if op[0] == name]}
    else:
        changes = {"probability": float(chosen.removeprefix("p = "))}
    return policies.from_config(config | changes)
