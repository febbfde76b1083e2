"""The claims are compared within a seed, by a test that is exact, on students that are trained once."""

import dataclasses
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch

from bench.claims import cost, processes
from bench.claims import data as trials
from bench.claims import suite as claims
from bench.claims.differences import sign_flip_p
from bench.claims.studies import (
    FULL,
    JDA,
    NEAR,
    PLAIN,
    STUDIES,
    less,
    mean,
    more,
    policy,
    policy_of,
    seeds_of,
    setting,
    studies,
)
from cache import UserError
from pipeline.config import Bench, Loss, TrainStudent
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.training import train_student
from pipeline.views.policy import POLICIES

FEATURES, ATTACKS = ("fitnet", "simkd", "crd", "vid", "ft"), ("bss", "tald")


@pytest.fixture
def options(digits, teacher, tmp_path) -> Bench:
    return Bench(
        suite="claims",
        data=digits,
        teacher=teacher,
        student="cifar/resnet8",
        policy=POLICY,
        work=tmp_path / "work",
        seeds=2,
        epochs=1,
        threads=2,
        arms="losses",
    )


@pytest.fixture
def taught(monkeypatch) -> list[TrainStudent]:
    """Students are made up, here and now; the list grows by whatever should have been trained."""
    asked = []

    def made_up(config: TrainStudent) -> dict:
        asked.append(config)
        config.out.mkdir()
        return {"val": {"top1": 0.5 + 0.1 * config.seed + 0.01 * len(config.loss), "loss": 1.0}}

    monkeypatch.setattr(train_student, "run", made_up)
    monkeypatch.setattr(processes, "workers", lambda: ThreadPoolExecutor(1))
    return asked


def test_the_test_is_fishers():
    """His example, The Design of Experiments, section 21: of Darwin's 15 pairs, 863 of 2^15 choices on one side."""
    pairs = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sign_flip_p(pairs) == 2 * 863 / 2**15
    rng = np.random.default_rng(0)
    for count in range(1, 8):
        values = rng.integers(-3, 4, count) / 3.6  # points are multiples of 1/3.6; many sums tie
        sums = [sum(np.multiply(values, signs)) for signs in itertools.product((1, -1), repeat=count)]
        expected = np.mean([abs(total) > abs(sum(values)) - 1e-6 for total in sums])
        assert sign_flip_p(values) == expected == sign_flip_p(-values)
    assert sign_flip_p([0.1, 0.2, 0.3, 0.1, 0.4]) == 2 / 2**5  # no five seeds can say more
    assert sign_flip_p([0.0, 0.0]) == 1


def test_differences_are_taken_within_a_seed():
    a, b, c, d = (setting(name) for name in ("kd", "ccd", "dkd", "dist"))
    results = {
        which: [{"top1": value / 100} for value in values]
        for which, values in ((a, (90, 80, 85)), (b, (89, 78, 82)), (c, (50, 50, 50)), (d, (50, 50, 51)))
    }
    found = claims.compared(less(b, a), results)
    assert found["seeds"] == pytest.approx([-1, -2, -3]) and found["mean"] == pytest.approx(-2)
    assert found["se"] == pytest.approx(1 / 3**0.5) and found["p"] == 0.25
    twice = claims.compared(more(less(b, a), less(c, d)), results)
    assert twice["seeds"] == pytest.approx([-1, -2, -2])
    assert claims.compared(mean([less(b, a), less(d, c)]), results)["seeds"] == pytest.approx([-0.5, -1, -1])
    results[b] = results[b][:2]  # seeds that both have
    assert claims.compared(less(b, a), results)["seeds"] == pytest.approx([-1, -2])
    one = claims.compared(less(a, b), {which: values[:1] for which, values in results.items()})
    assert one["se"] is None and one["p"] == 1


def test_the_centre_has_all_seeds_and_the_rest_three():
    chosen = studies(("few-shot", "losses"), POLICIES["cifar100"], 8, both=False)
    counts = seeds_of(chosen, 5)
    assert counts[setting("kd")] == 5 and counts[setting("kd", share=0.25)] == 3
    assert set(seeds_of(chosen, 2).values()) == {2}
    assert list(counts)[: len(chosen["few-shot"].settings)] == list(chosen["few-shot"].settings)  # as asked for
    runs = claims._in_turn(counts)
    assert len(set(runs)) == len(runs) == sum(counts.values())
    assert [seed for _, seed in runs] == [0, 1, 2] * len(counts) + [3, 4] * len(chosen["losses"].settings)


