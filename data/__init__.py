"""Data pipeline: sources, tokenizers, record encoding, packing and batches."""
