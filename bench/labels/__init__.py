"""Codes and stores of labels, against other formats."""
