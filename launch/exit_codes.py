"""What the command's exit code says."""

DONE = 0
FAILED = 1  # an error that is not the user's
WRONG_INPUT = 2
PREEMPTED = 75  # stopped by a signal after a save: start it again to go on (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130
OUTPUT_CLOSED = 141  # nobody reads the output any more, as `| head` leaves it; shells say so of SIGPIPE


def is_restartable(code: int) -> bool:
    """Preempted, or ended by a signal: below 0 as subprocess tells it, above 128 as shells do."""
    return code == PREEMPTED or code < 0 or (code > 128 and code not in (INTERRUPTED, OUTPUT_CLOSED))
