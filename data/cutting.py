"""One slide: find and rank the places for patches (scan), cut, label and write them (cut), draw what was chosen (overlay).

All three are pure functions of the slide and their job, whichever process runs them and however often: that is what makes a
run repeatable and resumable. Places are in level-0 pixels, top left corner.
"""

from __future__ import annotations

import errno
import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from common.errors import UserError
from common.files import replacing
from common.pictures import png
from common.seeding import derive_seed
from common.storage import Place, Remote
from data import tissue
from data.panda import BACKGROUND, LABELS, MASK_VALUES, SlideRecord, label_from_mask
from data.slides import Reading, Slide, SlideError, aligned

OFFSETS = 12  # grid positions tried along each axis to fit a piece of tissue
ROUNDING = 1e-6  # of shares and pixels, which sums and quotients miss by less
PLACES_AT_ONCE = 50_000  # whose share of tissue is computed in one go
MAX_PEN_SHARE = 0.01  # of a patch on the overview, where marks are widened
DENSE = 0.75  # patches with at least this share of tissue go before the others
OVERLAY_SIDE = 1200  # pixels, at most
MIN_OVERLAY_SIDE = 500  # pixels: a slide so small that its overview is smaller is read at a finer level for its overlay
JPEG_QUALITY = 95
LABEL_COLOURS = {"benign": "#1b9e4b", "gleason3": "#2b6cff", "gleason4": "#ff9500", "gleason5": "#e0115f", "unlabelled": "#555555"}
# Anything that libraries raise on a damaged file: recorded for the slide, the run goes on.
UNREADABLE = (SlideError, OSError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, MemoryError)


@dataclass(frozen=True)
class Job:
    """What a worker must know about one slide. mask_path is None where there is no mask. Places on other file systems are for
    ``data.staging``; the functions here take paths."""

    record: SlideRecord
    path: Place
    mask_path: Place | None
    folder: Place
    overlay: Place
    patch_size: int
    level: int
    mpp: float | None
    min_tissue: float
    seed: int
    format: str


@dataclass(frozen=True, slots=True)  # all of all slides are held at once
class Candidate:
    """A place for a patch. tissue: share of it, 0..1. label: what the mask's small level says; the full one decides later."""

    x: int
    y: int
    tissue: float
    label: str


@dataclass(frozen=True)
class Scan:
    """A slide's candidates, best first. cause: why there is none, else "". rejected: places left out, by reason."""

    candidates: list[Candidate] = field(default_factory=list)
    cause: str = ""
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """A patch that was written. index: its place in the scan's order."""

    index: int
    x: int
    y: int
    label: str
    level: int
    mpp: float | None
    tissue: float
    sharpness: float


@dataclass(frozen=True)
class Cutting:
    """What one cut gave: patches in the scan's order, the index to go on from, rejections by reason, and whether the overlay
    was drawn with it."""

    cuts: list[Cut]
    next_index: int
    rejected: dict[str, int]
    drawn: bool = False


@dataclass(frozen=True)
class Failure:
    """A slide that could not be used: where it failed (fetch, scan, mask, cut, overlay, worker) and why."""

    slide_id: str
    stage: str
    reason: str


def file_stem(slide_id: str) -> str:
    """``slide_id`` as the start of a file name: letters, digits, dot, dash, underscore; at most 100; changed ones get a hash."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", slide_id).lstrip(".")[:100]
    return safe if safe == slide_id else f"{safe}-{hashlib.sha256(slide_id.encode()).hexdigest()[:8]}"


def relative_path(slide_id: str, label: str, x: int, y: int, extension: str) -> str:
    """Where a patch lies inside the patch folder, with forward slashes."""
    return f"{label}/{file_stem(slide_id)}_{x}_{y}.{extension}"


def fingerprint(path: Place | None) -> list:
    """Size and modification time (ns) or version of a file, by which a changed slide is recognised; empty for a missing one."""
    if isinstance(path, Remote):
        return [path.size, path.version]
    try:
        status = path.stat() if path else None
    except OSError:
        status = None
    return [status.st_size, status.st_mtime_ns] if status else []


# ---------------------------------------------------------------------------------------------------------------- scanning


def scan(job: Job) -> Scan | Failure:
    """Find tissue on the slide's small level and rank the places for patches."""
    stage = "scan"
    try:
        with Slide(job.path) as slide:
            reading = slide.reading(job.level, job.mpp)
            downsample = slide.levels[reading.level].downsample
            span = job.patch_size * reading.factor * downsample
            overview, scale = slide.overview(max(1.0, min(16.0, span / 8)))
            extent = slide.levels[0].width, slide.levels[0].height
        found, rejected, cause = find_places(overview, scale, span, downsample, extent, job.min_tissue)
        stage = "mask"
        labels = _rough_labels(job, found, span, extent)
    except UNREADABLE as error:
        return Failure(job.record.slide_id, stage, _reason(error))
    candidates = [Candidate(x, y, share, label) for (x, y, share), label in zip(found, labels, strict=True)]
    return Scan(rank(candidates, job.record.slide_id, job.seed), cause, rejected)


