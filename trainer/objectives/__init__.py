"""What is minimised: one file for each family of losses."""
