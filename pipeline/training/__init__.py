"""The loop, its losses and checks, checkpoints, metrics and the run's page."""
