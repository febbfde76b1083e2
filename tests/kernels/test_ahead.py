"""The loss kernels compiled ahead of time for GPUs that are not here: nothing spills, loads are as wide as can be."""

import re

import pytest

from bench.kernels import ahead
from bench.kernels.ahead import Case

QUICK = [
    Case(90, 10, "bf16", "int8"),
    Case(90, 1001, "bf16", "bf16", padded=True),
    Case(90, 1000, "bf16", "int8", cosine=True, masked=True),
    Case(90, 8192, "fp16", "fp16"),
    Case(90, 21841, "bf16", "int8"),
    Case(80, 1000, "fp16", "fp32"),
    Case(100, 21841, "bf16", "bf16"),
]

SPILLED = {Case(100, 21841, "bf16", "int8", cosine=True, masked=True): 24}
"""Bytes. Other orders of the same loads spill 4 to 8 bytes of commoner cases in its place: ptxas aims at a number of
registers, and misses by a few."""


def assert_good(case: Case) -> None:
    found = ahead.compile_loss(case)
    assert f".target sm_{case.arch}" in found.ptx
    assert found.spilled_bytes <= SPILLED.get(case, 0)
    assert found.load_bits == ahead.expected_bits(case)
    # Sums by atomics are of whole numbers, for the same bits every run.
    assert all(".u64" in name for name in re.findall(r"\b(?:atom|red)\.[.\w]+", found.ptx))


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_loss_kernel_compiles_to_registers_and_vectors(case):
    assert_good(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(ahead.cases()), ids=str)
def test_every_loss_kernel_compiles_to_registers_and_vectors(case):
    assert_good(case)


def test_rows_of_1000_classes_are_read_128_bits_at_a_time():
    """What `expected_bits` is about, spelled out."""
    bits = ahead.expected_bits
    assert bits(Case(90, 1000, "bf16", "fp32")) == {"student_o": 128, "teacher_o": 128}
    assert bits(Case(90, 1000, "fp16", "int8")) == {"student_o": 128, "teacher_o": 64}  # eight logits a thread
    assert bits(Case(90, 1001, "bf16", "fp32")) == {"student_o": 16, "teacher_o": 32}
    assert bits(Case(90, 1001, "bf16", "fp32", padded=True)) == {"student_o": 128, "teacher_o": 128}
    assert bits(Case(90, 21841, "bf16", "fp16")) == {"student_o": 128, "teacher_o": 128}


@pytest.mark.parametrize(
    "arch", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_codes_become_coefficients_without_spills(arch):
    assert ahead.compile_unpack(arch, 512, 112).spilled_bytes == 0
