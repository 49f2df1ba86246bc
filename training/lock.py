"""One run a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.progress import say

HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # by another process; any other error: there are no locks to be had


def lock_folder(folder: Path) -> TextIO:
    """Hold ``folder`` for this process until it ends, however it ends; keep the returned file open.

    The kernel releases the lock with the process, so a stale one cannot exist. Raises UserError naming who holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 held open for the life of the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            say(f"note: the file system of {folder} has no locks ({error}); do not start a second run there")
            return file
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{folder} is in use by {holder}; stop it or choose another --run_name") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
