"""Estimates memory, communication, step time and cost of a run before it is started."""
