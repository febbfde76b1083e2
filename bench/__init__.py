"""Benchmarks: `pipeline bench SUITE`. Nothing imports this package statically."""

from importlib import import_module

from pipeline.config import Bench

MODULES = {
    "all": "bench.whole.all",
    "claims": "bench.claims.suite",
    "codec-transfer": "bench.labels.codec_transfer",
    "end-to-end": "bench.whole.end_to_end",
    "engine": "bench.loader.engine",
    "gpu-acceptance": "bench.gpu_acceptance",
    "kernels": "bench.kernels.suite",
    "loader": "bench.loader.suite",
    "plan": "bench.whole.plan",
    "store": "bench.labels.store",
    "views": "bench.loader.views",
}


def run(config: Bench) -> dict:
    """Run one suite; returns what `--json` writes (`bench.harness.document`)."""
    return import_module(MODULES[config.suite]).run(config)
