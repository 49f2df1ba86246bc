"""Which slides of PANDA to fetch: balanced over grade and provider, the same for the same seed, extended by a larger number."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from data.panda import KNOWN_BAD, SlideRecord


def choose(
    records: Iterable[SlideRecord],
    num_slides: int | None = None,
    grades: Iterable[int] | None = None,
    providers: Iterable[str] | None = None,
    ids: Iterable[str] | None = None,
    include_bad: bool = False,
    seed: int = 0,
) -> tuple[list[SlideRecord], dict[str, str]]:
    """The chosen slides in the order of choice, and slide_id -> reason for those that are left out as bad.

    Every provider-and-grade stratum is shuffled by a hash of seed and id, then the strata are dealt out in turn until
    ``num_slides`` are there: the first 600 of a choice of 1000 are the choice of 600. Raises UserError for an unknown id.
    """
    records = list({record.slide_id: record for record in reversed(list(records))}.values())[::-1]  # the first of doubled rows
    if ids is not None:
        wanted = set(ids)
        unknown = sorted(wanted - {record.slide_id for record in records})
        if unknown:
            raise UserError(f"{len(unknown)} id(s) are not in train.csv, the first is {unknown[0]!r}; mend the file of --ids")
        records = [record for record in records if record.slide_id in wanted]
    if grades is not None:
        records = [record for record in records if record.isup_grade in set(grades)]
    if providers is not None:
        records = [record for record in records if record.data_provider in set(providers)]
    bad = {} if include_bad else {record.slide_id: KNOWN_BAD[record.slide_id] for record in records if record.slide_id in KNOWN_BAD}
    dealt = _deal([record for record in records if record.slide_id not in bad], seed)
    return dealt[:num_slides], bad


def _deal(records: list[SlideRecord], seed: int) -> list[SlideRecord]:
    """All records, one of each stratum in turn."""

    def shuffled(record: SlideRecord) -> bytes:
        return hashlib.sha256(f"{seed}:{record.slide_id}".encode()).digest()

    rank, seen = {}, defaultdict(int)
    for record in sorted(records, key=shuffled):
        stratum = record.data_provider, record.isup_grade
        rank[record.slide_id] = seen[stratum]
        seen[stratum] += 1
    return sorted(records, key=lambda record: (rank[record.slide_id], shuffled(record)))


def image_name(slide_id: str) -> str:
    """Name of a slide in the competition and below the data folder."""
    return f"train_images/{slide_id}.tiff"


def mask_name(slide_id: str) -> str:
    """Name of a slide's label mask in the competition and below the data folder."""
    return f"train_label_masks/{slide_id}_mask.tiff"


def read_ids(path: Path) -> list[str]:
    """Slide ids of a text file: the first word or csv field of each line; blank lines, # comments and a header are skipped."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); --ids takes a text file with one slide id a line") from error
    ids = [line.split("#")[0].replace(",", " ").split()[0] for line in lines if line.split("#")[0].replace(",", " ").split()]
    ids = [name.removesuffix(".tiff") for name in ids if name not in ("image_id", "slide_id")]
    if not ids:
        raise UserError(f"{path} names no slide; --ids takes a text file with one slide id a line")
    return ids
