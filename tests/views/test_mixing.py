"""Mixed views: what Pillow and NumPy make of them, the same whoever asks; their numbers are those of the papers.

Pixels hold for both engines of the loader, the GPU's as `support.engine` has it.
"""

import dataclasses
import hashlib
import io
import json
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.mixup
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.special import betainc
from support import engine, mixing, pillow

from cache import UserError
from pipeline import Replay
from pipeline.data.index import BadSample, Index
from pipeline.views import drawing, plan, policy
from pipeline.views import mixing as product
from pipeline.views.loader import Loader
from pipeline.views.policy import POLICIES, Erase, Mix, Policy

SEED, VIEW = 2**60 + 3, 5
MIXES = {
    "imagenet": (Mix(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.9), None),
    "cifar100": (Mix(cutmix_alpha=0.7), Erase(probability=0.6, value=77)),
    "cifar10": (None, Erase(probability=1.0, scale=(0.2, 1.0), ratio=(0.5, 3.0))),
}


@pytest.fixture(params=["cpu", "gpu"])
def decoder(request, monkeypatch) -> str:
    engine.on_the_host(monkeypatch)
    return request.param


def mixing_policy(name: str, size: int = 32) -> Policy:
    """The published policy at a small size, mixed; padded so that even an image of one pixel can be cropped."""
    mix, erase = MIXES[name]
    base = POLICIES[name].base.resized(size)
    base = base if base.pad < 0 else dataclasses.replace(base, pad=16)
    return dataclasses.replace(POLICIES[name], base=base, mix=mix, erase=erase)


def made(index: Index, policy: Policy, rows: np.ndarray, batch: int, decoder: str = "cpu", views=VIEW, **options):
    loader = Loader(index, policy, threads=2, decoder=decoder, **options)
    yield from loader.batches(plan.requests(index, policy, SEED, plan.cut(views, rows, batch)), digests=True)


@cache
def by_pillow(path: Path, name: str) -> dict[int, tuple[np.ndarray, np.ndarray, mixing.Drawn]]:
    """The views of each row, and how the augmented one was mixed."""
    index, policy = Index.open(path), mixing_policy(name)
    views = drawing.of(index.records, SEED, VIEW, policy)
    pairs = []
    for row, view in enumerate(views):
        image = Image.open(io.BytesIO(index.read(row))).convert("RGB")
        augmented = pillow.jda(image, policy.table, int(view["mask"]), int(view["signs"]))
        crops = [
            pillow.base(source, view["box"][s], bool(view["flip"][s]), policy.base.size, policy.base.pad)
            for s, source in enumerate((image, augmented))
        ]
        pairs.append([np.asarray(crop) for crop in crops])
    found = {}
    for row, (original, augmented) in enumerate(pairs):
        how = mixing.drawn(index.records, row, SEED, VIEW, policy)
        value = policy.erase.value if policy.erase else 0
        found[row] = original, mixing.applied(how, augmented, pairs[how.partner][1], value), how
    return found


@pytest.mark.parametrize("name", MIXES)
def test_mixed_pairs_equal_pillow_and_numpy(mixed, name, decoder):
    """160 pairs per policy: 0 bytes differ, the digests are of those bytes, and the labels go with them."""
    policy, expected, labels = mixing_policy(name), by_pillow(mixed.path, name), mixed.records["label"]
    seen, kinds = 0, set()
    for batch in made(mixed, policy, mixed.good, 17, decoder):
        assert (batch.mixed is None) == (policy.mix is None)
        for i, row in enumerate(batch.rows.tolist()):
            *views, how = expected[row]
            for s, view in enumerate(views):
                np.testing.assert_array_equal(batch.images[s, i].numpy(), view, f"row {row}, view {s}: {how}")
                assert batch.digests[i, s] == zlib.crc32(view.tobytes())
            if batch.mixed:
                assert batch.mixed.ratio[i].item() == pytest.approx(how.ratio, abs=1e-7)
                partner = row if how.ratio == 1 else how.partner
                assert batch.mixed.partner_target[i] == labels[partner] and batch.labels[i] == labels[row]
            kinds.add((how.share < 256, how.patch is not None, how.erase is not None))
            seen += 1
    assert seen == len(mixed) == 160
    assert len(kinds) == {"imagenet": 3, "cifar100": 2, "cifar10": 1}[name]


