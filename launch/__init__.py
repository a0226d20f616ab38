"""Entry points: the command line, tasks, launchers, planning, sweeps and serving."""
