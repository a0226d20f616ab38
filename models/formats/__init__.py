"""Readers and writers of published model formats."""
