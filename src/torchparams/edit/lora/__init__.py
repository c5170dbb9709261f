"""Fold and extract LoRA adapters."""
