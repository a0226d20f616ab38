"""Saves and restores runs: local and remote checkpoints, checksums, the commit barrier."""
