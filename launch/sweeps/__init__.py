"""Sweeps: what varies, which values come next, how trials run, and what is shown of them."""
