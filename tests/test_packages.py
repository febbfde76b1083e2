"""Our packages bear common names; nobody else's may take their place."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def answer(code: str, folder: Path) -> list:
    """What a fresh interpreter prints as JSON, run where nothing of ours lies."""
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_installed_packages_are_ours_even_after_timm(tmp_path):
    code = """
import json, timm, kernels, cache, pipeline
print(json.dumps([package.__file__ for package in (kernels, cache, pipeline)]))
"""
    expected = [str(ROOT / name / "__init__.py") for name in ("kernels", "cache", "pipeline")]
    assert answer(code, tmp_path) == expected


def test_a_cifar_network_does_not_wait_for_timm(tmp_path):
    code = """
import json, sys
from pipeline.networks import models
models.create("cifar/resnet8", 10)
print(json.dumps(["timm" in sys.modules]))
"""
    assert answer(code, tmp_path) == [False]
