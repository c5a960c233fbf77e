"""Tensor mathematics: pure functions and small value types, with shapes in their docstrings."""
