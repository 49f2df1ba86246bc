"""Checks of a folder of slides: train.csv, the pyramids, the masks.

A slide's smallest level is read whole, and a few squares of its full resolution where that level shows tissue; a mask likewise,
where it shows labels. A TIFF's own index tells whether the file was cut short anywhere. Not every tile is decoded: that would take
hours on PANDA.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.progress import track
from data.cutting import UNREADABLE
from data.findings import Assessment, Finding, is_text, printable
from data.panda import (
    BACKGROUND,
    KNOWN_BAD,
    MASK_VALUES,
    PROVIDERS,
    TRAIN_CSV_COLUMNS,
    SlideRecord,
    isup_from_gleason,
    read_csv_rows,
    read_train_csv,
)
from data.quality import OD_TABLE, STAINED_OD
from data.slides import Slide, slide_files, tiles_beyond_end
from data.workers import WorkerDied, run_jobs

PANDA_LEVELS = 3
PLAUSIBLE_MPP = (0.2, 2.0)
SQUARES, SQUARE = 4, 512  # how many squares are read at full resolution, and their side in pixels
MIN_TISSUE_SHARE = 0.001  # of the overview; PANDA's emptiest usable slides hold about 1 %


@dataclass(frozen=True)
class SlideScan:
    """What was found in one slide and its mask. Errors are sentences, "" for none; mpp is None when not stated.

    mask_values: values in the red channel. mask_colours: another channel holds something. mask_error: "missing" without mask.
    """

    slide_id: str
    error: str = ""
    truncated: str = ""
    size: tuple[int, int] = (0, 0)
    downsamples: tuple[float, ...] = ()
    mpp: float | None = None
    tissue: float = 0.0
    mask_error: str = ""
    mask_size: tuple[int, int] | None = None
    mask_values: frozenset[int] = field(default_factory=frozenset)
    mask_colours: bool = False


def scan_slide(paths: tuple[Path, Path | None]) -> SlideScan:
    """Open one slide and its mask (None: none is expected) and read a little of both. Never raises for a bad file."""
    path, mask = paths
    about: dict = {"slide_id": path.stem, "truncated": _truncated(path)}
    try:
        with Slide(path) as slide:
            about |= {
                "size": (slide.levels[0].width, slide.levels[0].height),
                "downsamples": tuple(level.downsample for level in slide.levels),
                "mpp": slide.mpp,
            }
            about["tissue"] = _read_slide(slide)
    except UNREADABLE as error:
        about["error"] = str(error) or type(error).__name__
    if mask is not None:
        about |= _scan_mask(mask)
    return SlideScan(**about)


def _read_slide(slide: Slide) -> float:
    """Share of stained pixels on the overview; reads some full-resolution squares so that an undecodable tile shows itself."""
    overview, downsample = slide.overview()
    stained = OD_TABLE[overview].mean(axis=2) > STAINED_OD
    for x, y in _squares(stained, downsample):
        slide.read(0, x, y, SQUARE, SQUARE)
    return float(stained.mean())


def _squares(interesting: np.ndarray, downsample: float) -> Iterator[tuple[int, int]]:
    """Top left corners, in level-0 pixels, of up to SQUARES places evenly spread over the True pixels of an overview."""
    rows, columns = np.nonzero(interesting)
    for index in np.unique(np.linspace(0, max(len(rows) - 1, 0), SQUARES).astype(int)) if len(rows) else ():
        yield int(columns[index] * downsample), int(rows[index] * downsample)


def _scan_mask(path: Path) -> dict:
    if not path.exists():
        return {"mask_error": "missing"}
    truncated = _truncated(path)
    try:
        with Slide(path, empty=BACKGROUND) as mask:
            size = (mask.levels[0].width, mask.levels[0].height)
            overview, downsample = mask.overview(nearest=True)
            places = _squares(overview[..., 0] > 0, downsample)
            # Squares stay inside: what is outside is not the mask's.
            regions = [mask.read(0, x, y, min(SQUARE, size[0] - x), min(SQUARE, size[1] - y)) for x, y in places]
    except UNREADABLE as error:
        return {"mask_error": str(error) or type(error).__name__}
    regions.append(overview)
    values = frozenset(int(value) for region in regions for value in np.unique(region[..., 0]))
    colours = any((region != region[..., :1]).any() for region in regions) and any(region[..., 1:].any() for region in regions)
    return {"mask_error": truncated, "mask_size": size, "mask_values": values, "mask_colours": colours}


def _truncated(path: Path) -> str:
    """A sentence when a TIFF's index points beyond the end of the file; "" otherwise, and for other formats."""
    beyond, tiles = tiles_beyond_end(path) or (0, 0)
    return f"cut short: {beyond} of {tiles} tiles lie beyond the end of the file" if beyond else ""


