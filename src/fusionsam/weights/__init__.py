"""Checkpoints and the weights of others."""
