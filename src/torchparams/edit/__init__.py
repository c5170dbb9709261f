"""Edit checkpoints: plan the output, then write it."""
