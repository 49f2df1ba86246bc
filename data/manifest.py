"""patches.csv: one row a patch, the contract between extraction, checking, training and evaluation."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from common.errors import UserError
from common.files import check_inside, replacing
from data.panda import LABELS, read_csv_rows

NAME = "patches.csv"
SPLITS = ("train", "test")


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


COLUMNS = tuple(field.name for field in fields(Patch))


def write_manifest(folder: Path, patches: Iterable[Patch]) -> None:
    """Write ``folder/patches.csv`` anew, sorted by path, whole or not at all."""
    with replacing(Path(folder) / NAME, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for patch in sorted(patches, key=lambda patch: patch.path):
            values = (getattr(patch, name) for name in COLUMNS)
            writer.writerow("" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in values)


def read_manifest(folder: Path) -> list[Patch]:
    """Rows of ``folder/patches.csv``.

    Raises UserError that names the line when the file is missing, damaged, or has a path that leaves the folder.
    """
    path = Path(folder) / NAME
    patches = []
    for number, row in enumerate(read_csv_rows(path, COLUMNS), start=2):
        try:
            patches.append(_parse(row, folder))
        except (ValueError, UserError) as error:
            raise UserError(f"{path}, line {number}: {error}; run extract_patches.py again or mend the line") from error
    return patches


def _parse(row: dict[str, str], folder: Path) -> Patch:
    check_inside(folder, row["path"])
    if row["label"] not in LABELS:
        raise ValueError(f"label {row['label']!r} is not one of {', '.join(LABELS)}")
    if row["split"] not in SPLITS:
        raise ValueError(f"split {row['split']!r} is not train or test")
    grade = int(row["isup_grade"]) if row["isup_grade"] else None
    if grade is not None and not 0 <= grade <= 5:
        raise ValueError(f"isup_grade {grade} is not a number from 0 to 5")
    numbers = {name: float(row[name]) for name in ("tissue", "sharpness")}
    mpp = float(row["mpp"]) if row["mpp"] else None
    if not all(math.isfinite(value) for value in (*numbers.values(), mpp or 0.0)):
        raise ValueError("a number is not finite")
    return Patch(
        **{name: row[name] for name in ("path", "slide_id", "data_provider", "gleason_score", "label", "split")},
        **{name: int(row[name]) for name in ("x", "y", "level")},
        **numbers,
        isup_grade=grade,
        mpp=mpp,
    )