def test_a_study_compares_what_it_trains():
    for both in (True, False):
        for name, study in studies(STUDIES, POLICIES["cifar100"], 8, both).items():
            compared = {which for contrast in study.contrasts.values() for which, _ in contrast}
            assert compared == set(study.settings), name
            assert all(sum(sign for _, sign in contrast) == 0 for contrast in study.contrasts.values())
            assert len({str(which) for which in study.settings}) == len(study.settings)
            assert both or all(which.teacher == PLAIN for which in study.settings)
    # At its own probability the policy is the full one; another is a policy of its own.
    assert len(policy(0.3).settings) + 1 == len(policy(0.2).settings)


def test_a_student_takes_the_views_temperature_and_time_of_its_setting(options, taught):
    found = claims.run(dataclasses.replace(options, arms="views,temperature,time", epochs=4, seeds=1))
    runs = {
        (config.loss, config.student_views, config.temperature, config.epochs, config.few_shot) for config in taught
    }
    for loss in ("kd", "ccd"):
        assert {(loss, count, 4.0, 4, 1.0) for count in (None, 1, 2)} <= runs
        assert {(loss, None, t, 4, 1.0) for t in (1.0, 2.0, 4.0)} <= runs
        assert {(loss, None, 4.0, epochs, 0.25) for epochs in (4, 12, 40)} <= runs
    assert {config.store for config in taught} == {taught[0].store}  # whatever its views, one store
    assert cache_of(taught[0].store).temperature == 1.0
    names = [row["comparison"] for row in found["tables"]["views: differences"]]
    assert names == [f"{who}, {count} − 4 views" for count in (1, 2) for who in ("kd", "ccd", "mean of both")]


def test_a_near_policy_keeps_what_a_camera_could_see():
    names = [op.name for op in policy_of(NEAR, POLICIES["cifar10"]).table]
    assert names == [op.name for op in POLICIES["cifar10"].table if op.name not in ("invert", "solarize", "posterize")]
    alone = policy_of("only rotate", POLICIES["cifar10"])
    assert ({op.name for op in alone.table}, alone.probability) == ({"rotate"}, 0.5)
    assert policy_of(FULL, POLICIES["cifar10"]) is POLICIES["cifar10"]


def test_the_interval_is_students(tmp_path):
    """Of 1, 2, 3: mean 2, deviation 1, and t of two degrees of freedom 4.303."""
    one, other = setting("kd"), setting("ccd")
    results = {one: [{"top1": v / 100} for v in (1, 2, 3)], other: [{"top1": 0.0}] * 3}
    low, high = claims.compared(less(one, other), results)["interval"]
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), rel=1e-4)


def test_a_student_under_two_names_is_one(digits, labels, tmp_path):
    """Without augmented views nothing is weighted by w, and ce asks no teacher: down to the last bit."""
    plain = setting("kd", fraction=0.0)
    assert setting("ccd", fraction=0.0, policy="p = 0") == setting("ccd-mean", fraction=0.0) == plain
    assert setting("ce", teacher=JDA) == setting("ce") and setting("ccd", teacher=JDA) != setting("ccd")
    found = [
        train_student.run(
            TrainStudent(
                data=digits,
                val=digits,
                out=tmp_path / loss,
                store=str(labels),
                student="cifar/resnet8",
                loss=loss,
                augmented_fraction=0.0,
                epochs=1,
            )
        )
        for loss in ("kd", "ccd")
    ]
    assert found[0]["loss"] == found[1]["loss"] and found[0]["val"] == found[1]["val"]


@pytest.mark.slow  # teaches 24 students; what else it looks at has tests with made-up ones
def test_processes_teach_students_and_the_document_says_how_they_did(options, tmp_path, capsys):
    chosen = dataclasses.replace(options, json=tmp_path / "found.json", out=tmp_path / "plots")
    found = claims.run(chosen)
    assert list(found["arms"]) == ["ce", "kd", "ccd", "ccd-mean", "ce, originals alone", "kd, originals alone"]
    assert found["suite"] == "claims"
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"losses.png", "losses.svg"}
    for arm in found["arms"].values():
        # Shares of the 45 images of the val part.
        shares = np.array(arm["top1"]["seeds"]) * 45 / 100
        assert len(shares) == 2 and shares == pytest.approx(shares.round())
    loss = {name: arm["cross_entropy"]["seeds"] for name, arm in found["arms"].items()}
    assert len({tuple(values) for values in loss.values()}) == 6 and loss["kd"][0] != loss["kd"][1]
    assert [row["trained"] for row in found["tables"]["teachers"]] == ["elsewhere"]
    (store,) = found["tables"]["stores"]
    assert 0 < store["mean w"] < 2 and store["bytes per pair"] > 7
    text = capsys.readouterr().out
    assert "ccd − ccd-mean" in text and "at least 0.5" in text and "training" not in text
    work = tmp_path / "work" / "claims"
    assert not list(work.glob("student-*")) and len(json.loads((work / "students.json").read_text())) == 12

    # A process of another number of threads comes to the same: here, with one thread of torch.
    (work / "students.json").unlink()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "workers", lambda: ThreadPoolExecutor(1))
            again = claims.run(dataclasses.replace(options, threads=1, seeds=1, arms="losses"))
    finally:
        torch.set_num_threads(before)
    for name, arm in again["arms"].items():
        assert arm["cross_entropy"]["seeds"] == loss[name][:1]


