"""The words in which check_data.py speaks: findings with a severity, and the judgement of one folder."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SEVERITIES = ("broken", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One kind of defect: how bad it is, what it is, what to do, and everything it was found on (ready to print)."""

    severity: str
    check: str
    title: str
    advice: str
    items: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()  # paths of patches worth looking at, relative to the patch folder

    @property
    def count(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class Scan:
    """One patch after one decode. ``fault``: "" or a key of ``data.quality_patches.FAULTS``; numbers are 0 when undecoded.

    path: relative to the patch folder. digest: hash of size and RGB values. phash: (32,) uint8, perceptual hash of 256 bits.
    sharpness: variance of the Laplacian in grey levels squared. stained: share of stained pixels, 0..1. od: mean optical density
    of the stained pixels in red, green and blue.
    """

    path: str
    fault: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    digest: bytes = b""
    phash: bytes = b""
    sharpness: float = 0.0
    stained: float = 0.0
    od: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Facts:
    """What is known of one patch: from its manifest row, else from its path. "" or None where unknown."""

    label: str
    slide_id: str
    data_provider: str = ""
    isup_grade: int | None = None
    split: str = ""


@dataclass
class Assessment:
    """Everything check_data.py says about one folder of slides or patches.

    tables: title -> rows of cells, the first row being the head. faults: path -> reason, the patches that ``--quarantine`` moves.
    scans, facts: the patches that are fit for training, by path; where there is a manifest, none without a row.
    """

    kind: str
    folder: Path
    summary: str
    findings: list[Finding]
    tables: dict[str, list[list]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    scans: dict[str, Scan] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        return any(finding.severity == "broken" for finding in self.findings)


def printable(text: str) -> str:
    """A file name or csv field that is safe to print: control characters and undecodable bytes become escapes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def is_text(name: str) -> bool:
    """Whether a file's name is text that tables and logs can hold: without control characters, and not bytes of another encoding,
    as old archives unpack them."""
    return not any(unicodedata.category(char) in ("Cc", "Cs") for char in name)


def worst(findings: Iterable[Finding]) -> list[Finding]:
    """Findings in order of severity."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
