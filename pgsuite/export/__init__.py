"""Policies as ONNX and torch.export files."""