def test_pixels_do_not_depend_on_batch_order_company_or_the_views_of_a_decode(mixed, decoder):
    policy = mixing_policy("imagenet", 24)
    policy = dataclasses.replace(policy, erase=Erase(probability=0.5))

    def found(rows, batch, views=VIEW) -> dict:
        number = {} if isinstance(views, int) else {i: view for i, view in enumerate(views)}
        seen = {}
        for at, item in enumerate(made(mixed, policy, rows, batch, decoder, views)):
            view = number.get(at % len(number)) if number else VIEW
            assert item.mixed
            for i, row in enumerate(item.rows.tolist()):
                labels = item.mixed.partner_target[i].item(), item.mixed.ratio[i].item()
                seen[view, row] = (*item.digests[i].tolist(), *labels)
        return seen

    expected = found(mixed.good, 64)
    assert len({value[1] for value in expected.values()}) > 150
    shuffled = np.random.default_rng(0).permutation(mixed.good)
    assert found(shuffled, 7) == expected
    few = mixed.good[::9].tolist()
    assert found(mixed.good[::9], 5) == {key: value for key, value in expected.items() if key[1] in few}
    several = found(mixed.good, 33, (3, VIEW))
    assert {key: value for key, value in several.items() if key[0] == VIEW} == expected
    assert not {value[1] for key, value in several.items() if key[0] == 3} & {value[1] for value in expected.values()}


def test_ranks_and_runs_that_start_later_see_the_same(mixed):
    policy = mixing_policy("imagenet", 8)

    def seen(**changes) -> list[tuple]:
        options = {"batch_size": 24, "epochs": 2, "device": "cpu", "threads": 2, "policy": policy, "seed": 3}
        with Replay(mixed, **{**options, **changes}) as replay:
            return [
                (batch.epoch, row, zlib.crc32(image), *labels)
                for batch in replay
                for row, image, *labels in zip(
                    batch.made.rows.tolist(),
                    batch.made.augmented.numpy(),
                    batch.mixed.partner_target.tolist(),
                    batch.mixed.ratio.tolist(),
                    strict=True,
                )
            ]

    whole = seen()
    assert len(whole) == 320 and len({image for _, _, image, *_ in whole}) > 310
    assert seen(start=(1, 4)) == whole[160 + 4 * 24 :]
    assert sorted(seen(world=2, rank=0) + seen(world=2, rank=1)) == sorted(whole)
    repeated = seen(batch_size=7, repeat=2)  # whose epochs each have steps of both
    assert sorted(item[1:] for item in repeated) == sorted(item[1:] for item in whole)


@pytest.mark.parametrize("how", ["unreadable", "of another size", "undecodable"])
def test_a_sample_whose_partner_cannot_be_made_is_left_out(mixed, decoder, monkeypatch, how):
    """And no other."""
    if (how, decoder) == ("undecodable", "gpu"):
        pytest.skip("DALI's CPU decoder may crash after a bad image of a batch; test_engine has small ones")
    policy, read, records = mixing_policy("imagenet", 16), Index.read, np.array(mixed.records)
    drawn = {row: mixing.drawn(mixed.records, row, SEED, VIEW, policy) for row in mixed.good.tolist()}
    victim = next(row for row in drawn if drawn[row].ratio < 1)
    bad = drawn[victim].partner

    def failing(index, row):
        if row == bad and how == "unreadable":
            raise BadSample(f"cannot read row {row}")
        return b"\xff\xd8\xff\xdb\0\x43" if row == bad and how == "undecodable" else read(index, row)

    monkeypatch.setattr(Index, "read", failing)
    records["height"][bad] += 1000 * (how == "of another size")
    index = dataclasses.replace(mixed, records=records)
    loader = Loader(index, policy, threads=2, decoder=decoder, max_bad=1.0)
    parts = list(plan.cut(VIEW, np.setdiff1d(index.good, [bad]), 53))
    batches = list(loader.batches(plan.requests(index, policy, SEED, parts)))
    kept = [row for row in index.good.tolist() if row not in (bad, victim)]
    assert [row for batch in batches for row in batch.rows.tolist()] == kept
    targets = [target for batch in batches for target in batch.mixed.partner_target.tolist()]
    partners = [drawn[row].partner if drawn[row].ratio < 1 else row for row in kept]
    assert targets == records["label"][partners].tolist()
    assert list(loader.skipped.causes) == [bad]


def test_original_views_and_evaluation_are_never_mixed(mixed, decoder):
    policy = mixing_policy("imagenet", 16)
    plain, rows = dataclasses.replace(policy, mix=None), mixed.good[:20]
    for one, other in zip(made(mixed, policy, rows, 20), made(mixed, plain, rows, 20), strict=True):
        assert torch.equal(one.original, other.original) and not torch.equal(one.augmented, other.augmented)
    for view in (VIEW, None):
        images = [
            next(
                Loader(mixed, each, threads=1, decoder=decoder).batches(
                    plan.requests(mixed, each, SEED, [(view, rows)]), pairs=False
                )
            )
            for each in (policy, plain)
        ]
        assert images[0].images.shape == (1, 20, 16, 16, 3) and images[0].mixed is None
        assert torch.equal(images[0].images, images[1].images)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1), st.data())
