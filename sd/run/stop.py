"""Ctrl-C and SIGTERM: the first asks a run to stop after the current step, a second ends it now.

Either way the run goes on with --resume; if it was ended at once, from its last saved state.
"""
import os
import signal
from contextlib import suppress


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, obeyed; `number` is the signal's."""

    def __init__(self, number: int):
        self.number = number


class StopRequest:
    """While it is open, Ctrl-C or SIGTERM sets `number`; a second one raises Stopped at once."""

    def __enter__(self) -> "StopRequest":
        self.number = 0
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored: in a script's background job
                self.before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame) -> None:
        if self.number:
            raise Stopped(number)
        self.number = number
        with suppress(OSError):         # not print: the signal may have come within a print
            os.write(2, b"\nthe run stops after this step; a second signal ends it at once\n")
