"""Attention: reference implementation, blockwise and ring attention, and accelerator kernels."""
