"""Training core, independent of file formats, model families and clusters."""
