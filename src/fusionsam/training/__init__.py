"""Training: the run, its two tasks, losses, callbacks, data."""
