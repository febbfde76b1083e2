"""Triton's interpreter, for tests that run in processes of their own."""

WARNS = "-W", "ignore:Conversion of an array:DeprecationWarning"
"""For pytest: that of triton 3.6 takes numbers out of arrays in a way that NumPy has deprecated."""