def test_partners_are_a_permutation_of_the_good_rows(samples, seed, view, data):
    status = np.zeros(samples, np.uint8)
    status[data.draw(st.lists(st.integers(0, samples - 1), max_size=20))] = 2
    status[0] = 0
    good = np.flatnonzero(status == 0)
    found = product.partners(good, seed, view, status)
    assert sorted(found.tolist()) == good.tolist()
    some = data.draw(st.lists(st.sampled_from(good.tolist()), min_size=1, max_size=5))
    again = product.partners(np.array(some), seed, view, status)
    assert again.tolist() == found[np.searchsorted(good, some)].tolist()
    assert again[0] == mixing.partner(some[0], samples, seed, view, lambda at: status[at] == 0)


def test_partners_are_of_any_row_and_of_others_in_each_view():
    """10,000 draws among 1,000 rows: each partner 10 times within 6 deviations, and two rows' have no correlation."""
    status, rows = np.zeros(1000, np.uint8), np.arange(20)
    found = np.stack([product.partners(rows, 7, view, status) for view in range(500)])
    counts = np.bincount(found.ravel(), minlength=1000)
    assert abs(counts - 10).max() < 6 * 10**0.5
    assert abs(np.mean(found == rows) - 0.001) < 5 * (0.001 / 10000) ** 0.5
    assert abs(np.corrcoef(found[:, 0], found[:, 1])[0, 1]) < 5 / 500**0.5


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.4, 0.8, 1.0, 2.5, 10.0])
def test_a_table_of_beta_is_the_incomplete_beta_function(alpha):
    """By SciPy in float64, whose error is far below 2⁻³³."""
    exact = betainc(alpha, alpha, (np.arange(256) + 0.5) / 256) * 2**32
    assert np.abs(product.beta_table(alpha) - exact).max() < 0.5 + 1e-3


def test_mixes_are_the_same_for_ever():
    """Figures of the first release: a change here makes every mixed store in the world unreadable."""
    table = product.beta_table(0.8)
    assert table[[0, 1, 63, 127, 128, 255]].tolist() == GOLDEN["table"]
    records = np.zeros(1000, [("key_hash", "<u8"), ("status", "u1"), ("height", "<i4"), ("width", "<i4")])
    records["key_hash"], records["height"], records["width"] = np.arange(1000, dtype=np.uint64) * 2**54, 40, 50
    both = dataclasses.replace(POLICIES["imagenet"], mix=Mix(0.8, 1.0), erase=Erase(0.9))
    drawn = product.draw(records, np.array([0, 1, 2, 999]), 2**63 + 5, 7, both)
    for name in ("partner", "share", "patch", "ratio", "erase"):
        assert drawn[name].tolist() == GOLDEN[name], name


GOLDEN = {
    "table": [24074319, 57996558, 1188587742, 2140186939, 2154780357, 4270892977],
    "partner": [777, 269, 337, 957],
    "share": [256, 256, 31, 256],
    "patch": [[114, 0, 110, 107], [29, 29, 141, 141], [0, 0, 0, 0], [0, 37, 92, 170]],
    "ratio": [0.7654256820678711, 0.6037747263908386, 0.12109375, 0.6882972121238708],
    "erase": [[128, 87, 84, 135], [158, 56, 63, 153], [33, 32, 137, 110], [144, 9, 69, 146]],
}


def test_a_patch_is_timms(monkeypatch):
    """`timm.data.mixup.rand_bbox` for every λ and random centres, at three sizes; it takes λ for a float."""
    rng = np.random.default_rng(0)
    for size in (7, 32, 224):
        share, drawn = np.arange(257), rng.integers(0, 2**32, (257, 2), dtype=np.uint64).astype(np.uint32)
        boxes = product._patch(share, drawn, size)
        for number, centre, box in zip(share.tolist(), drawn.tolist(), boxes.tolist(), strict=True):
            places = iter(word * size >> 32 for word in centre)
            fake = SimpleNamespace(randint=lambda *_, size=None, places=places: next(places))
            monkeypatch.setattr(timm.data.mixup.np, "random", fake)
            top, bottom, left, right = timm.data.mixup.rand_bbox((size, size), number / 256)
            monkeypatch.undo()
            assert box == [top, left, bottom - top, right - left]


