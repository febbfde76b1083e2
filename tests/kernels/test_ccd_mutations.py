"""The loss kernels broken on purpose: each mutation of their source must fail the named test of `interpreted_ccd.py`.

Run as a script, this file is one interpreter of Triton's that has loaded PyTorch and forks a child per mutation.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]

CONTROL = "nothing is broken"
MUTATIONS = {
    CONTROL: (*("ccd", "", ""), "test_every_size_meets_float64[{}-10]"),
    "the mask of a row's end is dropped": (
        *("terms_gpu", "z = tl.where(inside, z, _ABSENT)\n", "z = z\n"),
        "test_every_size_meets_float64[{}-100]",
    ),
    "T² is forgotten": (
        *("ccd", "reference.coefficients(options.temperature,", "reference.coefficients(4.0,"),
        "test_every_temperature_meets_float64[10-3.0]",
    ),
    "the tail of an odd C is lost": (
        *("fused", "CLASSES=classes,", "CLASSES=classes // 2 * 2,"),
        "test_every_size_meets_float64[{}-1001]",
    ),
    "two passes lose the last tile": (
        *("terms_gpu", "for start in range(0, CLASSES, BLOCK):", "for start in range(0, CLASSES - BLOCK, BLOCK):"),
        "test_every_size_meets_float64[{}-5000]",
    ),
    "the cosine is of log-probabilities": (
        *(
            "ccd_gpu",
            "o = tl.where(inside, t_o, 0.0)",
            "o = tl.where(inside, t_o - tl.log(tl.sum(tl.exp(t_o), 1)), 0.0)",
        ),
        "test_every_size_meets_float64[{}-257]",
    ),
    "views are swapped": (
        *("fused", "teacher_o=teacher_o", "teacher_o=teacher_a"),
        "test_every_size_meets_float64[{}-10]",
    ),
    "w weighs the wrong view": (
        *("ccd_gpu", "soft * (kl_o + w * kl_a)", "soft * (w * kl_o + kl_a)"),
        "test_every_size_meets_float64[{}-10]",
    ),
    "w is missing from the gradient": (
        *("ccd_gpu", "by_t * w * soft_a", "by_t * soft_a"),
        "test_every_size_meets_float64[{}-10]",
    ),
    "a stride is off by one": (
        *("fused", "STRIDE_STUDENT_A=student_a.stride(0)", "STRIDE_STUDENT_A=student_a.stride(0) - 1"),
        "test_every_size_meets_float64[{}-257]",
    ),
    "a gradient forgets T": (
        *("ccd_gpu", "by_t = soft * inverse_t", "by_t = soft"),
        "test_every_size_meets_float64[{}-10]",
    ),
    "the second view's offset is a byte short": (
        *("fused", "(16, 16 + classes)", "(16, 15 + classes)"),
        "test_rows_are_decoded_in_registers[True-int8-100]",
    ),
    "the offset is the scale, which only a cosine of raw logits can tell": (
        *("terms_gpu", "2 + VIEW)", "VIEW)"),
        "test_rows_are_decoded_in_registers[False-int8-100]",
    ),
    "dead pairs count": (
        *("ccd", "counted = options.count is None and options.valid is not None", "counted = False"),
        "test_invalid_pairs_count_for_nothing_and_are_not_read[10]",
    ),
    "pairs beyond the first tile of the mask are not counted": (
        *(
            "terms_gpu",
            "for start in range(0, batch, BLOCK):\n                at",
            "for start in range(0, 1):\n                at",
        ),
        "test_the_valid_pairs_of_a_large_batch_are_counted",
    ),
    "dead pairs have gradients": (
        *("ccd_gpu", "inside = (columns < CLASSES) & live", "inside = (columns < CLASSES) & here"),
        "test_invalid_pairs_count_for_nothing_and_are_not_read[10]",
    ),
    "padding is read as logits": (
        *("terms_gpu", "inside = (columns < CLASSES) & live", "inside = (columns < READ_STUDENT) & live"),
        "test_padding_between_rows_is_neither_used_nor_harmed[4101]",
    ),
    "nibbles are unsigned": (
        *("labels_gpu", "(nibble ^ 8) - 8)", "nibble)"),
        "test_subspace_rows_are_decoded_by_a_product[40-24-8-40]",
    ),
    "the dither is that of the other view": (
        *("labels_gpu", "number // 2, (number % 2)", "number // 2, (1 - number % 2)"),
        "test_subspace_rows_are_decoded_by_a_product[40-24-8-40]",
    ),
    "the fine half of a coefficient is lost": (
        *("labels_gpu", "sums = tl.dot(fine, directions, sums)", "sums = sums"),
        "test_subspace_rows_are_decoded_by_a_product[40-24-8-40]",
    ),
    "nobody draws the last number": (
        *("terms_gpu", "== tl.num_programs(0) - 1", "== tl.num_programs(0)"),
        "test_subspace_rows_are_decoded_by_a_product[40-24-8-40]",
    ),
    "the ticket starts at one": (
        *("labels_gpu", "tl.store(ticket, 0,", "tl.store(ticket, 1,"),
        "test_subspace_rows_are_decoded_by_a_product[40-24-8-40]",
    ),
    "smoothing is not in the gradient": (
        *("terms_gpu", "hard = hard + smoothing *", "hard = hard + 0 *"),
        "test_every_size_meets_float64[{'label_smoothing': 0.1, 'temperature': 2.0}-10]",
    ),
    "backward ignores the incoming gradient": (
        *("ccd_gpu", "wanted = factor != 1.0", "wanted = False"),
        "test_an_inplace_gradient_takes_the_logits_place",
    ),
}


def test_every_mutation_is_caught(tmp_path):
    """Exit 1 of pytest: a test failed. 0 were a survivor; others that it could not run."""
    for number, (name, (module, old, new, _)) in enumerate(MUTATIONS.items()):
        shutil.copytree(TESTS.parent / "kernels", tmp_path / str(number) / "kernels")
        path = tmp_path / str(number) / "kernels" / f"{module}.py"
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
            code = pytest.main(["-xq", "-p", "no:cacheprovider", f"{TESTS / 'kernels' / 'interpreted_ccd.py'}::{test}"])
            sys.stdout.flush()
            os._exit(code)
        running[child] = name
    (folder / "exits").write_text(json.dumps(exits))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
