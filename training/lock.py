"""One run a folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.files import take_lock
from common.progress import say


def lock_folder(folder: Path) -> TextIO:
    """Hold ``folder`` for this process until it ends, however it ends; keep the returned file open.

    The kernel releases the lock with the process, so a stale one cannot exist. Raises UserError naming who holds it.
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
        raise UserError(f"{folder} is in use by {holder}; stop it or choose another --run_name")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
