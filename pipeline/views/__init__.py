"""Policies become boxes and operations, and those batches of views, on the CPU or a GPU."""

from pipeline.views.drawing import VIEW, draw

__all__ = ["VIEW", "draw"]
