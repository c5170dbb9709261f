"""The live model: what is set, grouped, filled and read while it is trained."""
