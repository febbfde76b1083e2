"""Benchmarks: `pipeline bench SUITE` runs `bench/SUITE.py`. Nothing imports this package statically."""

from importlib import import_module

from pipeline.config import Bench


def run(config: Bench) -> dict:
    """Run one suite; returns what `--json` writes (`bench.harness.document`)."""
    return import_module(f"bench.{config.suite.replace('-', '_')}").run(config)
