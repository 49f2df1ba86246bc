"""patches.csv: one row a patch, the contract between extraction, checking, training and evaluation."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath

from common.errors import UserError
from common.files import check_inside, write_csv
from data.panda import LABELS, read_csv_rows

NAME = "patches.csv"
SPLITS = ("train", "test")
REQUIRED = ("path", "split")  # of people's own files; what else is unknown is filled in
QUARANTINE_SUFFIX = "_quarantine"
SPLIT_FOLDERS = {"train": "train", "val": "test", "valid": "test", "validation": "test", "test": "test"}
SLIDE_X_Y = re.compile(r"(?P<slide>.+)_(?P<x>-?\d+)_(?P<y>-?\d+)")


@dataclass(frozen=True)
class Patch:
    """One row of patches.csv.

    path: relative to the patch folder, with forward slashes, ``LABEL/SLIDE_X_Y.png``. data_provider, gleason_score: "" when
    unknown. isup_grade: 0..5 of the whole slide, None when unknown. x, y: top left corner in level-0 pixels. level: pyramid level
    read. mpp: micrometres per pixel of the patch, None when unknown. tissue: share of tissue, 0..1. sharpness: variance of the
    Laplacian of the grey patch, in grey levels squared. split: "train" or "test", the same for all patches of a slide.
    """

    path: str
    slide_id: str
    data_provider: str
    isup_grade: int | None
    gleason_score: str
    label: str
    x: int
    y: int
    level: int
    mpp: float | None
    tissue: float
    sharpness: float
    split: str


COLUMNS = tuple(each.name for each in fields(Patch))


@dataclass(frozen=True)
class OwnColumns:
    """Columns that people added to a manifest. cells: of each path, as many as ``names``."""

    names: tuple[str, ...] = ()
    cells: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def own_columns(folder: Path) -> OwnColumns:
    """Those of ``folder/patches.csv``; none where there is none that can be read."""
    try:
        rows = read_csv_rows(Path(folder) / NAME, REQUIRED)
    except UserError:
        return OwnColumns()
    names = tuple(name for name in (rows[0] if rows else ()) if name not in COLUMNS)
    return OwnColumns(names, {row["path"]: tuple(row[name] for name in names) for row in rows} if names else {})


def write_manifest(folder: Path, patches: Iterable[Patch], own: OwnColumns | None = None) -> None:
    """Write ``folder/patches.csv`` anew, sorted by path, whole or not at all; with people's ``own`` columns behind ours."""
    own = own or OwnColumns()
    blank = ("",) * len(own.names)
    patches = sorted(patches, key=lambda patch: patch.path)
    rows = ((*(getattr(patch, name) for name in COLUMNS), *own.cells.get(patch.path, blank)) for patch in patches)
    cells = (("" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in row) for row in rows)
    write_csv(Path(folder) / NAME, (*COLUMNS, *own.names), cells)


def is_set_aside(folder: Path) -> bool:
    """Whether check_data.py made this folder to set patches aside: DIR_quarantine beside DIR."""
    beside = folder.name.removesuffix(QUARANTINE_SUFFIX)
    return beside not in ("", folder.name) and folder.with_name(beside).is_dir()


