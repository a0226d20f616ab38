"""Tokenizers: kinds, training, saved files, and Hugging Face and GGUF formats."""
