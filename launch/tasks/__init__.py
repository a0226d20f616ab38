"""What a process does: one file for each task of the command line."""
