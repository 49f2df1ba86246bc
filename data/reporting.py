"""What a long transfer tells its user: sizes and times in words, a bar on a terminal, lines in a log otherwise."""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from common.progress import say


def amount(text: str) -> float:
    """Argument type: bytes such as 500MB, 20GB or 1.5TB (decimal units)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 500MB or 20GB")
    return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[found[2].lower()]


def gigabytes(size: float) -> str:
    """A size for people, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """What the user sees: events in ``log_path`` (None: no log) and on stdout; bytes as a bar on a terminal, else as lines."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, log_path: Path | None):
        self._file = None
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(log_path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open for the whole run
        self._lock, self._bar = threading.Lock(), None
        self._total = self._bytes = self._files = self._done = 0
        self._start = self._last = time.monotonic()

    def log(self, text: str) -> None:
        """One event: timestamped in the log, plain on stdout."""
        with self._lock:
            try:
                if self._file is not None:
                    self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            except OSError as error:
                say(f"warning: {self._file.name} cannot be written ({error.strerror}); going on without it")
                self._file = None
            say(text)

    def start(self, total: int, files: int) -> None:
        """Begin to count towards ``total`` bytes in ``files`` files."""
        self.close()
        self._total, self._files, self._start = total, files, time.monotonic()
        self._bytes = self._done = 0
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="download", dynamic_ncols=True, smoothing=0.05)

    def on_bytes(self, count: int) -> None:
        """Enter received bytes. Called from any thread."""
        with self._lock:
            self._bytes += count
            if self._bar is not None:
                self._bar.update(count)
        self._say_if_due()

    def file_done(self) -> None:
        """Enter one file that arrived, or was there and has been checked."""
        self._done += 1
        self._say_if_due()

    def _say_if_due(self) -> None:
        with self._lock:
            due = self._files and self._bar is None and time.monotonic() - self._last >= self.SECONDS_BETWEEN_LINES
            if due:
                self._last = time.monotonic()
        if due:
            self.log(self._status())

    def _status(self) -> str:
        rate = self._bytes / max(time.monotonic() - self._start, 1e-3)
        left = duration(max(0, self._total - self._bytes) / max(rate, 1.0))
        come = f"{gigabytes(self._bytes)} of {gigabytes(self._total)}"
        return f"{self._done}/{self._files} files, {come}, {gigabytes(rate)}/s, {left} left"

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
