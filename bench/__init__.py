"""Benchmarks: `pipeline bench SUITE`. Nothing imports this package statically."""

import dataclasses
from importlib import import_module

from cache import UserError
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

TAKES = {
    "all": "arms batch_size data json logits out pairs rounds samples student teacher threads work",
    "claims": "arms data epochs json out policy samples seeds student teacher threads val work",
    "codec-transfer": "arms data json out samples seeds steps student teacher temperature threads val work",
    "end-to-end": "arms batch_size data json rounds student teacher work",
    "engine": "data json rounds threads work",
    "gpu-acceptance": "arms data json out work",
    "kernels": "json logits rounds",
    "loader": "arms batch_size data json pairs rounds threads work",
    "plan": "arms json out threads work",
    "store": "arms json logits out rounds samples threads work",
    "views": "arms batch_size data json pairs rounds threads work",
}
"""The options that a suite looks at; `all` hands on those of its suites."""


def run(config: Bench) -> dict:
    """Run one suite; returns what `--json` writes (`bench.harness.document`).

    Raises UserError for an option that the suite would ignore.
    """
    takes = TAKES[config.suite].split()
    for field in dataclasses.fields(config):
        if field.name not in ("suite", *takes) and getattr(config, field.name) != field.default:
            raise UserError(
                f"bench {config.suite} has no option --{field.name.replace('_', '-')}",
                found=getattr(config, field.name),
                expected=", ".join(f"--{name.replace('_', '-')}" for name in takes),
                fix="leave it out",
            )
    return import_module(MODULES[config.suite]).run(config)
