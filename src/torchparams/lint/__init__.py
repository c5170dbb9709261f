"""Linter for the parameters, optimizers and gradients of a live network."""
