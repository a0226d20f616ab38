"""Exit codes of the command."""

DONE = 0
FAILED = 1  # an internal or runtime error
WRONG_INPUT = 2  # invalid config, command line or input file
PREEMPTED = 75  # stopped by a signal after saving a checkpoint: restart to resume (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130
OUTPUT_CLOSED = 141  # the reader closed the output pipe, as `| head` does; 128 + SIGPIPE


def is_restartable(code: int) -> bool:
    """Returns whether the process was preempted or killed by a signal: < 0 from subprocess, > 128 from shells."""
    return code == PREEMPTED or code < 0 or (code > 128 and code not in (INTERRUPTED, OUTPUT_CLOSED))
