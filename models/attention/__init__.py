"""Attention: reference operations, blockwise and ring attention, kernels, and the module."""
