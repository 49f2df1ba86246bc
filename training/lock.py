"""One run a folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.files import take_lock, write_text
from common.progress import say
from training import checkpoint

OWNER = ".run"  # in a log folder: the way from there to the run's checkpoints


class OccupiedError(UserError):
    """The folders belong to another run."""


def lock_folder(folder: Path) -> TextIO:
    """Hold ``folder`` for this process until it ends, however it ends; keep the returned file open.

    The kernel releases the lock with the process, so a stale one cannot exist. Raises OccupiedError naming who holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 held open for the life of the run
    try:
        taken = take_lock(file)
    except OSError as error:
        say(f"note: the file system of {folder} has no locks ({error}); do not start a second run there")
        return file
    if not taken:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise OccupiedError(f"{folder} is in use by {holder}; stop it or choose another --run_name")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


@contextlib.contextmanager
def folders_of_a_run(folder: Path, log_folder: Path) -> Iterator[None]:
    """Hold the folders of checkpoints and of the log for a run. Raises OccupiedError where either is another's."""
    with contextlib.ExitStack() as stack:
        for each in dict.fromkeys(path.resolve() for path in (folder, log_folder)):
            stack.enter_context(lock_folder(each))
        _claim(log_folder, folder)
        yield


def _claim(log_folder: Path, folder: Path) -> None:
    """Write down in the log folder where its run's checkpoints are: relative, so that both can be moved or copied together."""
    path, way = log_folder / OWNER, os.path.relpath(folder.resolve(), log_folder.resolve())
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        other = path.read_text(encoding="utf-8").strip()
        if other != way and checkpoint.all_in(log_folder.resolve() / other):
            raise OccupiedError(
                f"{log_folder} holds the log of the run whose checkpoints are in {os.path.normpath(log_folder / other)}; name this "
                "run's own with --log_dir, or choose a --run_name NAME"
            )
        if other == way:
            return
    with contextlib.suppress(OSError):  # a full disk costs no training
        write_text(path, f"{way}\n")
