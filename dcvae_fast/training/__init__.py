"""Training: one iteration, the loop around it, checkpoints and logs."""
