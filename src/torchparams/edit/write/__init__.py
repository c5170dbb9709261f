"""Writing a plan to disk."""
