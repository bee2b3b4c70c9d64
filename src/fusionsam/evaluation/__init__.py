"""Evaluation: scores, comparisons, robustness, calibration, tables."""
