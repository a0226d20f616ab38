"""Detects hangs, loss spikes and silent data corruption, and accounts for lost time."""
