"""Expressions: how the tensor of a table row is computed from stored tensors."""
