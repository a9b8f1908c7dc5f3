"""Compression: each method takes a weight and a format and returns a QuantizedTensor; `apply` does a whole
model."""
