"""Checkpoints that a training run wrote in parts, each as one table: nothing of torch runs, and no process group."""
