"""The distillation loss: `ccd` is what users call, `autograd` launches the kernels of `passes_gpu`."""
