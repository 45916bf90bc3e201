"""One loop, its engines, its checkpoints."""