def find_places(
    overview: np.ndarray, scale: float, span: float, downsample: float, extent: tuple[int, int], min_tissue: float
) -> tuple[list[tuple[int, int, float]], dict[str, int], str]:
    """Places for patches on tissue, as (x, y, tissue share) in level-0 pixels, with rejections by reason and the cause of none.

    Each piece of tissue gets the grid that fits it best; patches overlap by no whole pixel, lie inside the slide and start on whole
    pixels of the level they are read from. ``span``: side of a patch, ``scale``: side of an overview pixel, both in level-0
    pixels; ``extent``: width and height of the slide.
    """
    if min(extent) < span:
        return [], {}, f"smaller than one patch ({extent[0]} x {extent[1]} pixels)"
    pen = tissue.find_pen(overview)
    mask = tissue.find_tissue(overview, pen)
    shares, inked = tissue.Shares(mask), tissue.Shares(pen)
    side = span / scale
    taken: dict[tuple[int, int], list[tuple[int, int]]] = {}
    places, rejected = [], Counter()
    for left, top, piece in _pieces(mask, side, min_tissue):
        corners = list(_fit_grid(piece, left, top, side, scale, downsample, extent, min_tissue))
        xs, ys = np.array(corners, float).reshape(-1, 2).T / scale
        for (x, y), share, ink in zip(corners, shares(xs, ys, side, side), inked(xs, ys, side, side), strict=True):
            if share < min_tissue - ROUNDING or not _claim(taken, x, y, span, downsample):
                continue
            if ink > MAX_PEN_SHARE:
                rejected["pen"] += 1
                continue
            places.append((x, y, round(float(share), 4)))
    cause = "" if places else _why_none(mask, rejected, min_tissue)
    return places, dict(rejected), cause


def _why_none(mask: np.ndarray, rejected: Counter, min_tissue: float) -> str:
    if not mask.any():
        return "no tissue found"
    if rejected:
        return f"pen marks on all {rejected['pen']} places with tissue"
    return f"tissue on {mask.mean():.2%} of the slide, but nowhere {min_tissue:.0%} of a patch"


def _pieces(mask: np.ndarray, side: float, min_tissue: float):
    """Connected pieces of tissue, largest first: (left, top, mask of the piece), those too small for a patch left out."""
    labels, _ = ndimage.label(mask)
    boxes = ndimage.find_objects(labels)
    sizes = np.bincount(labels.ravel(), minlength=len(boxes) + 1)[1:]
    for index in sorted(range(len(boxes)), key=lambda i: (-sizes[i], i)):
        if sizes[index] >= 0.5 * min_tissue * side * side:
            rows, columns = boxes[index]
            yield columns.start, rows.start, labels[rows, columns] == index + 1


def _fit_grid(piece, left, top, side, scale, downsample, extent, min_tissue):
    """Corners of the grid over ``piece`` whose patches are filled best; level-0 pixels, aligned to the level.

    Filled best is the largest sum of squared tissue shares: full patches count for more than twice as many halves.
    """
    shares = tissue.Shares(piece)
    height, width = piece.shape
    offsets = np.arange(OFFSETS) / OFFSETS * side
    columns = -offsets[:, None] + np.arange(int(width / side) + 2) * side
    best, chosen = -1.0, None
    for ys, share in _grids(shares, columns, [np.arange(-dy, height, side) for dy in offsets], side):
        filled = (np.where(share >= min_tissue - ROUNDING, share, 0) ** 2).sum(axis=(0, 2))
        column = int(np.argmax(filled))
        if filled[column] > best:
            best, chosen = filled[column], (columns[column], ys, share[:, column] >= max(min_tissue / 2, 1e-6))
    xs, ys, enough = chosen
    for row, column in zip(*np.nonzero(enough), strict=True):
        x, y = (left + xs[column]) * scale, (top + ys[row]) * scale
        yield tuple(_inside(value, size, side * scale, downsample) for value, size in zip((x, y), extent, strict=True))