def check_slide_folder(folder: Path, workers: int) -> Assessment:
    """Check train.csv, the slides and the masks of ``folder`` (PANDA's layout, or bare slide files)."""
    files = slide_files(folder / "train_images") + slide_files(folder)
    records, findings = _records(folder)
    findings += _csv_findings(records)
    findings += _file_findings(folder, records, files)
    masks = folder / "train_label_masks"
    expected = masks.is_dir() or any(record.data_provider in PROVIDERS for record in records)
    tasks = [(path, masks / f"{path.stem}_mask.tiff" if expected else None) for path in files]
    scans: list[SlideScan] = []
    if reason := _unopenable():
        advice = f"opening slides needs OpenSlide ({reason}): pip install -r requirements.txt"
        findings.append(Finding("warning", "not_opened", "slides were not opened", advice, tuple(path.name for path in files)))
    else:
        scans = _scan_all(folder, tasks, workers)
    providers = {record.slide_id: record.data_provider for record in records}
    findings += [*_scan_findings(scans), *_mask_findings(scans, providers)]
    summary = f"{len(files):,} slides, {len(records):,} rows in train.csv"
    return Assessment("slides", folder, summary, findings, _tables(records, files, scans, providers))


def _unopenable() -> str:
    try:
        import openslide  # noqa: F401  asked only whether it is there: data.slides imports it in the workers
    except (ImportError, OSError) as error:
        return printable(str(error))
    return ""


def _scan_all(folder: Path, tasks: list, workers: int) -> list[SlideScan]:
    scans = []
    for (path, _), scan in track(run_jobs(scan_slide, tasks, workers), f"checking {folder}", len(tasks), "slides"):
        died = isinstance(scan, WorkerDied)
        scans.append(SlideScan(path.stem, error="brought down the process that read it; fetch it again") if died else scan)
    return sorted(scans, key=lambda scan: scan.slide_id)


def _records(folder: Path) -> tuple[list[SlideRecord], list[Finding]]:
    path = folder / "train.csv"
    if not path.exists():
        advice = "fetch it for labels; without it all patches are unlabelled"
        return [], [Finding("warning", "no_csv", "no train.csv: provider and grade are unknown", advice, (printable(str(folder)),))]
    try:
        return read_train_csv(path), _spelling(read_csv_rows(path, TRAIN_CSV_COLUMNS))
    except UserError as error:
        return [], [Finding("broken", "csv_damaged", "train.csv is damaged", "fetch it again", (printable(str(error)),))]


def _spelling(rows: list[dict[str, str]]) -> list[Finding]:
    """Radboud writes ``negative``, Karolinska ``0+0``; the other way round is harmless but shows that a row was edited."""
    usual = {"negative": "radboud", "0+0": "karolinska"}
    items = [
        f"{row['image_id']}: {row['gleason_score']!r} by {row['data_provider']}"
        for row in rows
        if row["data_provider"] in PROVIDERS and usual.get(row["gleason_score"], row["data_provider"]) != row["data_provider"]
    ]
    title = "scores without cancer in the other provider's spelling"
    return list(_finding("note", "spelling", title, "harmless: both are read alike; was train.csv edited?", items))


def _finding(severity: str, check: str, title: str, advice: str, items: Iterable[str]) -> Iterator[Finding]:
    if items := tuple(map(printable, items)):
        yield Finding(severity, check, title, advice, items)


