"""Signals ask; the loop answers between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType


class SignalRequests:
    """Notes what signals ask for.

    SIGINT, SIGTERM: save and leave; a second one leaves at once (the checkpoints on disk are whole). SIGHUP: the same when a
    terminal is lost, but under nohup save and go on. SIGUSR1: save and go on.
    ``stop``: number of the signal that asked to leave, or None. ``save``: whether to save at the next step.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False

    def install(self) -> None:
        """Take over the signals of this process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._leave)
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, self._save if under_nohup else self._leave)
        signal.signal(signal.SIGUSR1, self._save)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            os._exit(128 + number)
        self.stop = number

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save = True


def only_when_waiting() -> None:
    """Let the death of a data worker show where its batch is waited for, within five seconds.

    PyTorch also raises it from a signal handler, in the middle of whatever runs then: a step half done, weights still frozen.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
