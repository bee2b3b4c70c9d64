"""ONNX files, compared with PyTorch before they are kept."""
