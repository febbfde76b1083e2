"""What a GPU machine has found is held against the targets as stated, and a CPU's figures against none."""

import pytest

from bench.gpu_acceptance import verdicts


def judged(tables: dict, gpu: bool = True) -> dict[str, tuple]:
    """(target, found, met) by claim."""
    rows = verdicts({"parts": []} | tables, gpu)
    assert len({row["claim"] for row in rows}) == len(rows)
    return {row["claim"]: (row["target"], row["found"], row["met"]) for row in rows}


def test_decoders_are_held_to_the_cpus_pixels_and_to_dali_alone():
    rows = [
        {"decoder": "gpu", "differing bytes": 0, "one bad image": "skipped"},
        {"decoder": "gpu-hw", "differing bytes": 3, "one bad image": "harmed others"},
    ]
    rates = {"loader, gpu": 9.0, "DALI alone, gpu": 10.0, "loader, gpu-hw": 8.9, "DALI alone, gpu-hw": 10.0}
    found = judged({"decoders": rows, "decoding": [{"arm": arm, "per second": rate} for arm, rate in rates.items()]})
    met = {claim: verdict[2] for claim, verdict in found.items() if claim.startswith("gpu")}
    assert met == {
        "gpu: bytes unlike the CPU's pixel kernel": "yes",
        "gpu: a bad image harms others": "yes",
        "gpu: loader / DALI alone": "yes",
        "gpu-hw: bytes unlike the CPU's pixel kernel": "no",
        "gpu-hw: a bad image harms others": "no",
        "gpu-hw: loader / DALI alone": "no",
        "gpu-both: bytes unlike the CPU's pixel kernel": "not measured",
        "gpu-both: a bad image harms others": "not measured",
    }


def row(size: str, arm: str, called: float, replayed: float, cold: float | None, peak: float) -> dict:
    times = {"called µs": called, "replayed µs": replayed} | ({} if cold is None else {"replayed cold µs": cold})
    return {"size": size, "arm": arm, **times, "floor µs": 100.0, "peak / gradient": peak}


def test_kernels_are_held_against_floor_compile_and_eager():
    rows = [
        row("4096×21841", "ours dense", 200.0, 100.0, 118.0, 1.02),
        row("4096×21841", "ours int8", 200.0, 100.0, 119.0, 1.03),
        row("4096×21841", "compile", 300.0, 149.0, 150.0, 2.0),
        row("4096×21841", "compile int8", 290.0, 151.0, 150.0, 2.0),
        row("4096×21841", "eager", 1999.0, 1000.0, 150.0, 3.0),
        row("1024×1000", "ours dense", 200.0, 100.0, 199.0, 1.0),
        row("4096×1000", "ours dense", 200.0, 100.0, None, 1.0),
    ]
    found = judged({"kernels": rows})
    assert found["4096×21841 dense / floor, replayed cold"] == ("≤ 1.18", 1.18, "yes")
    assert found["4096×21841 int8 / floor, replayed cold"] == ("≤ 1.18", 1.19, "no")
    assert found["1024×1000 dense / floor, replayed cold"] == ("≤ 2", 1.99, "yes")
    assert found["4096×1000 dense / floor, replayed cold"] == ("≤ 2", None, "not measured")
    assert found["1024×1000 int8 / floor, replayed cold"] == ("≤ 2", None, "not measured")
    assert found["compile / 4096×21841 dense, called"] == ("≥ 1.5", 1.5, "yes")
    assert found["compile / 4096×21841 dense, replayed"] == ("≥ 1.5", 1.49, "no")
    assert found["compile / 4096×21841 int8, called"] == ("≥ 1.5", 1.45, "no")
    assert found["compile / 4096×21841 int8, replayed"] == ("≥ 1.5", 1.51, "yes")
    assert found["eager / 4096×21841 dense, called"] == ("≥ 10", 9.995, "no")
    assert found["eager / 4096×21841 dense, replayed"] == ("≥ 10", 10.0, "yes")
    assert found["4096×21841 dense, peak memory / gradient"] == ("≤ 1.02", 1.02, "yes")
    assert found["4096×21841 int8, peak memory / gradient"] == ("≤ 1.02", 1.03, "no")
    assert not any(claim.startswith("1024×100 ") for claim in found)  # its parts weigh as its gradient


@pytest.mark.parametrize(("ratio", "met"), [(1.05, "yes"), (1.051, "no")])
def test_stored_labels_are_held_against_cross_entropy(ratio, met):
    steps = [{"arm": "stored", "× ce": ratio}, {"arm": "live", "× ce": 1.4}]
    found = judged({"end-to-end": steps})
    assert found["step, stored / ce"] == ("≤ 1.05", ratio, met) and found["step, live / ce"] == ("–", 1.4, "–")
    assert judged({})["step, stored / ce"] == ("≤ 1.05", None, "not measured")


@pytest.mark.parametrize(
    ("wait_ms", "loader", "met"),
    [
        (0.0, None, "yes"),
        (2.0, 1000.0, "yes"),
        (5.0, 3000.0, "no"),  # a student that never waits takes 256 pairs in 95 ms: 2,695 pairs/s
        (5.0, 2600.0, "does not apply"),
        (5.0, None, "not measured"),
        (None, 3000.0, "not measured"),
    ],
)
def test_waiting_is_judged_where_the_loader_is_the_faster(wait_ms, loader, met):
    step = {"arm": "loaded", "ms/step": 100.0, "pairs/s": 2560.0} | ({} if wait_ms is None else {"wait ms": wait_ms})
    decoding = [{"arm": "DALI alone, gpu", "per second": 9e9}, {"arm": "loader, cpu", "per second": 9e9}]
    if loader:
        decoding.append({"arm": "loader, gpu", "per second": loader})
    found = judged({"waiting": [step], "decoding": decoding if loader else []})
    assert found["waiting, % of a step"] == ("≤ 2", wait_ms, met)
    if loader and wait_ms == 5.0:
        assert found["pairs/s, loader / student"][1] == pytest.approx(loader * 0.095 / 256)


@pytest.mark.parametrize(
    ("counts", "ok", "met"),
    [
        ({"passed": 94, "failed": 0, "skipped": 0}, "yes", "yes"),
        ({"passed": 92, "failed": 2, "skipped": 0}, "no", "no"),
        ({"passed": 40, "failed": 0, "skipped": 0}, "no", "not measured"),  # cut off
        ({"passed": 0, "failed": 0, "skipped": 94}, "yes", "not measured"),
        ({"collected": 94}, "yes", "not measured"),
    ],
)
def test_tests_must_all_have_run(counts, ok, met):
    found = judged({"tests": [counts], "parts": [{"part": "tests", "ok": ok}]})
    assert found["tests marked gpu that fail"][2] == met


def test_no_target_is_held_against_a_machine_without_a_gpu():
    found = judged({"end-to-end": [{"arm": "stored", "× ce": 1.0}]}, gpu=False)
    assert found["step, stored / ce"] == ("≤ 1.05", 1.0, "not measured")
    assert {met for _, _, met in found.values()} == {"not measured"}
