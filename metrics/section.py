"""What each part of an evaluation hands to the report: numbers for the machine, tables and pictures for people, findings."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """A fault that a test names. text: one sentence for people. value, limit: what was measured and where the test begins to
    object.
    """

    test: str
    text: str
    value: float
    limit: float


@dataclass(frozen=True)
class Table:
    """caption; column names; rows of cells, already formatted."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """One part of the report. numbers: goes into metrics.json under ``name``. figures: (caption, data: address) pairs.

    summary: what the report opens with whatever was found. untested: what this part should have looked at and did not, sentences.
    """

    name: str
    title: str
    explanation: str
    numbers: dict = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)


def worst(test: str, text: str, names: list[str], values: list[float], limits: list[float]) -> list[Finding]:
    """One finding for all the values that exceed their limits: ``text`` with their names in place of {}, and the worst value."""
    beyond = [
        (value / limit, name, value, limit) for name, value, limit in zip(names, values, limits, strict=True) if value > limit
    ]
    if not beyond:
        return []
    _, _, value, limit = max(beyond)
    return [Finding(test, text.format(", ".join(name for _, name, _, _ in beyond)), float(value), float(limit))]


def number(value: float | None, digits: int = 3) -> str:
    """A number as the tables print it; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"
