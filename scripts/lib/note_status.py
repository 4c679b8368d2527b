"""Runs a command, hands SIGTERM on to it, and writes its exit status into a file.

    python note_status.py FILE COMMAND [ARGUMENTS]

bash's `wait` for something in the background loses the status of what ends at the moment of a signal (about one time in
ten, bash 5.2); Python's does not. A command that was killed by signal n has status 128 + n, as in a shell.
"""

import signal
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Returns the status that it wrote."""
    heard = []
    child = None

    def hand_on(number: int, frame: object) -> None:
        heard.append(number)
        if child is not None:
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    child = subprocess.Popen(sys.argv[2:])
    if heard:  # while the child was made
        child.send_signal(signal.SIGTERM)
    status = child.wait()
    status = 128 - status if status < 0 else status
    Path(sys.argv[1]).write_text(str(status))
    return status


if __name__ == "__main__":
    sys.exit(main())
