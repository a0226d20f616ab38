"""Quantized weights and 8-bit matrix products."""
