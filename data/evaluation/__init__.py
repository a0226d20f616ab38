"""Evaluation data: multiple-choice questions."""
