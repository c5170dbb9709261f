"""Merge checkpoints."""
