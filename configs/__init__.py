"""What a run is: one schema and a folder of YAML for each group."""
