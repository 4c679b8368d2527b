"""Runs a command, hands SIGTERM, SIGINT and SIGUSR1 on to it as SIGTERM, and writes its exit status into a file.

    python note_status.py FILE COMMAND [ARGUMENTS]

bash's `wait` for something in the background loses the status of what ends at the moment of a signal (about one time in
ten, bash 5.2); Python's does not. A command that was killed by signal n has status 128 + n, as in a shell.
"""

import signal
import subprocess
import sys
from pathlib import Path

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD}


def main() -> int:
    """Returns the status that it wrote."""
    # They wait to be asked for: a handler would not run if its signal came just before the wait for the command.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # bash has it ignored, and may itself lose a Ctrl-C in its `wait`
    child = subprocess.Popen(sys.argv[2:], preexec_fn=_hear_again)
    while child.poll() is None:
        if signal.sigwait(SIGNALS) != signal.SIGCHLD:
            child.send_signal(signal.SIGTERM)
    status = child.returncode
    status = 128 - status if status < 0 else status
    Path(sys.argv[1]).write_text(str(status))
    return status


def _hear_again() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C comes as SIGTERM
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


if __name__ == "__main__":
    sys.exit(main())
