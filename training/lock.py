"""One run a folder."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.files import remove_leftovers, take_lock, write_text
from common.progress import say
from training import checkpoint

MARK = ".run"


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
            remove_leftovers(each)  # checkpoints that a killed run was writing are as large as whole ones
        _claim(log_folder, folder)
        yield


def _claim(log_folder: Path, folder: Path) -> None:
    """Give both folders the same mark, by which they are known for one run's wherever they are moved or copied to."""
    ours, theirs = (_mark_of(each) for each in (folder, log_folder))
    if theirs and theirs != ours and (ours or not checkpoint.all_in(folder)):
        raise OccupiedError(
            f"{log_folder} holds another run's log than that of the checkpoints in {folder}; name this run's own with --log_dir, "
            "choose a --run_name NAME, or move that log away"
        )
    mark = ours or theirs or uuid.uuid4().hex
    for each in (folder, log_folder):
        if _mark_of(each) != mark:
            with contextlib.suppress(OSError):  # a full disk costs no training
                write_text(each / MARK, f"{mark}\n")


def _mark_of(folder: Path) -> str:
    try:
        return (folder / MARK).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