def test_kinds_and_shares_come_as_often_as_asked():
    """40,000 views within 4.5 deviations; λ of Mixup has Beta's mean and variance."""
    records = np.zeros(40000, [("key_hash", "<u8"), ("status", "u1"), ("height", "<i4"), ("width", "<i4")])
    records["key_hash"], records["height"], records["width"] = np.arange(40000), 40, 40
    asked = dataclasses.replace(
        POLICIES["cifar10"], mix=Mix(0.5, 1.0, probability=0.8, switch_probability=0.3), erase=Erase(0.4)
    )
    drawn = product.draw(records, np.arange(40000), 1, 2, asked)
    cut, blended = drawn["patch"][:, 2] > 0, drawn["share"] < 256
    for rate, share in ((cut | blended, 0.8), (cut, 0.24), (drawn["erase"][:, 2] > 0, 0.4)):
        # λ of nearly 1 mixes nothing: 1/512 of a uniform λ, 2 % of Beta(0.5, 0.5)
        assert -4.5 * (share / 4e4) ** 0.5 - 0.03 * share < rate.mean() - share < 4.5 * (share / 4e4) ** 0.5
    words = np.random.default_rng(0).integers(0, 2**32, 40000, dtype=np.uint64)
    shares = product._share(words, 0.5) / 256
    assert abs(shares.mean() - 0.5) < 4.5 * (0.125 / 40000) ** 0.5
    assert abs(shares.var() - 0.125) < 0.005


def test_published_policies_and_their_hashes_are_what_they_were():
    for name, expected in HASHES.items():
        config = POLICIES[name].to_config()
        assert hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16] == expected
        assert POLICIES[name].mix is POLICIES[name].erase is None


HASHES = {"imagenet": "8b5e211c9c7a3e06", "cifar10": "69828af0000371d6", "cifar100": "e8efa3eac49c410c"}


@pytest.mark.parametrize("name", MIXES)
def test_a_mixing_policy_survives_json(name):
    config = json.loads(json.dumps(mixing_policy(name).to_config()))
    assert policy.from_config(config) == mixing_policy(name)


def test_the_shipped_policy_is_deits():
    path = Path(policy.__file__).parents[1] / "recipes" / "imagenet_mixed_policy.yaml"
    shipped = policy.load(str(path))
    assert shipped == dataclasses.replace(
        POLICIES["imagenet"], name="imagenet_mixed", mix=Mix(mixup_alpha=0.8, cutmix_alpha=1.0), erase=Erase(0.25)
    )


GOOD = {"probability": 0.5, "ops": "cifar10", "base": {"size": 32}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix": {}}, "mix: nothing to mix by; fix: give mixup_alpha or cutmix_alpha, or leave mix out"),
        ({"mix": {"mixup_alpha": 0, "cutmix_alpha": 0}}, "mix: nothing to mix by"),
        ({"mix": {"mixup_alpha": 0.001}}, "mix: mixup_alpha; found 0.001, expected 0, or at least 0.01"),
        ({"mix": {"cutmix_alpha": 11}}, r"mix: cutmix_alpha; found \[11\], expected 1 number\(s\) in \[0.0, 10.0\]"),
        ({"mix": {"mixup_alpha": float("nan")}}, "mix: mixup_alpha; found"),
        ({"mix": {"mixup_alpha": True}}, "mix: mixup_alpha; found"),
        (
            {"mix": {"mixup_alpha": 1, "prob": 1}},
            "mix: unknown key prob; expected mixup_alpha, cutmix_alpha",
        ),
        ({"mix": {"mixup_alpha": 1, "probability": 2}}, "mix: probability; found"),
        ({"mix": "cutmix"}, "mix; found str, expected a mapping with mixup_alpha, cutmix_alpha"),
        ({"mix": None}, "mix; found NoneType, expected a mapping"),
        ({"erase": {"probability": -1}}, "erase: probability; found"),
        ({"erase": {"scale": [0.5, 0.1]}}, "erase: scale; found .*expected low before high"),
        ({"erase": {"ratio": [1, 50]}}, "erase: ratio; found"),
        ({"erase": {"value": 256}}, r"erase: value; found 256, expected a whole number in \[0, 255\]"),
        ({"erase": {"value": "random"}}, "erase: value; found random"),
        ({"erase": {"mode": "pixel"}}, "erase: unknown key mode"),
    ],
)
def test_a_wrong_mix_is_named(change, message):
    with pytest.raises(UserError, match=message) as caught:
        policy.from_config(GOOD | change, "mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_share_of_the_samples_cannot_be_mixed_with_the_others(mixed):
    with pytest.raises(UserError, match=r"partners of mixed views come from all samples; found few_shot 0.5"):
        Replay(mixed, policy=mixing_policy("imagenet"), batch_size=8, epochs=1, few_shot=0.5, device="cpu")
