"""The training loop and what keeps it safe: optimiser, checkpoints, run folder, signals. Knows no method."""
