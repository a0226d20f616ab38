"""GGUF: metadata and tensor files."""
