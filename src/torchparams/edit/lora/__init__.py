"""Folding and extracting LoRA adapters."""
