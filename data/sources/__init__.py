"""Data sources: readers of raw documents and records."""
