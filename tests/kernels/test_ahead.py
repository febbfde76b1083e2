"""The loss kernels compiled ahead of time for GPUs that are not here: nothing spills, loads are as wide as can be."""

import pytest

from bench.kernels import ahead
from bench.kernels.ahead import Case

QUICK = [
    Case(90, 10, "bf16", "int8"),
    Case(90, 257, "fp32", "fp32"),
    Case(90, 1000, "bf16", "bf16"),
    Case(90, 1000, "fp32", "int8"),
    Case(90, 1000, "fp32", "fp32", gradient=False),
    Case(90, 1001, "bf16", "bf16", padded=True),
    Case(90, 1000, "bf16", "fp32", decoded=True),
    Case(90, 21841, "bf16", "fp32", decoded=True),
    Case(90, 4096, "fp16", "fp16"),
    Case(90, 21841, "bf16", "bf16", padded=True),
    Case(90, 21841, "bf16", "int8", cosine=True, masked=True),
    Case(80, 1000, "fp16", "fp32"),
    Case(80, 21841, "fp32", "bf16"),
    Case(100, 1000, "bf16", "int8", cosine=True, masked=True),
    Case(100, 4096, "bf16", "bf16"),
]


def assert_good(case: Case, record_property) -> None:
    found = ahead.compile_loss(case)
    record_property("registers", found.registers)
    assert f".target sm_{case.arch}" in found.ptx
    assert found.spilled_bytes == 0
    assert found.load_bits == ahead.expected_bits(case)
    # Nothing is summed by them, for the same bits every run; whoever draws the last number adds up.
    assert len(found.atomics) == case.decoded and all(".u32" in name for name in found.atomics)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_loss_kernel_compiles_to_registers_and_vectors(case, record_property):
    assert_good(case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(ahead.cases()), ids=str)
def test_every_loss_kernel_compiles_to_registers_and_vectors(case, record_property):
    assert_good(case, record_property)


def test_rows_of_1000_classes_are_read_128_bits_at_a_time():
    """What `expected_bits` is about, spelled out."""
    bits = ahead.expected_bits
    assert bits(Case(90, 1000, "bf16", "fp32")) == {"student_o": 128, "teacher_o": 128}
    assert bits(Case(90, 1000, "fp16", "int8")) == {"student_o": 128, "teacher_o": 64}  # eight logits a thread
    assert bits(Case(90, 1001, "bf16", "fp32")) == {"student_o": 16, "teacher_o": 32}
    assert bits(Case(90, 1001, "bf16", "fp32", padded=True)) == {"student_o": 128, "teacher_o": 128}


@pytest.mark.parametrize("arch", [80, 90, pytest.param(100, marks=pytest.mark.slow)])
def test_decoding_compiles_to_tensor_cores_without_spills(arch):
    found = ahead.compile_decode(arch, 1000, 512, 112)
    assert found.spilled_bytes == 0
    assert found.load_bits == {"basis": 128}
    assert "mma" in found.ptx
    assert not found.atomics
