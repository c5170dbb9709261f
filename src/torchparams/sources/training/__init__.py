"""Checkpoints that a training run wrote in parts, each listed as one table; needs no torch and no process group."""
