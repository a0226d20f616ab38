"""Model architectures, decoding, adapters, quantization and published checkpoint formats."""
