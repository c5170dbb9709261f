"""How stored tensors stand for values: which tensors hold codes, and the tensors beside them that scale these."""
