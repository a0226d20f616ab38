"""Tokenizers: kinds, training, and published formats."""
