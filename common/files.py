"""Files that are whole or absent: temporary file in the same folder, flushed, renamed."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.errors import UserError

_TEMPORARY = re.compile(r"\..+?\.(\d+)(?:\.\d+)?\.tmp")  # of replacing and the like, with the process's number
SURELY_LEFT = 600.0  # seconds without a write: a process of another machine may be writing to a shared disk


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", durable: bool = True) -> Iterator:
    """Open a temporary file beside ``path``; on success flush it to the disk and rename it over ``path``.

    When the block raises, or the process dies, ``path`` is as it was before; an OSError of a write, as of a full disk, names it.
    ``durable=False`` skips the fsync: enough for files that a next run can make again. The file gets the user's umask.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.{threading.get_ident()}.tmp")
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise


def remove_leftovers(folder: Path, name: str = "*", locked: bool = False, idle: float = 0.0) -> None:
    """Remove the temporary files of ``replacing`` that killed processes left in ``folder``, as large as the whole ones.

    name: of the files that were being written, a glob pattern. Those of living processes stay, and those written to in the last
    ``idle`` seconds; all go where ``locked``: the caller holds the lock of all who write such files.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        process = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(OSError):  # another run may remove it too, or the folder be read-only
            if process and (locked or (_is_gone(int(process[1])) and time.time() - path.stat().st_mtime >= idle)):
                path.unlink()


def _is_gone(process: int) -> bool:
    """Whether a process's number is nobody's, or ours by now: in a container they begin anew."""
    try:
        os.kill(process, 0)  # asks only whether it is there
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return process == os.getpid()


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` is whole or as it was; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 so that ``path`` is whole or as it was."""
    with replacing(path, "w") as file:
        file.write(text)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable]) -> None:
    """Write a csv file, its header and its rows, so that ``path`` is whole or as it was."""
    with replacing(path, "w") as file:
        csv.writer(file, lineterminator="\n").writerows(itertools.chain([columns], rows))


def check_inside(folder: Path, relative: str) -> None:
    """Raise UserError when a path that came from a file or a server would leave ``folder``."""
    # By hand: with pathlib it takes 3 microseconds, twenty times as long, and a manifest may have a million rows.
    if not relative or relative[0] == "/" or ".." in relative.split("/") or "\\" in relative or "\0" in relative:
        raise UserError(f"{relative!r} is not a path inside {folder}; the file that names it is damaged or not ours")


def inside(folder: Path, relative: str) -> Path:
    """Join a path that came from a file or a server to ``folder``; raise UserError when it would leave the folder."""
    check_inside(folder, relative)
    return Path(folder, *relative.split("/"))


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_all(file, content: bytes) -> None:
    """Write all of ``content`` to an unbuffered file; a disk that becomes full takes a part and then refuses. Raises OSError."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def take_lock(file) -> bool:
    """Hold the lock of an open file (or descriptor) until it is closed, however the process ends; False where another one does.

    Raises ImportError on Windows and OSError on a file system that has no locks: then nothing is held.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
