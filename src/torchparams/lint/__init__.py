"""A linter for parameters: what is wrong with a live network, its optimizer and its gradients."""
