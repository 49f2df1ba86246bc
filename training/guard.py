"""What a run does when the disk is full or its numbers are no longer numbers."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from common.errors import UserError
from training import checkpoint

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SECONDS_BETWEEN_TRIES = 60.0
TRIES = 30


class DivergedError(Exception):
    """A loss or a weight is NaN or infinite."""


def save_patiently(path: Path, state: dict, keep: int, say: Callable[[str], None], asked_to_stop: Callable[[], bool]) -> None:
    """``checkpoint.save``; while the disk is full: remove numbered checkpoints beyond the newest ``keep``, wait, try again.

    Raises UserError after TRIES or when asked to stop. ``path`` holds the previous checkpoint until the new one is whole.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return checkpoint.save(path, state)
        except OSError as error:
            if error.errno not in FULL:
                raise
        checkpoint.prune(path.parent, keep)
        free = shutil.disk_usage(path.parent).free / 1e6
        say(
            f"warning: the disk is full, {path} could not be written ({free:.0f} MB free); training waits and tries again "
            f"in {SECONDS_BETWEEN_TRIES:.0f} s ({attempt} of {TRIES})"
        )
        end = time.monotonic() + SECONDS_BETWEEN_TRIES
        while time.monotonic() < end and not asked_to_stop():
            time.sleep(min(0.2, SECONDS_BETWEEN_TRIES))
        if asked_to_stop():
            break
    last = f"the last whole checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
    raise UserError(
        f"the disk that holds {path.parent} is full; free some space there (old epoch_*.pt) and go on with --resume; {last}"
    )


def check_finite(state: dict, networks: Iterable[str] = ("generator", "discriminator", "ema")) -> None:
    """Raise DivergedError when a weight of one of ``networks`` in ``state`` is NaN or infinite, so that nothing rests on it."""
    for network in networks:
        for name, value in state[network].items():
            if torch.is_tensor(value) and value.is_floating_point() and not torch.isfinite(value).all():
                raise DivergedError(f"{network} {name} holds NaN or infinity")
