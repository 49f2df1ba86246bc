"""Progress for people: a bar on a terminal, plain timestamped lines under nohup or in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

# Made now and not with the first line: a signal in the middle of making it would end in an error of tqdm's.
tqdm.get_lock()

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


_listeners: list[Callable[[str], None]] = []


def say(text: str) -> None:
    """Tell people something: ``show`` it, and tell whoever listens."""
    show(text)
    for listener in _listeners:
        listener(text)


@contextmanager
def overheard(listener: Callable[[str], None]) -> Iterator[None]:
    """Let ``listener`` hear what is said meanwhile in this process, but not how far things are."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def show(text: str) -> None:
    """Print one line to stdout at once, without tearing a bar that is on the terminal."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def track(items: Iterable[Item], what: str, total: int | None = None, unit: str = "") -> Iterator[Item]:
    """Yield ``items`` and show how far it is: a bar on a terminal, else a line about every ten seconds and at the end."""
    if total is None:
        total = len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, unit=f" {unit}" if unit else "it", dynamic_ncols=True)
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            seconds = now - start
            # The first few items pay for starting up and would promise hours.
            left = f", about {seconds / done * (total - done):.0f} s left" if 20 * done >= total and done < total else ""
            show(f"{time.strftime('%H:%M:%S')} {what}: {done}/{total} {unit} in {seconds:.0f} s{left}")
