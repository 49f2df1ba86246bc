"""The journal of an extraction: what is known about each slide, one JSON object a line, so that a run can be continued.

Lines are only ever appended; the last one about a slide counts. A line that a crash cut short is left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from common.errors import UserError
from common.files import take_lock
from data.cutting import Candidate, Cut, Scan

NAME = "extract.jsonl"
_CUT_FIELDS = [item.name for item in fields(Cut)]


@dataclass
class Known:
    """What the journal says about one slide. fingerprint: of slide and mask when it was scanned. drawn: the overlay's digest.
    before: (x, y) of the candidates of earlier scans, whose files are ours as well. side: of the split, or ""."""

    fingerprint: list = field(default_factory=list)
    scan: Scan | None = None
    cuts: list[Cut] = field(default_factory=list)
    next_index: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    drawn: str = ""
    before: set[tuple[int, int]] = field(default_factory=set)
    side: str = ""

    def was_candidate(self, x: int, y: int) -> bool:
        """Whether there ever was a candidate at a place, so that a file of ours is recognised as such."""
        now = self.scan.candidates if self.scan else ()
        return (x, y) in self.before or any((item.x, item.y) == (x, y) for item in now)


class Journal:
    """``folder/extract.jsonl``, open and locked: a second run in the same folder is refused."""

    def __init__(self, folder: Path):
        self.path = Path(folder) / NAME
        try:
            self._file = open(self.path, "a+b")  # noqa: SIM115 - held open as long as the run lasts
            _lock(self._file, folder)
            self.slides = self._read()
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened ({error.strerror}); check the folder's permissions") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def known(self, slide_id: str) -> Known:
        """What is known about a slide; an empty entry for a new one."""
        return self.slides.setdefault(slide_id, Known())

    def record_scan(self, slide_id: str, fingerprint: list, scan: Scan, side: str) -> None:
        """Remember a scan and the slide's side of the split; what was cut from an earlier one no longer counts."""
        candidates = [[item.x, item.y, item.tissue, item.label] for item in scan.candidates]
        entry = {"fingerprint": fingerprint, "candidates": candidates, "cause": scan.cause, "rejected": scan.rejected, "side": side}
        self._append({"scan": slide_id, **entry})

    def record_cuts(self, slide_id: str, cuts: list[Cut], next_index: int, rejected: dict[str, int]) -> None:
        """Remember all patches of a slide that are on the disk now."""
        rows = [[getattr(item, name) for name in _CUT_FIELDS] for item in cuts]
        self._append({"cut": slide_id, "rows": rows, "next": next_index, "rejected": rejected})

    def record_overlay(self, slide_id: str, digest: str) -> None:
        """Remember which patches a slide's overlay shows."""
        self._append({"overlay": slide_id, "digest": digest})

    def _append(self, entry: dict) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); free some space and start again") from error
        self._apply(entry)

    def _read(self) -> dict[str, Known]:
        self.slides = {}
        self._file.seek(0)
        for line in self._file:
            try:
                self._apply(json.loads(line))
            except (ValueError, LookupError, TypeError):
                continue  # cut short by a crash; what it said is found out again
        self._file.seek(0, os.SEEK_END)
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
        return self.slides

    def _apply(self, entry: dict) -> None:
        if "scan" in entry:
            candidates = [Candidate(*item) for item in entry["candidates"]]
            known = self.known(entry["scan"])
            if known.scan:
                known.before |= {(item.x, item.y) for item in known.scan.candidates}
            known.fingerprint, known.scan = entry["fingerprint"], Scan(candidates, entry["cause"], entry["rejected"])
            known.cuts, known.next_index, known.rejected, known.drawn, known.side = [], 0, {}, "", entry.get("side", "")
        elif "cut" in entry:
            cuts = [Cut(*row) for row in entry["rows"]]
            known = self.known(entry["cut"])
            known.cuts, known.next_index, known.rejected = cuts, entry["next"], entry["rejected"]
        elif "overlay" in entry:
            self.known(entry["overlay"]).drawn = entry["digest"]


def _lock(file, folder: Path) -> None:
    try:
        taken = take_lock(file)
    except ImportError:  # Windows has no such lock; two runs in one folder are then the user's to avoid
        return
    if not taken:
        raise UserError(f"another extraction is running in {folder}; wait for it, or use another --output_dir")
