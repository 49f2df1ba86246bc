"""downloads.csv: what has arrived and been checked, with size, checksum and time. One line is appended for each file.

The last line of a file counts. A torn last line (the machine lost power) is passed over: that file is checked again.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from common.errors import UserError
from common.files import inside
from data.sources import checksum
from data.transfer import disk_errors

NAME = "downloads.csv"
TABLE = "train.csv"  # which people may correct
STATES = ("whole", "damaged", "used")


@dataclass(frozen=True)
class Entry:
    """One arrival. checksum: ``crc32:`` or ``md5:`` and hexadecimal digits.

    state: whole; damaged, as --verify found; used, deleted after it gave its patches.
    """

    name: str
    size: int
    checksum: str
    time: str
    state: str = "whole"


COLUMNS = tuple(field.name for field in fields(Entry))


class Ledger:
    """The arrivals of one folder. Written by one process at a time (the folder is locked) and one thread."""

    def __init__(self, folder: Path):
        self.folder, self._path = Path(folder), Path(folder) / NAME
        self.entries = {entry.name: entry for entry in self._read()}
        self._begins = self._first_bytes()

    def _read(self):
        if not self._path.exists():
            return
        with open(self._path, encoding="utf-8", newline="", errors="replace") as file:
            for row in csv.reader(file):
                if len(row) == len(COLUMNS) and row[1].isdigit() and row[4] in STATES and "\0" not in row[0]:
                    yield Entry(row[0], int(row[1]), *row[2:])

    def _first_bytes(self) -> str:
        """What has to stand before the next line: the header of a new file, or the end of a torn line."""
        if not self._path.exists() or not self._path.stat().st_size:
            return ",".join(COLUMNS) + "\n"
        with open(self._path, "rb") as file:
            file.seek(-1, 2)
            return "" if file.read() == b"\n" else "\n"

    def has(self, name: str, size: int) -> bool:
        """Whether the file arrived whole and still lies there with its size."""
        entry = self.entries.get(name)
        if entry is None or entry.state != "whole" or entry.size != size:
            return False
        path = inside(self.folder, name)
        return path.is_file() and path.stat().st_size == size

    def used(self, name: str, size: int) -> bool:
        """Whether the file arrived, gave its patches and was deleted."""
        entry = self.entries.get(name)
        return entry is not None and entry.state == "used" and entry.size == size

    def enter(self, name: str, size: int, checksum: str, state: str = "whole") -> None:
        """Append one line."""
        entry = Entry(name, size, checksum, datetime.now(UTC).isoformat(timespec="seconds"), state)
        with disk_errors(self._path), open(self._path, "a", encoding="utf-8", newline="") as file:
            file.write(self._begins)
            csv.writer(file, lineterminator="\n").writerow(astuple(entry))
        self._begins = ""
        self.entries[name] = entry


def verify(folder: Path, workers: int) -> Iterator[tuple[str, str | None]]:
    """Read every file of the ledger again; yield (name, what is wrong or None).

    A damaged file is entered as such, so that the next run fetches it anew; not a ``train.csv`` that is there. Raises UserError
    when nothing has been downloaded.
    """
    ledger = Ledger(folder)
    if not ledger.entries:
        raise UserError(f"nothing has been downloaded into {folder} yet ({NAME} is missing or empty); run without --verify first")
    kept = [entry for entry in ledger.entries.values() if entry.state != "used"]
    with ThreadPoolExecutor(workers) as pool:
        for entry, problem in zip(kept, pool.map(lambda entry: _problem(ledger.folder, entry), kept), strict=True):
            if problem and not (entry.name == TABLE and inside(ledger.folder, TABLE).is_file()):
                ledger.enter(entry.name, entry.size, entry.checksum, "damaged")
            yield entry.name, problem


def _problem(folder: Path, entry: Entry) -> str | None:
    path = inside(folder, entry.name)
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry.size:
        return f"{path.stat().st_size} bytes instead of {entry.size}"
    try:
        return None if checksum(path, entry.checksum.split(":")[0]) == entry.checksum else "its checksum has changed"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
