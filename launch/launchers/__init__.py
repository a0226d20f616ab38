"""Where the processes of a run start: this machine, or a cluster. One module for each place."""
