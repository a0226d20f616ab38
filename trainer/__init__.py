"""The gradient core: knows no file format, no model family, no cluster."""
