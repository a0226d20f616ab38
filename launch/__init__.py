"""How a process, and a cluster job, starts."""
