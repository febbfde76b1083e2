"""The loss kernels: timed, and counted ahead of time."""