def test_an_interrupted_benchmark_continues_and_shares_what_is_finished(options, taught, monkeypatch):
    made_up = train_student.run

    def broken(config: TrainStudent) -> dict:
        if len(taught) == 3:
            raise KeyboardInterrupt
        return made_up(config)

    monkeypatch.setattr(train_student, "run", broken)
    with pytest.raises(KeyboardInterrupt):
        claims.run(options)
    monkeypatch.setattr(train_student, "run", made_up)
    first = claims.run(options)
    runs = [(config.loss, config.augmented_fraction, config.seed) for config in taught]
    arms = [(loss, 0.5) for loss in ("ce", "kd", "ccd", "ccd-mean")] + [("ce", 0.0), ("kd", 0.0)]
    assert sorted(runs) == sorted((*arm, seed) for arm in arms for seed in (0, 1))  # each once
    assert claims.run(options)["arms"] == first["arms"] and len(taught) == 12

    others = claims.run(dataclasses.replace(options, arms="others,losses", seeds=3))
    kinds = {(config.loss, config.augmented_fraction, config.seed) for config in taught[12:]}
    third = {(*arm, 2) for arm in arms}
    names = ("dkd", "dist", "standardised", "dytkd", "triplet", "ida", "calibrated", "mjkd")
    new = {(loss, fraction, seed) for loss in names for fraction in (0.0, 0.5) for seed in range(3)}
    assert kinds == third | new and len(taught[12:]) == len(kinds)
    assert others["tables"]["losses"][0]["seeds"][:2] == first["tables"]["losses"][0]["seeds"]

    # Another recipe is another student.
    claims.run(dataclasses.replace(options, student="cifar/resnet14", seeds=1))
    assert len(taught) == 12 + len(kinds) + 6


def test_methods_of_stored_logits_meet_kd_and_ccd(options, taught, monkeypatch):
    """All of them but those that ask for features or a live teacher; energies are in a store of their own."""
    stores = {}
    monkeypatch.setattr(claims, "expected", lambda *_: 0.0)
    monkeypatch.setattr(processes, "trained", lambda *_: processes.Trained("cifar/resnet8@weights", "its", 0.5))
    monkeypatch.setattr(processes, "labelled", lambda config: stores.update({config.store: config.energy}) or {})
    found = claims.run(dataclasses.replace(options, arms="methods", seeds=1))
    names = [name for name in get_args(Loss) if name not in ("ce", *FEATURES, *ATTACKS)]
    assert [config.loss for config in taught] == names and {config.augmented_fraction for config in taught} == {0.5}
    rows = [row["comparison"] for row in found["tables"]["methods: differences"]]
    assert rows == [f"{name} − kd" for name in names[1:]] + [f"{name} − ccd" for name in names[2:]]
    assert sorted(stores.values()) == [False, True]
    assert all(stores[config.store] == (config.loss == "energy") for config in taught)


def test_policies_have_stores_and_teachers_weights_of_their_own(options, taught, monkeypatch):
    made = trials.trial(options)
    monkeypatch.setattr(claims, "trial", lambda config: dataclasses.replace(made, teacher_epochs=1))
    chosen = dataclasses.replace(options, teacher="cifar/resnet8", arms="teacher,policy", seeds=1)
    made = dataclasses.replace(made, teacher="cifar/resnet8")
    found = claims.run(chosen)
    stores = {store: cache_of(store) for store in {config.store for config in taught}}
    assert len(stores) == 7  # the whole policy with either teacher; rotation, near and p = 0, 0.15, 0.5 with one
    weights = {manifest.teacher_weights for manifest in stores.values()}
    assert len(weights) == 2 and {manifest.views for manifest in stores.values()} == {1}
    rotation = [manifest.policy for manifest in stores.values() if manifest.policy["name"] == "rotate"]
    assert [(policy["probability"], policy["ops"]) for policy in rotation] == [(1.0, [["rotate", 30.0]])]
    assert sorted(m.policy["probability"] for m in stores.values()) == [0.0, 0.15, 0.3, 0.3, 0.3, 0.5, 1.0]
    assert [row["trained"] for row in found["tables"]["teachers"]] == [PLAIN, JDA]
    trained = [json.loads(path.read_text()) for path in (options.work / "claims").glob("teacher-*/config.json")]
    assert sorted(config["jda"] for config in trained) == [False, True]
    differ = {key for key in trained[0] if trained[0][key] != trained[1][key]}
    assert differ == {"jda", "out"}
    assert FULL not in json.dumps([manifest.policy for manifest in stores.values()])