def _csv_findings(records: list[SlideRecord]) -> Iterator[Finding]:
    by_id = defaultdict(list)
    for record in records:
        by_id[record.slide_id].append(record)
    twice = {slide: rows for slide, rows in by_id.items() if len(rows) > 1}
    clash = [slide for slide, rows in twice.items() if len(set(rows)) > 1]
    advice = "nobody knows which row is right: mend train.csv"
    yield from _finding("broken", "contradictory_rows", "slides with contradictory rows in train.csv", advice, clash)
    same = [slide for slide in twice if slide not in clash]
    yield from _finding("warning", "repeated_rows", "slides with repeated rows in train.csv", "remove the repetitions", same)
    unknown = [f"{record.slide_id}: {record.data_provider!r}" for record in records if record.data_provider not in PROVIDERS]
    advice = f"masks are read only for {' and '.join(PROVIDERS)}: patches of these slides stay unlabelled"
    yield from _finding("warning", "unknown_provider", "slides of an unknown provider", advice, unknown)
    odd = [f"{record.slide_id}: {record.gleason_score!r}" for record in records if isup_from_gleason(record.gleason_score) is None]
    yield from _finding("warning", "no_score", "gleason_score that is no Gleason score", "mend train.csv", odd)
    wrong = [
        f"{record.slide_id}: score {record.gleason_score} means grade {expected}, the row says {record.isup_grade}"
        for record in records
        if (expected := isup_from_gleason(record.gleason_score)) is not None and expected != record.isup_grade
    ]
    advice = "leave these slides out, or mend train.csv"
    yield from _finding("warning", "grade_mismatch", "isup_grade that does not follow from gleason_score", advice, wrong)


def _file_findings(folder: Path, records: list[SlideRecord], files: list[Path]) -> Iterator[Finding]:
    names, known = Counter(path.stem for path in files), {record.slide_id for record in records}
    if not files:
        advice = "fetch slides with download_panda_data.py, or draw some with make_demo_slides.py"
        yield from _finding("broken", "no_slides", "no slides", advice, [str(folder)])
    twice = [name for name, count in names.items() if count > 1]
    yield from _finding("broken", "same_name", "slides in several files of one name", "keep one file of each", twice)
    if records:
        absent = sorted(known - set(names))
        yield from _finding(
            "note", "not_fetched", "rows of train.csv without a slide", "normal when only a part was downloaded", absent
        )
        advice = "their patches stay unlabelled: add their rows or leave them"
        yield from _finding("warning", "no_row", "slides without a row in train.csv", advice, sorted(set(names) - known))
    strange = [path.name for path in files if not is_text(path.name)]
    yield from _finding("broken", "name", "slides whose names are no plain text", "rename them: they are left out", strange)
    bad = [f"{slide}: {KNOWN_BAD[slide]}" for slide in sorted(set(names) & KNOWN_BAD.keys())]
    yield from _finding("warning", "known_bad", "slides known to be wrong", "leave them out", bad)
    stray = sorted(path.name for path in slide_files(folder / "train_label_masks") if path.stem.removesuffix("_mask") not in names)
    yield from _finding("note", "stray_masks", "masks without a slide", "nothing reads them", stray)


def _scan_findings(scans: list[SlideScan]) -> Iterator[Finding]:
    def slides(text) -> list[str]:
        return [f"{scan.slide_id}: {found}" for scan in scans if (found := text(scan))]

    advice = "fetch or convert them again; extraction leaves them out and lists them in failed_slides.csv"
    yield from _finding(
        "broken", "unreadable", "slides that cannot be read", advice, slides(lambda scan: scan.error or scan.truncated)
    )
    opened = [scan for scan in scans if not scan.error]
    blank = [f"{scan.slide_id}: {scan.tissue:.2%} stained" for scan in opened if scan.tissue < MIN_TISSUE_SHARE]
    yield from _finding("warning", "no_tissue", "slides without tissue", "they yield no patch; leave them out", blank)
    low, high = PLAUSIBLE_MPP
    unstated = [scan.slide_id for scan in opened if scan.mpp is None]
    advice = "choose what to read by --level, not by --mpp, in extract_patches.py"
    yield from _finding("warning", "no_mpp", "slides that state no plausible micrometres per pixel", advice, unstated)
    absurd = [f"{scan.slide_id}: {scan.mpp:.4g}" for scan in opened if scan.mpp is not None and not low <= scan.mpp <= high]
    title = f"slides whose micrometres per pixel lie outside {low} to {high}"
    yield from _finding("warning", "odd_mpp", title, "check the scanner's resolution tags", absurd)
    levels = [
        f"{scan.slide_id}: {len(scan.downsamples)} level(s), {' / '.join(f'{value:.4g}' for value in scan.downsamples)}"
        for scan in opened
        if len(scan.downsamples) != PANDA_LEVELS
    ]
    yield from _finding(
        "note", "levels", f"slides without PANDA's {PANDA_LEVELS} levels", "extraction reads them all the same", levels
    )


