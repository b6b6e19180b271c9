"""A run: configuration, training loop, checkpoints, results, and the files they leave."""
