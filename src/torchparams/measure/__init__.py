"""Measure parameters: statistics, differences, digests, and single tensors."""
