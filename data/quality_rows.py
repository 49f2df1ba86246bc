"""Checks of a patch folder that rest on its manifest alone: rows against files, paths and PANDA's rules; split, balance, amount."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import UserError
from data import manifest, shards
from data.findings import Facts, Finding, Scan, printable
from data.manifest import Patch
from data.panda import KNOWN_BAD, LABELS, PROVIDERS, gleason_patterns, isup_from_gleason
from data.staging import SETTINGS_NAME

MIXED_MPP = 1.3  # largest over smallest; PANDA's two scanners are at 0.45 to 0.50
# Patches wanted for one GAN, fewest and most.
TARGET = (5_000, 10_000)
CONFOUNDED = 0.3  # Cramer's V between grade and provider
PATTERNS = {"gleason3": 3, "gleason4": 4, "gleason5": 5}
REACHED = 0.95  # of --max_patches: some may have been set aside since
FEW_SHARE = 0.1  # a label with less than this share of the most frequent one
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def rows(folder: Path) -> tuple[list[Patch] | None, list[Finding]]:
    """Rows of the manifest, None when there is none that can be read, and what there is to say about that."""
    if shards.is_sharded(folder):
        index = shards.open_shards(folder)
        faults = tuple(map(printable, index.faults()))
        advice = "pack the patches again with extract_patches.py --shards"
        found = [Finding("broken", "shards", "shards that differ from their index", advice, faults)] if faults else []
        return index.rows(), found
    if not (folder / manifest.NAME).exists():
        advice = "provider, grade and split are unknown; extract_patches.py writes a manifest"
        return None, [Finding("warning", "no_manifest", f"no {manifest.NAME}", advice, (str(folder),))]
    try:
        return manifest.read_manifest(folder), []
    except UserError as error:
        advice = "labels were taken from the folders instead, and --quarantine will move nothing here before it is mended"
        return None, [Finding("broken", "manifest_damaged", f"{manifest.NAME} is damaged", advice, (printable(str(error)),))]


def facts(path: str, row: Patch | None, lone_split: bool = True) -> Facts:
    """What is known of one patch, from its row, else from its path (lone_split: see ``manifest.by_path``)."""
    if row is not None:
        return Facts(row.label, row.slide_id, row.data_provider, row.isup_grade, row.split)
    label, split = manifest.by_path(path, lone_split)
    return Facts(label, manifest.slide_by_path(path), split=split)


def manifest_findings(rows: list[Patch], by_path: dict[str, Patch], scans: dict[str, Scan]) -> Iterator[Finding]:
    """Rows against files, against their own path, and against each other."""

    def finding(severity: str, check: str, title: str, advice: str, items) -> Iterator[Finding]:
        if items := tuple(sorted(map(printable, items))):
            yield Finding(severity, check, title, advice, items)

    counts = Counter(manifest.plain(row.path) for row in rows)
    repeated = [f"{path}: {count} rows" for path, count in counts.items() if count > 1]
    yield from finding(
        "broken", "repeated_rows", "patches with several manifest rows", "--quarantine keeps the first row", repeated
    )
    missing = by_path.keys() - scans.keys()
    advice = "extract them again, or, where you removed them, let --quarantine take their rows out: extraction then leaves them out"
    yield from finding("broken", "missing_files", "manifest rows without a file", advice, missing)
    advice = "training does not see them; extract again or add their rows"
    yield from finding("warning", "stray_files", "files without a manifest row", advice, scans.keys() - by_path.keys())
    for check, title, advice, wrong in _ROW_RULES:
        items = [f"{row.path}: {reason}" for row in rows if (reason := wrong(row))]
        yield from finding("warning", check, title, advice, items)
    if mixed := magnifications(rows):
        advice = f"a GAN would learn both sizes of nuclei: extract with --mpp {mixed[1]} into another folder"
        found = [f"{mixed[0]} to {mixed[1]} micrometres a pixel"]
        yield from finding("warning", "mixed_mpp", "patches of different magnifications", advice, found)
    for name in ("data_provider", "isup_grade", "gleason_score"):
        values = defaultdict(set)
        for row in rows:
            values[row.slide_id].add(getattr(row, name))
        items = [f"{slide}: {', '.join(sorted(map(str, found)))}" for slide, found in values.items() if len(found) > 1]
        yield from finding("broken", f"several_{name}", f"slides with more than one {name}", "extract these slides again", items)


def magnifications(rows: list[Patch]) -> tuple[str, str] | None:
    """The finest and the coarsest micrometres a pixel, to print, where they are too different for one set of patches."""
    mpp = [row.mpp for row in rows if row.mpp]
    return (f"{min(mpp):.2g}", f"{max(mpp):.2g}") if mpp and max(mpp) > MIXED_MPP * min(mpp) else None


def _place(row: Patch) -> str:
    path = PurePosixPath(row.path)
    folder = manifest.by_path(row.path)[0]
    if len(path.parts) > 1 and folder != row.label:
        return f"lies under {folder}, row says {row.label}"
    match = manifest.SLIDE_X_Y.fullmatch(path.stem)
    if match is None:
        return "" if row.slide_id == row.path else f"row says slide {row.slide_id}, x {row.x}, y {row.y}"
    if (int(match["x"]), int(match["y"])) != (row.x, row.y):
        return f"row says x {row.x}, y {row.y}"
    named = match["slide"] == row.slide_id or not _FILE_NAME.fullmatch(row.slide_id)  # other ids are spelt differently in paths
    return "" if named else f"row says slide {row.slide_id}"


def _provider(row: Patch) -> str:
    return "" if row.data_provider in (*PROVIDERS, "") else f"{row.data_provider!r}"


def _grade(row: Patch) -> str:
    if not row.gleason_score:
        return ""
    expected = isup_from_gleason(row.gleason_score)
    if expected is None:
        return f"{row.gleason_score!r} is no Gleason score"
    return (
        "" if row.isup_grade in (expected, None) else f"score {row.gleason_score} means grade {expected}, row says {row.isup_grade}"
    )


def _pattern(row: Patch) -> str:
    patterns = gleason_patterns(row.gleason_score) if row.gleason_score else None
    if patterns is None or row.label not in PATTERNS:
        return ""
    if patterns == (0, 0):
        return f"{row.label} on a slide without cancer ({row.gleason_score})"
    # Karolinska's masks name no pattern: it is the slide's.
    wrong = row.data_provider == "karolinska" and set(patterns) != {PATTERNS[row.label]}
    return f"{row.label} on a slide of karolinska scored {row.gleason_score}" if wrong else ""


_ROW_RULES: tuple[tuple[str, str, str, Callable[[Patch], str]], ...] = (
    (
        "misplaced",
        "rows that disagree with their path",
        "training believes the row; extract again or mend whichever is wrong",
        _place,
    ),
    ("unknown_provider", "rows with an unknown provider", f"PANDA's providers are {' and '.join(PROVIDERS)}", _provider),
    ("grade_mismatch", "rows whose grade does not follow from the score", "check these slides in train.csv", _grade),
    ("label_mismatch", "labels that the slide's score contradicts", "check its mask and score, and extract again", _pattern),
    ("known_bad", "patches of slides known to be wrong", "leave these slides out", lambda row: KNOWN_BAD.get(row.slide_id, "")),
)


def split_findings(known: dict[str, Facts]) -> Iterator[Finding]:
    """A slide on both sides of the split, or nothing held out."""
    sides = defaultdict(Counter)
    for fact in known.values():
        if fact.split:
            sides[fact.slide_id][fact.split] += 1
    leaks = tuple(
        f"{slide}: {count['train']} train, {count['test']} test" for slide, count in sorted(sides.items()) if len(count) > 1
    )
    if leaks:
        advice = "evaluation would measure memory, not skill: give each slide one side and extract again"
        yield Finding("broken", "split_leak", "slides on both sides of the train/test split", advice, tuple(map(printable, leaks)))
    elif sides and len({split for count in sides.values() for split in count}) < 2:
        advice = "evaluate.py needs held-out slides: extract from at least four slides"
        yield Finding("warning", "one_sided_split", "all patches are on one side of the split", advice, (f"{len(sides)} slides",))


def cramers_v(table: np.ndarray) -> float:
    """Association of rows and columns of a table of counts: 0 none, 1 total (Cramer 1946). 0 for a single row or column."""
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0].astype(float)
    if min(table.shape, default=0) < 2:
        return 0.0
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
    return float(np.sqrt(((table - expected) ** 2 / expected).sum() / table.sum() / (min(table.shape) - 1)))


def balance_findings(known: dict[str, Facts]) -> Iterator[Finding]:
    """Rare labels, labels without held-out patches, grade confounded with provider."""
    labels = Counter(fact.label for fact in known.values() if fact.label in LABELS[:-1])
    most = max(labels.values(), default=0)
    few = tuple(f"{label}: {labels[label]:,}" for label in LABELS[:-1] if labels[label] < FEW_SHARE * most)
    if few:
        advice = "a conditional GAN learns these badly: extract more slides of these grades"
        yield Finding("warning", "few_of_label", f"labels with less than {FEW_SHARE:.0%} of the most frequent one", advice, few)
    held_out = {fact.label for fact in known.values() if fact.split == "test"}
    unseen = tuple(f"{label}: {count:,} patches, all for training" for label, count in labels.items() if label not in held_out)
    if held_out and unseen:
        advice = "evaluation cannot judge these labels: extract more slides of them"
        yield Finding("warning", "no_test_patches", "labels without held-out patches", advice, unseen)
    yield from _confounding(grade_by_provider(known))


def _confounding(table: np.ndarray) -> Iterator[Finding]:
    association = cramers_v(table)
    if association < CONFOUNDED:
        return
    alone = [(grade, PROVIDERS[int(row.argmax())]) for grade, row in enumerate(table) if np.count_nonzero(row) == 1]
    items = tuple(f"ISUP {grade} only from {provider}" for grade, provider in alone)
    advice = "a conditional GAN can then paint the scanner in place of the grade: balance by both, and report per provider"
    title = f"grade goes with provider (Cramer's V {association:.2f}; 0 is independent, 1 is the same thing)"
    yield Finding("warning", "confounded", title, advice, items or ("see the table of grades by provider",))


def grade_by_provider(known: dict[str, Facts]) -> np.ndarray:
    """Counts (6, providers) of the patches whose ISUP grade and provider are known."""
    table = np.zeros((6, len(PROVIDERS)), dtype=int)
    for fact in known.values():
        if fact.isup_grade is not None and fact.data_provider in PROVIDERS:
            table[fact.isup_grade, PROVIDERS.index(fact.data_provider)] += 1
    return table


def _limit(folder: Path) -> int | None:
    """What extract.json says of --max_patches; None where there is none that can be read."""
    try:
        return int(json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))["settings"]["max_patches"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def amount(folder: Path, known: dict[str, Facts]) -> Iterator[Finding]:
    """Whether there are as many patches as a GAN wants, and what it would take."""
    least, most = TARGET
    slides = len({fact.slide_id for fact in known.values()})
    if len(known) >= least:
        return
    missing = least - len(known)
    each = len(known) / max(slides, 1)
    limit = _limit(folder)
    if limit is not None and len(known) >= REACHED * limit:
        more = f" with a larger --max_patches of extract_patches.py than {limit:,}, if the slides have them"
    else:
        more = f", about {-(-missing // max(each, 1)):,.0f} more slides at {each:.1f} patches a slide" if known else ""
    advice = (
        f"{least:,} to {most:,} are good to have for one GAN: {missing:,} more{more}; fewer work too: train on while KID falls, "
        "and look for copies with evaluate.py"
    )
    yield Finding("warning", "amount", "fewer patches than wanted", advice, (f"{len(known):,} patches of {slides:,} slides",))
