"""Hugging Face checkpoints: config.json, weight names, safetensors, PEFT adapters."""
