"""Drawn street scenes with labels."""
