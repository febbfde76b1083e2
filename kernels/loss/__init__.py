"""Distillation losses: `ccd` and `kd` are what users call, `autograd` launches the kernels of `row` and `long`."""
