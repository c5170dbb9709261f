"""Plans: checkpoints that are described and checked before they are written."""
