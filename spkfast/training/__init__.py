"""Training: configuration, data order, loop, checkpoints."""