def entries_below(folder: Path, unreadable: Callable[[str], None]) -> Iterator[tuple[PurePosixPath, str]]:
    """(relative path, "folder", "file" or "") of what lies below a patch folder, but for what is hidden or was set aside.

    Links are followed, but those to what lies in the folder itself. unreadable: told of each folder that cannot be read, and why.
    """
    root, pending = os.path.realpath(folder), [PurePosixPath()]
    seen = {root}
    while pending:
        relative = pending.pop()
        try:
            with os.scandir(Path(folder, relative)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            unreadable(f"{relative}: {error.strerror}")
            continue
        for entry in found:
            if entry.name.startswith(".") or (entry.name.endswith(QUARANTINE_SUFFIX) and is_set_aside(Path(entry.path))):
                continue
            if entry.is_symlink() and os.path.exists(entry.path) and Path(os.path.realpath(entry.path)).is_relative_to(root):
                continue
            kind = _kind_of(entry)
            yield relative / entry.name, kind
            if kind == "folder" and (real := os.path.realpath(entry.path)) not in seen:
                seen.add(real)
                pending.append(relative / entry.name)


def _kind_of(entry: os.DirEntry) -> str:
    """Of what a link leads to as well; "" where it leads nowhere, or round, and for devices."""
    if entry.is_symlink():
        return "folder" if os.path.isdir(entry.path) else "file" if os.path.isfile(entry.path) else ""
    return "folder" if entry.is_dir() else "file" if entry.is_file() else ""


def plain(path: str) -> str:
    """A manifest path in the spelling of ``entries_below``: no doubled slashes, no single dots."""
    return str(PurePosixPath(path))


def has_lone_splits(paths: Iterable[str]) -> bool:
    """Whether folders named like a split are one where they hold pictures themselves: beside "invalid", "valid" is a label."""
    tops = {top.lower() for top, *below in (PurePosixPath(path).parts for path in paths) if len(below) == 1}
    return "train" in tops or tops <= SPLIT_FOLDERS.keys()


def by_path(path: str, lone_split: bool = True) -> tuple[str, str]:
    """(label, split) of a patch by its path alone: LABEL/NAME, or train/LABEL/NAME and val/LABEL/NAME as others lay them out.

    "unlabelled" and "" where the path does not say. lone_split: whether train/NAME is of the split train, and not of a label
    "train".
    """
    folders = PurePosixPath(path).parts[:-1]
    split = SPLIT_FOLDERS.get(folders[0].lower(), "") if len(folders) > (0 if lone_split else 1) else ""
    folders = folders[1:] if split else folders
    return folders[0] if folders else "unlabelled", split


def slide_by_path(path: str) -> str:
    """The slide that a patch was cut from, by its name SLIDE_X_Y; another program's image stands for itself."""
    match = SLIDE_X_Y.fullmatch(PurePosixPath(path).stem)
    return match["slide"] if match else path


def read_manifest(folder: Path) -> list[Patch]:
    """Rows of ``folder/patches.csv``. Only ``path`` and ``split`` have to be there: label, slide and place follow from the path.

    Raises UserError that names the line when the file is missing, damaged, or has a path that leaves the folder.
    """
    path = Path(folder) / NAME
    patches = []
    for number, row in enumerate(read_csv_rows(path, REQUIRED), start=2):
        try:
            patches.append(_parse(_filled(row), folder))
        except (ValueError, UserError) as error:
            raise UserError(f"{path}, line {number}: {error}; run extract_patches.py again or mend the line") from error
    return patches


def _filled(row: dict[str, str]) -> dict[str, str]:
    """A row with all COLUMNS; cells that are empty or absent say what the path says, or that nothing is known."""
    match = SLIDE_X_Y.fullmatch(PurePosixPath(row["path"]).stem)
    unknown = {"slide_id": slide_by_path(row["path"]), "label": by_path(row["path"])[0], "x": "0", "y": "0", "level": "0"}
    unknown |= {"tissue": "1", "sharpness": "0"} | ({"x": match["x"], "y": match["y"]} if match else {})
    return {name: row.get(name) or unknown.get(name, "") for name in COLUMNS}


def _parse(row: dict[str, str], folder: Path) -> Patch:
    check_inside(folder, row["path"])
    if row["label"] not in LABELS and row["label"] not in (by_path(row["path"], lone_split)[0] for lone_split in (True, False)):
        raise ValueError(f"label {row['label']!r} is neither one of {', '.join(LABELS)} nor the folder of the patch")
    if row["split"] not in SPLITS:
        raise ValueError(f"split {row['split']!r} is not train or test")
    grade = _number(row, "isup_grade", _whole) if row["isup_grade"] else None
    if grade is not None and not 0 <= grade <= 5:
        raise ValueError(f"isup_grade {grade} is not a number from 0 to 5")
    numbers = {name: _number(row, name, float) for name in ("tissue", "sharpness")}
    mpp = _number(row, "mpp", float) if row["mpp"] else None
    if not all(math.isfinite(value) for value in (*numbers.values(), mpp or 0.0)):
        raise ValueError("a number is not finite")
    return Patch(
        **{name: row[name] for name in ("path", "slide_id", "data_provider", "gleason_score", "label", "split")},
        **{name: _number(row, name, _whole) for name in ("x", "y", "level")},
        **numbers,
        isup_grade=grade,
        mpp=mpp,
    )


def _whole(text: str) -> int:
    """Also of "4.0", as pandas writes whole numbers of a column with gaps."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def _number(row: dict[str, str], name: str, kind: Callable[[str], float]) -> float:
    try:
        return kind(row[name])
    except ValueError:
        raise ValueError(f"{name} {row[name]!r} is not a number") from None
