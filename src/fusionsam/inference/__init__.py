"""Prediction: one pair, many files, films, ONNX Runtime."""
