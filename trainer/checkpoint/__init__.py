"""Checkpointing: local and remote checkpoints, checksums, multi-process commit barrier."""
