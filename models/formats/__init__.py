"""Reads and writes published model formats."""
