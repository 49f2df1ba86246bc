"""Setting bad patches aside: moved to ``DIR_quarantine/``, taken out of the manifest, never deleted, never overwritten.

Order of the steps, so that a kill at any moment leaves no manifest row without its file and loses nothing: the plan is written to
``pending.csv``; the manifest is replaced by one without the planned rows; the files are moved one by one; the plan, which holds
each removed row, is added to ``reasons.csv``; ``pending.csv`` is removed. A later run finishes what it finds pending.

An extraction writes the manifest from what it knows of its files, so none may be at work meanwhile, nor another quarantine: whoever
changes a patch folder holds the lock of the extraction's journal.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import UserError
from common.files import inside, take_lock, write_csv
from data import journal, manifest
from data.manifest import COLUMNS, QUARANTINE_SUFFIX, Patch
from data.panda import read_csv_rows

PENDING, REASONS = "pending.csv", "reasons.csv"
NO_FILE = "row without a file"
_ROW_COLUMNS = tuple(name for name in COLUMNS if name != "path")
_COLUMNS = ("path", "moved_to", "reason", *_ROW_COLUMNS)


@dataclass(frozen=True)
class Entry:
    """One step of the plan. moved_to: path in the quarantine folder, "" where only a manifest row is taken out. row: its cells."""

    path: str
    moved_to: str
    reason: str
    row: tuple[str, ...] = ("",) * len(_ROW_COLUMNS)


def quarantine_folder(folder: Path) -> Path:
    """``DIR_quarantine`` beside the patch folder."""
    folder = Path(folder).resolve()
    return folder.with_name(folder.name + QUARANTINE_SUFFIX)


def set_aside_before(folder: Path) -> set[str]:
    """Paths of the patches of ``folder`` that were moved aside, by hand too. Raises UserError when their list is damaged."""
    path = quarantine_folder(folder) / REASONS
    return {entry.path for entry in _read(path) if entry.moved_to or entry.reason == NO_FILE} if path.exists() else set()


def is_pending(folder: Path) -> bool:
    """Whether an earlier run was interrupted while it set patches of ``folder`` aside."""
    return (quarantine_folder(folder) / PENDING).exists()


def finish(folder: Path) -> int:
    """Finish what an interrupted run left undone; returns how many steps that were (0 when there was none).

    Raises UserError when an extraction or another quarantine is at work in ``folder``, also where there is nothing to finish.
    """
    folder = Path(folder)
    with _alone(folder):
        return _carry_out(folder) if is_pending(folder) else 0


def set_aside(folder: Path, faults: dict[str, str]) -> int:
    """Move the patches of ``faults`` (path -> reason) aside and mend the manifest; returns the number of steps taken.

    Rows without a file and repeated rows leave the manifest too. Raises UserError when the manifest is damaged, nothing can be
    moved, ``folder`` holds slides, or an extraction or another quarantine is at work there; then nothing was changed.
    """
    folder = Path(folder)
    with _alone(folder):
        return _set_aside(folder, faults)


def _set_aside(folder: Path, faults: dict[str, str]) -> int:
    aside = quarantine_folder(folder)
    for above in sorted({parent for path in faults for parent in (folder / path).parents if parent.is_relative_to(folder)}):
        if (above / "train.csv").exists() or (above / "train_images").exists():
            raise UserError(f"{above} holds slides (train.csv or train_images); --quarantine moves nothing there")
    elsewhere = next((path for path in faults if not (folder / path).parent.resolve().is_relative_to(folder.resolve())), None)
    if elsewhere:
        raise UserError(
            f"{folder / elsewhere} lies behind a link, where --quarantine moves nothing; name the folder that it leads to with "
            "--patches, or remove it by hand"
        )
    rows = manifest.read_manifest(folder) if (folder / manifest.NAME).exists() else []
    plan = _plan(folder, aside, rows, faults)
    if not plan:
        return 0
    try:
        aside.mkdir(exist_ok=True)
        if os.stat(aside).st_dev != os.stat(folder).st_dev:
            raise UserError(
                f"{aside} lies on another file system than {folder}; move the patches below one folder of that file system"
            )
        _write(aside / PENDING, plan)
    except OSError as error:
        raise UserError(f"cannot set patches aside in {aside} ({error.strerror}); make that folder writable") from error
    return _carry_out(folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep extractions and other quarantines out of ``folder`` for the block. Raises UserError where one is at work there."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)  # the lock goes with it


def _lock(folder: Path) -> int | None:
    """What has to be closed to let go of the lock: the journal, or the folder itself where there is no journal.

    Nothing is held where there are no locks to be had: on Windows, on some file systems, in a folder closed to us. Two runs in one
    folder are then the user's to avoid. Raises UserError where the lock is held elsewhere.
    """
    descriptor = None
    with contextlib.suppress(ImportError, OSError):
        descriptor = _lockable(folder)
        if not take_lock(descriptor):
            os.close(descriptor)
            raise UserError(f"an extraction into {folder} or another --quarantine of it is running; wait for its end")
    return descriptor


def _lockable(folder: Path) -> int:
    path = folder / journal.NAME
    if not path.exists():
        return os.open(folder, os.O_RDONLY)
    return os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)  # network disks want it open for writing


def _plan(folder: Path, aside: Path, rows: list[Patch], faults: dict[str, str]) -> list[Entry]:
    by_path: dict[str, Patch] = {}
    plan, taken = [], set()
    for row in rows:
        path = inside(folder, row.path)
        relative = path.relative_to(folder).as_posix()
        if relative in by_path:
            plan.append(Entry(relative, "", "repeated row", _cells(row)))
        elif not _exists(path):
            plan.append(Entry(relative, "", NO_FILE, _cells(row)))
        by_path.setdefault(relative, row)
    for path, reason in sorted(faults.items()):
        if not _exists(inside(folder, path)):  # another run moved or removed it since it was looked at
            continue
        target = _free(aside, path, taken)
        taken.add(target)
        row = by_path.get(path)
        plan.append(Entry(path, target, reason, _cells(row)) if row else Entry(path, target, reason))
    return plan


def _cells(row: Patch) -> tuple[str, ...]:
    cells = asdict(row)
    return tuple("" if cells[name] is None else str(cells[name]) for name in _ROW_COLUMNS)


def _free(aside: Path, path: str, taken: set[str]) -> str:
    """``path``, or the first of ``name.2.png``, ``name.3.png`` ... that nothing in the quarantine folder has."""
    pure, number, target = Path(path), 1, path
    while target in taken or os.path.lexists(aside / target):
        number += 1
        target = pure.with_name(f"{pure.stem}.{number}{pure.suffix}").as_posix()
    return target


def _carry_out(folder: Path) -> int:
    aside = quarantine_folder(folder)
    plan = _read(aside / PENDING)
    try:
        _mend_manifest(folder, aside, plan)
        for entry in plan:
            _move(folder, aside, entry)
        done = _read(aside / REASONS) if (aside / REASONS).exists() else []
        written = set(done)
        _write(aside / REASONS, [*done, *(entry for entry in plan if entry not in written)])
        (aside / PENDING).unlink()
    except OSError as error:
        raise UserError(
            f"setting patches aside stopped at {error.filename} ({error.strerror}); mend that and run it again"
        ) from error
    return len(plan)


def _mend_manifest(folder: Path, aside: Path, plan: list[Entry]) -> None:
    if not (folder / manifest.NAME).exists():
        return
    leaving = {entry.path for entry in plan if _leaves(folder, aside, entry)}
    kept: dict[str, dict[str, str]] = {}
    rows = read_csv_rows(folder / manifest.NAME, manifest.REQUIRED)
    for row in rows:
        relative = inside(folder, row["path"]).relative_to(folder).as_posix()
        if relative not in leaving:
            kept.setdefault(relative, row)
    if len(kept) < len(rows):
        write_csv(folder / manifest.NAME, list(rows[0]), (row.values() for row in kept.values()))  # with columns of people's own


def _leaves(folder: Path, aside: Path, entry: Entry) -> bool:
    """Whether the row of this entry has to go: its file is absent, or is about to be moved."""
    exists = _exists(inside(folder, entry.path))
    if not entry.moved_to:
        return not exists
    return not (exists and os.path.lexists(inside(aside, entry.moved_to)))


def _move(folder: Path, aside: Path, entry: Entry) -> None:
    if not entry.moved_to:
        return
    source, target = inside(folder, entry.path), inside(aside, entry.moved_to)
    if os.path.lexists(source) and not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)


def _exists(path: Path) -> bool:
    """Whether there is a file or link, or no way to tell: a folder may be closed to us."""
    try:
        with contextlib.suppress(PermissionError):
            path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _write(path: Path, entries: list[Entry]) -> None:
    write_csv(path, _COLUMNS, ((entry.path, entry.moved_to, entry.reason, *entry.row) for entry in entries))


def _read(path: Path) -> list[Entry]:
    return [
        Entry(row["path"], row["moved_to"], row["reason"], tuple(row[name] for name in _ROW_COLUMNS))
        for row in read_csv_rows(path, _COLUMNS)
    ]
