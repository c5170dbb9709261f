"""Writing checkpoints: plans of what is to be written, and how it gets to the disk."""