def _mask_findings(scans: list[SlideScan], providers: dict[str, str]) -> Iterator[Finding]:
    missing = [scan.slide_id for scan in scans if scan.mask_error == "missing"]
    advice = "patches of these slides stay unlabelled (PANDA itself lacks 100 masks)"
    yield from _finding("warning", "no_mask", "slides without a mask", advice, missing)
    damaged = [f"{scan.slide_id}: {scan.mask_error}" for scan in scans if scan.mask_error not in ("", "missing")]
    yield from _finding("broken", "mask_unreadable", "masks that cannot be read", "fetch them again", damaged)
    read = [scan for scan in scans if scan.mask_size is not None]
    both = [scan for scan in read if not scan.error]
    size = [f"{scan.slide_id}: mask {_by(scan.mask_size)}, slide {_by(scan.size)}" for scan in both if scan.mask_size != scan.size]
    advice = "labels would be taken from the wrong place: fetch slide and mask again"
    yield from _finding("broken", "mask_size", "masks of another size than their slide", advice, size)
    illegal = []
    for scan in read:
        legal = MASK_VALUES.get(providers.get(scan.slide_id, ""), {})
        strange = sorted(scan.mask_values - set(legal)) if legal else []
        if strange or scan.mask_colours:
            what = f"values {', '.join(map(str, strange[:8]))} in the red channel" if strange else "something in green or blue"
            illegal.append(f"{scan.slide_id} ({providers.get(scan.slide_id) or 'provider unknown'}): {what}")
    advice = f"resampled, compressed with loss, or another provider's (read: overview and {SQUARES} squares); fetch again"
    yield from _finding("broken", "mask_values", "masks with values their provider does not use", advice, illegal)
    blank = [scan.slide_id for scan in read if scan.mask_values == {0}]
    yield from _finding("warning", "blank_mask", "masks without any label", "patches of these slides stay unlabelled", blank)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _tables(
    records: list[SlideRecord], files: list[Path], scans: list[SlideScan], providers: dict[str, str]
) -> dict[str, list[list]]:
    tables = {}
    present = {path.stem for path in files}
    counts = Counter((record.isup_grade, record.data_provider) for record in records if record.slide_id in present)
    names = sorted({provider for _, provider in counts})
    if counts:
        rows = [[grade, *(counts[grade, name] for name in names)] for grade in sorted({grade for grade, _ in counts})]
        tables["Slides by ISUP grade"] = [["ISUP grade", *names], *rows]
    groups = defaultdict(list)
    for scan in scans:
        if not scan.error:
            groups[providers.get(scan.slide_id, "")].append(scan)
    if groups:
        head = ["provider", "slides", "micrometres per pixel", "median size", "median stained share"]
        tables["Slides by provider"] = [head, *(_provider_row(name, group) for name, group in sorted(groups.items()))]
    return tables


def _provider_row(name: str, scans: list[SlideScan]) -> list:
    mpp = sorted({f"{scan.mpp:.4f}" for scan in scans if scan.mpp})
    shown = ", ".join(mpp) if len(mpp) <= 3 else f"{mpp[0]} to {mpp[-1]}"
    width, height = np.median([scan.size for scan in scans], axis=0).astype(int)
    stained = np.median([scan.tissue for scan in scans])
    return [name or "unknown", len(scans), shown or "not stated", _by((width, height)), f"{stained:.0%}"]
