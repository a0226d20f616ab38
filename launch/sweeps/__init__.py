"""Hyperparameter sweeps: search space, Optuna study, trial execution and progress display."""
