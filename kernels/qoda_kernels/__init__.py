"""Quantization kernels: numbers in, bytes out."""

__version__ = "0.1.0"