def test_students_learn_from_a_few_images_and_teachers_from_all(options, taught, digits):
    whole = Index.open(digits)
    found = claims.run(dataclasses.replace(options, samples=40, seeds=1))
    (path,) = {config.data for config in taught}
    few = Index.open(path)
    assert len(few) == 40 == found["options"]["samples"] and found["options"]["teacher_samples"] == len(whole)
    of_class, of_few = (np.bincount(index.records["label"], minlength=10) for index in (whole, few))
    assert np.abs(of_few - of_class * 40 / len(whole)).max() <= 0.5
    there = {whole.key(row): whole.read(row) for row in range(len(whole))}
    assert all(there[few.key(row)] == few.read(row) for row in range(len(few)))
    assert cache_of(taught[0].store).samples == 40


def test_the_time_that_is_told_is_that_of_the_views(monkeypatch):
    """A teacher with JDA, a store and two students of 100 images, 10 to validate; a view takes 3 s and 2 s."""
    trial = trials.Trial("t", "", "large", "small", POLICIES["cifar10"], None, 4, 5, 8, 0.1, 0)
    seconds = {"large": 3.0, "small": 2.0}
    monkeypatch.setattr(cost, "_view_s", lambda name, size, *_: seconds[name])
    few = setting("kd", share=0.5, time=3, fraction=0.0)
    jobs = [("teacher", JDA), ("store", PLAIN), ("student", setting("ccd"), 0), ("student", few, 0)]
    expected = 3 * (2 * 100 * 5 + 10 / 3) + 3 * 2 * 100 * 4 / 3
    expected += 2 * (2 * 100 * 4 + 10 / 3) + 2 * (50 * 4 * 3 + 10 / 3)
    assert cost.expected(jobs, trial, 100, 100, 10, 10) == pytest.approx(expected + 4 * cost._STARTS)


def test_fashion_is_taken_where_it_is_installed(monkeypatch, tmp_path):
    asked = Bench(suite="claims", work=tmp_path)
    monkeypatch.setattr(trials, "_IDX", tmp_path)
    assert trials.trial(asked).source == f"idx:{tmp_path}" and trials.trial(asked).samples == 600
    assert trials.trial(dataclasses.replace(asked, samples=6000, epochs=3)).epochs == 3
    assert trials.trial(dataclasses.replace(asked, data=tmp_path)).name == "digits"
    monkeypatch.setattr(trials, "_IDX", tmp_path / "nowhere")
    assert trials.trial(asked).name == "digits"


def test_what_is_done_first_goes_first_and_waits_for_what_it_needs():
    order, made = [], []

    def job(name, *needs, nothing=False):
        def make():
            made.append(name)
            return None if nothing else (order.append, name)

        return processes.Job(make, tuple((need,) for need in needs))

    jobs = {
        ("a",): job("a"),
        ("b",): job("b", "a"),
        ("skipped",): job("skipped", "b", nothing=True),
        ("c",): job("c", "skipped"),
        ("d",): job("d"),
    }
    with ThreadPoolExecutor(1) as pool:
        names = [name for name, _ in processes.each(pool, jobs)]
    assert set(names) == set(jobs) and sorted(order) == ["a", "b", "c", "d"]
    assert made[:2] == ["a", "d"] and order.index("a") < order.index("b") < order.index("c")


def cache_of(store: str):
    import cache

    return cache.open(store).manifest


def test_what_a_user_gets_wrong_is_an_error(options, digits):
    for change, message in (
        ({"arms": "losses,few-shots"}, "unknown arm few-shots; fix: did you mean few-shot"),
        ({"seeds": 21}, "--seeds out of range; found 21, expected 1 to 20"),
        ({"data": digits / "train"}, "has no val part"),
        ({"student": "cifar/resnet9"}, "resnet9"),
    ):
        with pytest.raises(UserError, match=message):
            claims.run(dataclasses.replace(options, **change))
