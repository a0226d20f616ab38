"""Sequence mixers: the part of a layer that moves information between the tokens of a row."""
