"""The loss kernels broken on purpose: each mutation of their source must fail the named test.

Run as a script, this file is one interpreter of Triton's that has loaded PyTorch and forks a child per mutation.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # minutes

CONTROL = "nothing is broken"
SMALL = "test_every_size_meets_float64[{}-10]"
MUTATIONS = {
    CONTROL: ("ccd", "", "", SMALL),
    "the mask of a row's end is dropped": (
        *("ends", "mask=read, other=ABSENT).to(COMPUTE)", "mask=read, other=0.0).to(COMPUTE)"),
        "test_every_size_meets_float64[{}-100]",
    ),
    "T² is forgotten": (
        *("ccd", "reference.coefficients(options.temperature,", "reference.coefficients(4.0,"),
        "test_every_temperature_meets_float64[10-3.0]",
    ),
    "the tail of an odd C is lost": (
        *("autograd", "CLASSES=classes,", "CLASSES=classes // 2 * 2,"),
        "test_every_size_meets_float64[{}-257]",
    ),
    "two passes lose the last half": (
        *("long", "for start in range(whole, inner, HALF)", "for start in range(whole, inner - HALF, HALF)"),
        "test_gradients_of_rows_that_lie_apart_differently_are_scaled_alike[8201]",
    ),
    "two passes lose the edges": (
        *("long", "tl.sum(sum_p * less_p, 0) + tl.sum(e_p, 0)", "tl.sum(sum_p * less_p, 0)"),
        "test_every_size_meets_float64[{}-8193]",
    ),
    "views are swapped": ("autograd", "teacher_o=teacher_o", "teacher_o=teacher_a", SMALL),
    "w weighs the wrong view": ("autograd", "WEIGHTED=len(students) - 1", "WEIGHTED=0", SMALL),
    "w is missing from the gradient": ("ends", "b, d = soft * w *", "b, d = soft *", SMALL),
    "the cosine is of one view": ("ends", "units = t_o * by_o + t_a * by_a", "units = 2 * t_o * by_o", SMALL),
    "a stride is off by one": (
        *("autograd", "STRIDE_STUDENT_A=student_a.stride(0)", "STRIDE_STUDENT_A=student_a.stride(0) - 1"),
        "test_every_size_meets_float64[{}-2]",
    ),
    "a gradient forgets T": ("ends", "soft * w * inverse_t * scaled * by_q,", "soft * w * scaled * by_q,", SMALL),
    "the target is not in the gradient": (
        "ends",
        "element_ty), mask=wanted)",
        "element_ty), mask=wanted & (label < 0))",
        SMALL,
    ),
    "the second view's offset is a byte short": (
        *("autograd", "(16, 16 + classes)", "(16, 15 + classes)"),
        "test_rows_are_decoded_in_registers[True-int8-5]",
    ),
    "the offset is the scale, which only a cosine of raw logits can tell": (
        *(
            "ends",
            "offset_o = header_field(header, row, live, STRIDE_HEADER, 2)",
            "offset_o = header_field(header, row, live, STRIDE_HEADER, 0)",
        ),
        "test_rows_are_decoded_in_registers[False-int8-5]",
    ),
    "dead pairs count": (
        *("finish", "+ tl.sum(rest, 0)", "+ batch"),
        "test_invalid_pairs_count_for_nothing_and_are_not_read[10]",
    ),
    "dead pairs have gradients": (
        *("finish", "tl.where(live, 1.0, 0.0).to(COMPUTE)", "tl.full((), 1.0, COMPUTE)"),
        "test_invalid_pairs_count_for_nothing_and_are_not_read[10]",
    ),
    "padding is read as logits": (
        *("row", "READ_TEACHER > CLASSES or valid is not None", "valid is not None"),
        "test_padding_between_rows_is_neither_used_nor_harmed[257]",
    ),
    "nibbles are unsigned": (
        *("unpack", "(nibble ^ 8) - 8)", "nibble)"),
        "test_subspace_rows_become_float16_logits[40-24-8-3-3]",
    ),
    "the dither is that of the other view": (
        *("unpack", "words, others = philox(", "others, words = philox("),
        "test_subspace_rows_become_float16_logits[40-24-8-3-3]",
    ),
    "the difference has the wrong sign": (
        *("unpack", "first + second, first - second", "first + second, second - first"),
        "test_subspace_rows_become_float16_logits[40-24-8-3-3]",
    ),
    "old codes are taken for sums": (
        *("unpack", "if TABLES == 2", "if TABLES >= 1"),
        "test_subspace_rows_become_float16_logits[40-24-8-3-1]",
    ),
    "both segments have the first one's steps": (
        *("unpack", "table + (TABLES - 1) * DIMS", "table"),
        "test_subspace_rows_become_float16_logits[40-24-8-3-3]",
    ),
    "the mean is lost": (
        *("unpack", "tl.where(ones < 2, 1.0, 0.0)", "tl.where(ones < 0, 1.0, 0.0)"),
        "test_subspace_rows_become_float16_logits[40-24-8-3-3]",
    ),
    "nobody draws the last number": ("finish", "== programs - 1", "== programs", SMALL),
    "slots are not cleared": (
        "finish",
        "tl.zeros((_SLOTS,), tl.int64)",
        "tl.full((_SLOTS,), 1, tl.int64) << 39",
        "test_invalid_pairs_count_for_nothing_and_are_not_read[10]",
    ),
    "smoothing is not in the gradient": (
        *("ends", "hard * scaled * smoothing / CLASSES", "hard * scaled * 0 / CLASSES"),
        "test_every_size_meets_float64[{'label_smoothing': 0.1, 'temperature': 2.0}-10]",
    ),
    "dkd keeps the target among the others": (
        *("row", "tl.where(columns == label, ABSENT, z), tl.where(columns == label, ABSENT, t)", "z, t"),
        "test_a_method_meets_float64[plain-dkd-10]",
    ),
    "the reverse divergence's gradient forgets its level": (
        *("terms", "(apart_by(z2, t2) - level)", "apart_by(z2, t2)"),
        "test_a_method_meets_float64[plain-reverse-10]",
    ),
    "half of JSD is lost": (
        *("terms", "0.5 * LN_2 * (total + level)", "0.5 * LN_2 * total"),
        "test_a_method_meets_float64[plain-jsd-10]",
    ),
    "z-scores are of the student alone": (
        *("row", "scale * (by_t / by_z)", "scale / by_z"),
        "test_a_method_meets_float64[plain-standardised-10]",
    ),
    "a label that is no class passes silently": (
        *("ends", 'hard, float("nan"))', "hard, hard)"),
        "test_a_label_that_is_no_class_makes_the_gradient_nan",
    ),
    "every part has the first one's dither": (
        *("autograd", "keys[span]", "keys[: span.stop - span.start]"),
        "test_a_batch_of_more_labels_than_fit_goes_by_parts",
    ),
    "backward ignores the incoming gradient": (
        *("finish", "wanted = factor != 1.0", "wanted = False"),
        "test_an_inplace_gradient_takes_the_logits_place",
    ),
    "backward walks both gradients by the first one's distance": (
        *(
            "autograd",
            "strides = [rows.stride(0) for rows in (grads[0], grads[-1],",
            "strides = [rows.stride(0) for rows in (grads[0], grads[0],",
        ),
        "test_gradients_of_rows_that_lie_apart_differently_are_scaled_alike[41]",
    ),
}


def test_every_mutation_is_caught(tmp_path):
    """Exit 1 of pytest: a test failed. 0 were a survivor; others that it could not run."""
    for number, (name, (module, old, new, _)) in enumerate(MUTATIONS.items()):
        shutil.copytree(TESTS.parent / "kernels", tmp_path / str(number) / "kernels")
        path = tmp_path / str(number) / "kernels" / "loss" / f"{module}.py"
        source = path.read_text()
        assert old in source, name
        path.write_text(source.replace(old, new))
    child = subprocess.run(
        [sys.executable, __file__, tmp_path],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    exits = json.loads((tmp_path / "exits").read_text())
    assert exits == dict.fromkeys(MUTATIONS, 1) | {CONTROL: 0}, child.stdout[-3000:]


def file_of(test: str) -> Path:
    files = TESTS.glob("kernels/interpreted_*.py")
    return next(path for path in files if f"def {test.partition('[')[0]}(" in path.read_text())


def main(folder: Path) -> None:
    """Write the exit code of pytest by mutation."""
    import pytest
    import torch
    import triton  # noqa: F401, loaded here once

    torch.set_num_threads(1)  # before forking
    exits, running = {}, {}
    todo = list(enumerate(MUTATIONS.items()))
    while todo or running:
        if not todo or len(running) == len(os.sched_getaffinity(0)):
            child, status = os.wait()
            exits[running.pop(child)] = os.waitstatus_to_exitcode(status)
            continue
        number, (name, (*_, test)) = todo.pop()
        if (child := os.fork()) == 0:
            sys.path.insert(0, str(folder / str(number)))
            code = pytest.main(["-xq", "-m", "", "-p", "no:cacheprovider", f"{file_of(test)}::{test}"])
            sys.stdout.flush()
            os._exit(code)
        running[child] = name
    (folder / "exits").write_text(json.dumps(exits))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