def _grids(shares: tissue.Shares, columns: np.ndarray, rows: list[np.ndarray], side: float):
    """(ys, shares of the patches with corners at these ys and all ``columns``) for each of ``rows``, several at a time: what a
    call costs is more than what it computes."""
    together = max(1, PLACES_AT_ONCE // (columns.size * max(map(len, rows))))
    for start in range(0, len(rows), together):
        some = rows[start : start + together]
        found = shares(columns.ravel()[None, :], np.concatenate(some)[:, None], side, side)
        for ys, share in zip(some, np.split(found, np.cumsum([len(ys) for ys in some])[:-1]), strict=True):
            yield ys, share.reshape(len(ys), *columns.shape)


def _inside(value: float, size: int, span: float, downsample: float) -> int:
    """``value`` aligned to the level, moved so that ``span`` pixels from it lie inside ``size`` where they fit."""
    last = int(np.floor((size - span) / downsample + 1e-6))
    return aligned(min(max(round(value / downsample), 0), max(last, 0)) * downsample, downsample)


def _claim(taken: dict, x: int, y: int, span: float, downsample: float) -> bool:
    """Whether a patch at (x, y) overlaps none that was claimed before; claims the place when so.

    Corners lie on whole pixels of the level, so neighbours of a span that is none are a fraction of a pixel nearer or further.
    """
    apart = (math.floor(span / downsample + ROUNDING) - 0.5) * downsample
    column, row = int(x // span), int(y // span)
    near = [place for i in (-1, 0, 1) for j in (-1, 0, 1) for place in taken.get((column + i, row + j), ())]
    if any(abs(x - other_x) < apart and abs(y - other_y) < apart for other_x, other_y in near):
        return False
    taken.setdefault((column, row), []).append((x, y))
    return True


def _rough_labels(job: Job, places, span: float, extent: tuple[int, int]) -> list[str]:
    """Labels of ``places`` from the mask's small level: good enough to rank by."""
    if job.mask_path is None or job.record.data_provider not in MASK_VALUES:
        return ["unlabelled"] * len(places)
    with Slide(job.mask_path, empty=BACKGROUND) as mask:
        if (mask.levels[0].width, mask.levels[0].height) != extent:
            size = f"{mask.levels[0].width} x {mask.levels[0].height}"
            raise SlideError(f"the mask has {size} pixels, the slide {extent[0]} x {extent[1]}")
        small, scale = mask.overview(max(1.0, min(16.0, span / 8)), nearest=True)
    red = small[..., 0]
    illegal = set(np.unique(red).tolist()) - set(MASK_VALUES[job.record.data_provider])
    if illegal:
        found = ", ".join(map(str, sorted(illegal)[:5]))
        raise SlideError(f"the mask holds values that {job.record.data_provider} does not use ({found}): damaged or lossy")
    side = max(1, round(span / scale))
    return [_label(red[int(y / scale) :, int(x / scale) :][:side, :side], job.record) for x, y, _ in places]


def _label(mask: np.ndarray, record: SlideRecord) -> str:
    return label_from_mask(mask, record.data_provider, record.gleason_score) if mask.size else "unlabelled"


def rank(candidates: list[Candidate], slide_id: str, seed: int) -> list[Candidate]:
    """The order in which candidates become patches.

    Labels take turns, so that the commonest tissue of a slide does not crowd out its cancer, and unlabelled places come last. Which
    label begins is drawn for each slide: where slides give one patch each, all labels are met with. Within a label, places dense
    with tissue come first; among equals a seeded hash of the place decides, so that no part of the slide is preferred.
    """
    by_label = {label: [] for label in LABELS}
    for candidate in candidates:
        order = (candidate.tissue < DENSE, derive_seed(seed, f"{slide_id}/{candidate.x}/{candidate.y}"))
        by_label[candidate.label].append((order, candidate))
    turns = []
    for label, items in by_label.items():
        items.sort(key=lambda item: item[0])
        drawn = derive_seed(seed, f"{slide_id}/{label}")
        turns += [((label == "unlabelled", turn, drawn), candidate) for turn, (_, candidate) in enumerate(items)]
    return [candidate for _, candidate in sorted(turns, key=lambda item: item[0])]


# ----------------------------------------------------------------------------------------------------------------- cutting


def cut(job: Job, candidates: list[Candidate], start: int, wanted: int) -> Cutting | Failure:
    """Write the first ``wanted`` patches that pass at full resolution, going through ``candidates`` from index ``start``."""
    cuts: list[Cut] = []
    rejected: Counter = Counter()
    position = start
    try:
        with Slide(job.path) as slide:
            cutter = _Cutter(job, slide, slide.reading(job.level, job.mpp))
            while len(cuts) < wanted and position < len(candidates):
                batch = range(position, min(position + wanted - len(cuts), len(candidates)))
                results = cutter.batch(batch, candidates)
                cuts += [results[i] for i in batch if isinstance(results[i], Cut)]
                rejected.update(results[i] for i in batch if isinstance(results[i], str))
                position = batch.stop
            cutter.close()
    except UNREADABLE as error:
        if isinstance(error, UserError) and not isinstance(error, SlideError):
            raise
        return Failure(job.record.slide_id, "cut", _reason(error))
    return Cutting(cuts, position, dict(rejected))


class _Cutter:
    """Reads, tests, labels and writes patches of one open slide."""

    def __init__(self, job: Job, slide: Slide, reading: Reading):
        self.job, self.slide, self.reading = job, slide, reading
        labelled = job.mask_path is not None and job.record.data_provider in MASK_VALUES
        self.mask = Slide(job.mask_path, empty=BACKGROUND) if labelled else None
        self.span = job.patch_size * reading.factor * slide.levels[reading.level].downsample

    def close(self) -> None:
        if self.mask:
            self.mask.__exit__()

    def batch(self, indices: range, candidates: list[Candidate]) -> dict[int, Cut | str]:
        """Cut candidates in the order in which they lie on the slide, so that each tile is decoded once."""
        places, size = [(candidates[i].x, candidates[i].y) for i in indices], self.job.patch_size
        labels = dict.fromkeys(range(len(places)), "unlabelled")
        if self.mask:
            labels |= {number: _label(part, self.job.record) for number, part in self.mask.labels(places, self.span, size)}
        patches = self.slide.patches(self.reading, places, size)
        return {indices[n]: self.one(indices[n], candidates[indices[n]], patch, labels[n]) for n, patch in patches}

    def one(self, index: int, place: Candidate, patch: np.ndarray, label: str) -> Cut | str:
        """The patch that was written, or the reason why it was not."""
        seen = tissue.Inspection(patch, self.reading.mpp)
        if seen.is_blank():
            return "blank"
        if seen.pen_share() > tissue.MAX_PEN_SHARE:
            return "pen"
        if seen.is_blurred():
            return "blur"
        target = self.job.folder / relative_path(self.job.record.slide_id, label, place.x, place.y, self.job.format)
        write_picture(target, patch)
        mpp = None if self.reading.mpp is None else round(self.reading.mpp, 6)
        return Cut(index, place.x, place.y, label, self.reading.level, mpp, place.tissue, round(seen.sharpness(), 2))


def write_picture(path: Path, rgb: np.ndarray) -> None:
    """Write (H, W, 3) uint8 as PNG or JPEG by the name's ending, whole or not at all. UserError where the disk refuses."""
    data = encode(rgb, path.suffix)
    try:
        try:
            _write(path, data)
        except FileNotFoundError:  # the first one of its folder
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, data)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check the folder"
        raise UserError(f"{path} cannot be written ({error.strerror}); {hint} and start again, it goes on from here") from error


def _write(path: Path, data: bytes) -> None:
    with replacing(path, durable=False) as file:
        file.write(data)


def encode(rgb: np.ndarray, suffix: str) -> bytes:
    """A picture's file content: PNG (lossless), or JPEG of quality 95 without chroma subsampling.

    Measured on 110 patches of real tissue, 256x256 on one core: this PNG 0.69 ms and 119 KiB; Paeth's filter with libpng's run
    lengths 2.6 ms and 109 KiB, PIL's own 15.9 ms and 107 KiB; JPEG 0.32 ms and 33 KiB. See ``benchmarks/png_speed.py``.
    """
    if suffix == ".png":
        return png(rgb)
    return imagecodecs.jpeg8_encode(rgb, level=JPEG_QUALITY, subsampling="444")


def _reason(error: BaseException) -> str:
    """One line that says what was wrong with a slide."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SlideError) else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------------------------------------------------------- overlays


def draw_overlay(job: Job, cuts: list[Cut]) -> Failure | None:
    """Write the slide's small level with the tissue's outline and the chosen patches, coloured by label."""
    try:
        with Slide(job.path) as slide:
            overview, _ = slide.overview()
            side = max(slide.levels[0].width, slide.levels[0].height)
            small = max(overview.shape) < MIN_OVERLAY_SIDE
            picture = slide.overview(max(1.0, side / MIN_OVERLAY_SIDE))[0] if small else overview
            reading = slide.reading(job.level, job.mpp)
            span = job.patch_size * reading.factor * slide.levels[reading.level].downsample
        write_picture(job.overlay, np.asarray(_overlay(picture, side, tissue.find_tissue(overview), span, cuts)))
    except UNREADABLE as error:
        if isinstance(error, UserError) and not isinstance(error, SlideError):
            raise
        return Failure(job.record.slide_id, "overlay", _reason(error))
    return None


def _overlay(picture: np.ndarray, extent: int, mask: np.ndarray, span: float, cuts: list[Cut]) -> Image.Image:
    """``picture`` with outline and patches. extent: the slide's longer side and span: a patch's side, in level-0 pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
    outline = Image.fromarray(mask & ~tissue.shrunk(mask)).resize(image.size, Image.Resampling.NEAREST)
    image.paste((20, 20, 20), mask=outline)
    draw, zoom = ImageDraw.Draw(image), max(image.size) / extent
    for item in cuts:
        x, y, side = (value * zoom for value in (item.x, item.y, span))
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=LABEL_COLOURS[item.label], width=max(1, round(side / 24)))
    return image
