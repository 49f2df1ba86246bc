"""The PANDA challenge's conventions: train.csv, providers, grades, mask values, and the split by slide.

Source: Bulten et al., "Artificial intelligence for diagnosis and Gleason grading of prostate cancer: the PANDA challenge",
Nature Medicine 28 (2022), and the challenge's data description on Kaggle.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.labels import PROVIDERS as PROVIDERS

COMPETITION = "prostate-cancer-grade-assessment"
LABELS = ("benign", "gleason3", "gleason4", "gleason5", "unlabelled")
IMAGE_FOLDERS = ("train_images", "train_label_masks")  # of PANDA's layout
STREAMING = "streaming"  # inside the data folder: slides on their way, so that whole slides kept there are not mixed with them
TRAIN_CSV_COLUMNS = ("image_id", "data_provider", "isup_grade", "gleason_score")

# What a mask's red channel may hold. Radboud's is per epithelium class, Karolinska's only benign against cancer.
MASK_VALUES = {
    "radboud": {0: "background", 1: "stroma", 2: "benign", 3: "gleason3", 4: "gleason4", 5: "gleason5"},
    "karolinska": {0: "background", 1: "benign", 2: "cancer"},
}

BACKGROUND = 0  # in all of them, and where a mask leaves tiles out

# Slides whose content or label is known to be wrong, found by participants of the challenge.
KNOWN_BAD = {
    "3790f55cad63053e956fb73027179707": "blank slide, no tissue",
    "b0a92a74cb53899311acc30b7405e101": "contradictory label: Gleason 4+3 with ISUP grade 2",
    "4a2ca53f240932e46eaf8959cb3f490a": "blank mask",
    "e4215cfc8c41ec04a55431cc413688a9": "blank mask",
    "aaa5732cd49bffddf0d2b7d36fbb0a83": "blank mask",
}

_ISUP_BY_SCORE = {(0, 0): 0, (3, 3): 1, (3, 4): 2, (4, 3): 3}
# At least this share of a patch must carry what its label says.
MIN_LABEL_SHARE = 0.10
# A benign patch may hold this much that is marked as cancer: the rim of a neighbour, not a gland.
MAX_CANCER_SHARE_IN_BENIGN = 0.01
# One Gleason pattern must hold this share of all marked benign and cancer in the patch, else it is mixed and stays unlabelled.
MIN_PURITY = 0.60


@dataclass(frozen=True)
class SlideRecord:
    """One slide: a row of train.csv, or a bare file (provider and score "", grade None) where there is no train.csv."""

    slide_id: str
    data_provider: str = ""
    isup_grade: int | None = None
    gleason_score: str = ""


def normal_score(text: str) -> str:
    """Gleason score in one spelling: Radboud's ``negative`` and Karolinska's ``0+0`` both mean no cancer and become ``0+0``."""
    text = "".join(text.split()).lower()
    return "0+0" if text == "negative" else text


def gleason_patterns(score: str) -> tuple[int, int] | None:
    """(primary, secondary) pattern of a score such as ``3+4``; (0, 0) for no cancer; None when it is not a Gleason score."""
    parts = normal_score(score).split("+")
    if len(parts) != 2 or not all(part in {"0", "3", "4", "5"} for part in parts):
        return None
    primary, secondary = int(parts[0]), int(parts[1])
    return None if (primary == 0) != (secondary == 0) else (primary, secondary)


def isup_from_gleason(score: str) -> int | None:
    """ISUP grade group 0..5 that follows from a Gleason score (Epstein et al. 2016); None when it is not a Gleason score."""
    patterns = gleason_patterns(score)
    if patterns is None:
        return None
    if patterns in _ISUP_BY_SCORE:
        return _ISUP_BY_SCORE[patterns]
    return 4 if sum(patterns) == 8 else 5


def read_csv_rows(path: Path, required: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a UTF-8 csv file as dictionaries (byte-order mark and Windows line ends are fine).

    Raises UserError when the file cannot be read, is not text, lacks one of the ``required`` columns, or has too long a row.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [{key: value or "" for key, value in row.items()} for row in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a csv file ({error}); restore it from its source") from error
    missing = [name for name in required if name not in columns]
    if missing:
        raise UserError(f"{path} lacks the column(s) {', '.join(missing)}; restore it from its source")
    longer = next((number for number, row in enumerate(rows, start=2) if None in row), None)
    if longer:
        raise UserError(f"{path}, row {longer} has more fields than the header; mend or remove it")
    return rows


def read_train_csv(path: Path) -> list[SlideRecord]:
    """All rows of PANDA's train.csv in file order, duplicates and contradictions included (check_data.py names them).

    Scores keep one spelling (see ``normal_score``). Raises UserError for a missing or unreadable file, an id that could leave
    the folder, or a grade that is not a number from 0 to 5.
    """
    records = []
    for number, row in enumerate(read_csv_rows(path, TRAIN_CSV_COLUMNS), start=2):
        slide_id, grade = row["image_id"].strip(), row["isup_grade"].strip().removesuffix(".0")  # as pandas writes it
        if not slide_id or set(slide_id) & set("/\\\0\n\r") or slide_id.startswith("."):
            raise UserError(f"{path}, line {number}: {slide_id!r} is not a slide id; mend or remove that line")
        if grade not in {"0", "1", "2", "3", "4", "5"}:
            raise UserError(f"{path}, line {number}: isup_grade {grade!r} is not a number from 0 to 5; mend or remove that line")
        records.append(SlideRecord(slide_id, row["data_provider"].strip().lower(), int(grade), normal_score(row["gleason_score"])))
    return records


def label_from_mask(mask: np.ndarray, provider: str, gleason_score: str) -> str:
    """Label of one patch from its mask.

    ``mask``: (H, W) uint8, the red channel of PANDA's mask at the patch's place (nearest neighbour). Shares are of the whole
    patch. Karolinska's "cancer" carries no pattern and counts only where the slide's score is one pattern (3+3, 4+4, 5+5).
    Returns one of ``LABELS``; "unlabelled" where the patch is mixed, shows too little epithelium, or has an unknown provider.
    """
    if provider not in MASK_VALUES:
        return "unlabelled"
    share = lambda value: np.count_nonzero(mask == value) / mask.size  # noqa: E731
    if provider == "radboud":
        benign, cancer = share(2), {pattern: share(pattern) for pattern in (3, 4, 5)}
    else:
        patterns = gleason_patterns(gleason_score)
        pure = patterns is not None and patterns[0] == patterns[1] and patterns[0] > 0
        benign, cancer = share(1), {patterns[0] if pure else 0: share(2)}
    if sum(cancer.values()) <= MAX_CANCER_SHARE_IN_BENIGN:
        return "benign" if benign >= MIN_LABEL_SHARE else "unlabelled"
    pattern = max(cancer, key=cancer.get)
    enough = cancer[pattern] >= max(MIN_LABEL_SHARE, MIN_PURITY * (benign + sum(cancer.values())))
    return f"gleason{pattern}" if pattern and enough else "unlabelled"


def split_by_slide(
    records: Iterable[SlideRecord], test_share: float = 0.15, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """slide_id -> "train" or "test", so that no slide is on both sides, stratified by provider and grade.

    ``test_share`` of all slides (rounded, at least one of four) are held out. Each stratum gives its share rounded down; the rest
    comes from the strata and grades that lost most by rounding, so that few slides are split well too. Within a stratum the slides
    stand in the order of a hash of their ids, which depends on nothing else. ``known``: slides that have a side already, which they
    keep, since a network may have been trained on them; what their strata then cannot hold out, others do.
    """
    known, strata = known or {}, defaultdict(list)
    for record in sorted(set(records), key=repr):
        strata[record.data_provider, record.isup_grade].append(record.slide_id)
    total = sum(map(len, strata.values()))
    exact = {key: len(ids) * test_share for key, ids in strata.items()}
    most = {key: sum(known.get(name) != "train" for name in ids) for key, ids in strata.items()}
    quota = {key: min(int(value), most[key]) for key, value in exact.items()}
    for _ in range(max(round(total * test_share), 1 if total >= 4 else 0) - sum(quota.values())):
        if open_ones := {key: value for key, value in exact.items() if quota[key] < most[key]}:
            quota[_most_short(open_ones, quota)] += 1
    split = {}
    for key, ids in strata.items():
        new = sorted((name for name in ids if name not in known), key=lambda name: hashlib.sha256(name.encode()).digest())
        wanted = quota[key] - sum(known.get(name) == "test" for name in ids)
        split.update({name: "test" if rank < wanted else "train" for rank, name in enumerate(new)})
        split.update({name: known[name] for name in ids if name in known})
    return split


def _most_short(exact: dict[tuple, float], quota: dict[tuple, int]) -> tuple:
    """The stratum (provider, grade) that lacks most held-out slides; its grade's lack counts too."""

    def lack(key: tuple) -> float:
        of_grade = [other for other in exact if other[1] == key[1]]
        return exact[key] - quota[key] + sum(exact[other] - quota[other] for other in of_grade)

    return max(sorted(exact, key=repr), key=lack)
