"""Optimizers, one file each, and the parameter groups that they treat differently."""
