"""What was wrong with the GPU path before it met one: each fault is put back into a copy, and a test of its must fail.

The numbers are those under which the faults were found; nothing here needs a GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE, STEP = "tests/views/test_engine.py::", "tests/training/test_asynchronous.py::"
MUTATIONS = {
    "1: DALI gets its stream by name": (
        "pipeline/data/dali.py",
        "self._pipeline.outputs(stream)",
        "self._pipeline.run(cuda_stream=stream)",
        ENGINE + "test_what_is_asked_of_dali_and_cuda[gpu-engines0]",
    ),
    "2: the static executor gets a stream": (
        "pipeline/data/dali.py",
        "            exec_dynamic=True,",
        "            exec_dynamic=False,",
        ENGINE + "test_what_is_asked_of_dali_and_cuda[gpu-engines0]",
    ),
    "3: the static executor writes over a batch that is held": (
        "pipeline/data/dali.py",
        "            exec_dynamic=True,",
        "            exec_dynamic=False,",
        ENGINE + "test_an_image_decoded_in_the_background_keeps_its_memory",
    ),
    "3: memory is given up before its event": (
        "pipeline/views/on_gpu.py",
        "[held, work.encoded]",
        "[]",
        ENGINE + "test_without_digests_no_pixel_leaves_the_gpu",
    ),
    "4: DALI is imported with the teacher pass": (
        "pipeline/labels/precompute.py",
        "import cache\nfrom cache",
        "import nvidia.dali\nimport cache\nfrom cache",
        ENGINE + "test_all_but_decoding_works_without_dali",
    ),
    "5: images are read a pixel too far": (
        "pipeline/views/on_gpu.py",
        "                    addresses[kept],",
        "                    addresses[kept] + 3,",
        "tests/views/test_loader.py::test_whole_pairs_equal_pillow[gpu-cifar10]",
    ),
    "6: an undecodable image ends the run": (
        "pipeline/views/on_gpu.py",
        "            said = dali.cause(error)",
        '            raise UserError("the GPU cannot decode a batch") from None',
        ENGINE + "test_an_undecodable_image_is_skipped_by_name_and_harms_no_other[gpu]",
    ),
    "6: a wrong size is an assertion": (
        "pipeline/views/on_gpu.py",
        "        for i in wrong:\n",
        "        assert not wrong\n        for i in wrong:\n",
        "tests/views/test_loader.py::test_an_image_of_another_size_than_indexed_never_reaches_the_kernel[gpu]",
    ),
    "7: pixels go to pageable memory": (
        "pipeline/views/on_gpu.py",
        "torch.empty(images.shape, dtype=images.dtype, pin_memory=True).copy_(images, non_blocking=True)",
        "images.cpu()",
        ENGINE + "test_what_is_asked_of_dali_and_cuda[gpu-engines0]",
    ),
    "8: one stride walks both gradients": (
        "kernels/loss/autograd.py",
        "strides = [rows.stride(0) for rows in (grads[0], grads[-1],",
        "strides = [rows.stride(0) for rows in (grads[0], grads[0],",
        "tests/kernels/interpreted_autograd.py::test_gradients_of_rows_that_lie_apart_differently_are_scaled_alike[8201]",
    ),
    "9: a verdict that cannot be met": (
        "bench/gpu_acceptance.py",
        '"1024×1000": "≤ 2"}',
        '"1024×1000": "≤ 2", "1024×100": "≤ 2"}',
        "tests/bench/test_gpu_verdicts.py::test_kernels_are_held_against_floor_compile_and_eager",
    ),
    "9: limits beyond the budget": (
        "bench/gpu_acceptance.py",
        "(*tests, *how), 120, report",
        "(*tests, *how), 420, report",
        "tests/bench/test_gpu_acceptance.py::test_every_command_is_one_that_the_command_line_takes",
    ),
    "10: a lap waits for all streams": (
        "pipeline/training/meter.py",
        "torch.cuda.current_stream(self.device).synchronize()",
        "torch.cuda.synchronize(self.device)",
        STEP + "test_a_lap_waits_for_the_stream_in_use_alone",
    ),
    "11: labels by a blocking copy": (
        "pipeline/training/objectives.py",
        "target = devices.put(target if some.all() else target[torch.from_numpy(np.flatnonzero(some))], device)",
        "target = (target if some.all() else target[torch.from_numpy(np.flatnonzero(some))]).to(device)",
        STEP + "test_no_step_waits_for_the_gpu",
    ),
    "11: labels from pageable memory": (
        "pipeline/system/device.py",
        "        values = values.pin_memory()\n",
        "        pass\n",
        STEP + "test_no_step_waits_for_the_gpu",
    ),
    "12: the hardware engine idles": (
        "pipeline/system/device.py",
        'return "gpu-hw" if has_jpeg_engine',
        'return "gpu" if has_jpeg_engine',
        STEP + "test_the_hardware_engine_decodes_where_there_is_one",
    ),
    "13: a plane is copied from pageable memory": (
        "pipeline/labels/epochs.py",
        "encoded = encoded.pin_memory()",
        "pass",
        STEP + "test_a_plane_is_page_locked_before_it_is_copied_from",
    ),
    "14: a teacher computes in fp32": (
        "pipeline/system/device.py",
        'return "bf16" if device.type',
        'return "fp32" if device.type',
        STEP + "test_a_gpu_computes_in_bf16_where_it_can",
    ),
    "--compile is ignored": (
        "pipeline/networks/teacher.py",
        "        if compile:\n",
        "        if False:\n",
        STEP + "test_the_teacher_answers_by_the_compiled_network",
    ),
    "a batch is planned before the next one is fed": (
        "pipeline/views/on_gpu.py",
        "                if len(engine.scheduled) == dali.DEPTH:\n",
        "                if len(engine.scheduled) == 1:\n",
        ENGINE + "test_a_batch_is_decoded_while_the_one_before_it_is_planned",
    ),
    "DALI pins the threads of all ranks to the same cores": (
        "pipeline/data/dali.py",
        "set_affinity=False",
        "set_affinity=True",
        ENGINE + "test_what_is_asked_of_dali_and_cuda[gpu-engines0]",
    ),
    "a batch is not kept for the reader's stream": (
        "pipeline/views/loader.py",
        "item.images.record_stream(torch.cuda.current_stream(item.images.device))",
        "pass",
        ENGINE + "test_memory_of_a_batch_waits_for_the_stream_that_it_is_handed_to",
    ),
    "DALI copies all bytes": (
        "pipeline/data/dali.py",
        "            no_copy=True,",
        "            no_copy=False,",
        ENGINE + "test_what_is_asked_of_dali_and_cuda[gpu-engines0]",
    ),
}
"""Fault -> file, text, text with the fault, the test that finds it."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_put_back_is_found(fault, tmp_path):
    """Exit 1 of pytest: a test failed. 0 were a survivor; others that it could not run."""
    file, old, new, test = MUTATIONS[fault]
    for name in ("bench", "cache", "kernels", "pipeline", "tests", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    source = (ROOT / file).read_text()
    assert source.count(old) == 1, f"{file} has no such text any more"
    (tmp_path / file).write_text(source.replace(old, new))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'tests'}"}
    if "interpreted" in test:
        environment["TRITON_INTERPRET"] = "1"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1, child.stdout[-3000:] + child.stderr[-1000:]
