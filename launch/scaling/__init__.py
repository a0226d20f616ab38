"""Scaling laws: model sizes and training lengths of a scaling ladder, the fitted law and its recommendations."""
