"""Encodings of quantised parameters: which tensors hold codes and scales, and how to decode them."""
