"""The gate of the loss kernels' machine code: what a pair of logits may cost on sm_90, counted without a GPU.

A pair has 59 instructions before an H100 is bound by them and no longer by memory (`bench.kernels.counts`).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernels import ahead, counts
from bench.kernels.ahead import Case

ROOT = Path(__file__).parents[2]
GATE = {  # most instructions per pair, barriers per row
    Case(90, 1000, "bf16", "fp16"): (30, 1),
    Case(90, 1000, "bf16", "fp16", report="none"): (25, 1),
    Case(90, 1000, "bf16", "int8"): (34, 1),
    Case(90, 21841, "bf16", "fp16"): (40, 14),
}


def verdict(case: Case) -> tuple[float, float, int, set[int]]:
    """Instructions per pair, barriers, spilled bytes, and widths of what is read and written by the thread."""
    found = ahead.compile_loss(case)
    counted, instructions = counts.per_pair(case, found)
    tiles = case.classes / 8 / 32 / found.warps  # accesses of 8 logits by every thread
    wide = {
        bits
        for widths in (counted.loads, counted.stores)
        for bits, number in widths.items()
        if number > (2 if bits >= 64 else tiles + 4)
    }
    return instructions, counted.barriers, found.spilled_bytes, wide


@pytest.mark.parametrize("case", GATE, ids=str)
def test_a_pair_costs_no_more_than_this(case):
    instructions, barriers, spilled, wide = verdict(case)
    most, most_barriers = GATE[case]
    assert instructions <= most
    assert barriers <= most_barriers
    assert spilled == 0
    assert wide == ({64, 128} if case.teacher == "int8" else {128})


BROKEN = {
    "a one-hot in the tile": (
        *("row", "columns, g.to(", "columns, (g - tl.where(columns == label, hard, 0.0)).to("),
        Case(90, 1000, "bf16", "fp16", report="none"),
    ),
    "a mask in the loop": (
        *("long", "student + start + tile, eviction", "student + start + tile, mask=start + tile < CLASSES, eviction"),
        Case(90, 21841, "bf16", "fp16"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_the_gate_notices(name, tmp_path):
    module, old, new, case = BROKEN[name]
    for folder in ("kernels", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    path = tmp_path / "kernels" / "loss" / f"{module}.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}, {str(ROOT / 'tests' / 'kernels')!r}]\n"
        "import kernels, test_counts as gate\n"
        "from bench.kernels.ahead import Case\n"
        f"assert kernels.__file__.startswith({str(tmp_path)!r})\n"
        f"case = {case!r}\n"
        "instructions, _, _, wide = gate.verdict(case)\n"
        "assert instructions > gate.GATE[case][0] or wide != {128}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LOOP = """
.text.made:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0070*/              @!P2 EXIT ;
        /*0080*/                   LDG.E.64.STRONG.GPU R2, desc[UR6][R18.64+0x8] ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/                   BRA `(.L_x_1) ;
"""


def test_loops_are_found_by_back_edges_and_weighed():
    """Cold code behind the end jumps back and is no loop of its own; what only the last program runs is nothing."""
    found = counts.count(LOOP, (10,))
    assert found.loops == 1
    assert found.per_unit["issue"] == 2 + 10 * 6 + 2
    assert found.per_unit["fma"] == found.per_unit["mufu"] == 10
    assert found.barriers == 10
    assert found.loads[128] == 1 and not found.loads.get(64) and found.stores == {16: 1.0}


def test_a_prediction_is_arithmetic():
    counted = counts.Counts({"issue": 100.0, "mufu": 20.0}, 0.0, {}, {}, 0)
    found = counts.predicted(counted, warps=2, programs=1000, moved=3e6)
    assert found["issue"] == pytest.approx(1e6 * 100 * 2 * 32 * 1000 / (128 * 132 * 1.755e9))
    assert found["mufu"] == pytest.approx(1e6 * 20 * 2 * 32 * 1000 / (16 * 132 * 1.755e9))
    assert found["bytes"] == 1.0
