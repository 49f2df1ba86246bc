"""Open whole-slide images: levels, micrometres per pixel, and regions as RGB with white outside the slide.

OpenSlide decides what a slide is and reads every format it knows. Levels of plain tiled TIFF (PANDA's slides and masks, Aperio
with JPEG) are read tile by tile with tifffile instead: each tile is decoded once and patches are cut from it, which gives
the pixels that OpenSlide gives at level 0 without its compositing, by far its most expensive step.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.storage import Place, files_in

SUFFIXES = (".tif", ".tiff", ".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif")
PLAUSIBLE_MPP = (0.02, 50.0)  # what a microscope can mean; 72 dpi left by an image editor would say 353
TILE_CACHE_BYTES = 192 * 2**20  # two rows of 512-pixel tiles of a slide 60,000 pixels wide
BAND = 512  # pixels of a level: regions are read band by band and in order inside each, so that tiles are decoded once
MAX_TILE_PIXELS = 4096 * 4096
MAX_OVERVIEW_PIXELS = 9_000_000
MAX_LEVEL_PIXELS = 20_000_000_000  # reading more than this for an overview takes minutes: the slide lacks its small levels
BLOCK = 2048  # side of the blocks in which a large level is reduced to an overview
_COMPRESSION_JPEG, _LOSSLESS = 7, {1, 5, 8, 32946}  # TIFF tag 259: none, LZW, two numbers for deflate
_DECODING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, struct.error)


class SlideError(UserError):
    """One slide (or its mask) cannot be used; the text is the reason that the user reads, without the path."""


@dataclass(frozen=True)
class Level:
    """One level of the pyramid: width and height in its own pixels, and level-0 pixels per pixel of it."""

    width: int
    height: int
    downsample: float


@dataclass(frozen=True)
class Reading:
    """How patches of one slide are read: ``factor`` pixels of ``level`` become one pixel of the patch; mpp is the patch's own."""

    level: int
    factor: float
    mpp: float | None


class Slide:
    """An open slide. Use as a context manager; open it in the process that reads from it.

    ``levels``: list of Level, largest first. ``mpp``: micrometres per level-0 pixel, None when the file states none that is
    plausible. empty: grey level of what the file leaves out and of what lies outside of it: glass, or in a mask its background.
    Raises SlideError when the file cannot be opened or a region cannot be decoded.
    """

    def __init__(self, path: Path, fast: bool = True, empty: int = 255):
        self.path, self._empty = Path(path), empty
        self._slide = _open(self.path)
        self.levels = [
            Level(*size, downsample)
            for size, downsample in zip(self._slide.level_dimensions, self._slide.level_downsamples, strict=True)
        ]
        self.mpp = _mpp(self._slide.properties)
        self._tiles = _TiffTiles.of(self.path, self._slide, self.levels, empty) if fast else None

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_) -> None:
        self._slide.close()
        if self._tiles:
            self._tiles.close()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Region as (height, width, 3) uint8. ``x, y``: top left corner in pixels of ``level``; ``empty`` outside."""
        if self._tiles and level in self._tiles.pages:
            region = self._tiles.read(level, x, y, width, height)
            if region is not None:
                return region
        return self._read_openslide(level, x, y, width, height)

    def _read_openslide(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        from openslide import OpenSlideError

        downsample = self.levels[level].downsample
        try:
            region = self._slide.read_region((round(x * downsample), round(y * downsample)), level, (width, height))
        except OpenSlideError as error:
            raise SlideError(f"a region of level {level} cannot be decoded ({error})") from error
        image = Image.new("RGB", region.size, (self._empty,) * 3)
        image.paste(region, mask=region.getchannel("A"))
        return np.asarray(image)

    def overview(self, finest: float = 16.0, nearest: bool = False) -> tuple[np.ndarray, float]:
        """The whole slide, small, and the level-0 pixels that one of its pixels spans.

        Reads the smallest level whose downsample is at most ``finest`` (or coarser where that would be too many pixels) and
        averages what is left; ``nearest`` picks pixels instead, for masks. Shape (H, W, 3) uint8.
        """
        base = self.levels[0]
        wanted = max(finest, math.sqrt(base.width * base.height / MAX_OVERVIEW_PIXELS))
        index = max(i for i, level in enumerate(self.levels) if i == 0 or level.downsample <= wanted * 1.1)
        level = self.levels[index]
        if level.width * level.height > MAX_LEVEL_PIXELS:
            raise SlideError(f"{level.width} x {level.height} pixels and no small level to find tissue on")
        step = max(1, round(wanted / level.downsample))
        small = self._reduced(index, step, nearest) if step > 1 else self.read(index, 0, 0, level.width, level.height)
        return small, level.downsample * step

    def _reduced(self, index: int, step: int, nearest: bool) -> np.ndarray:
        level = self.levels[index]
        block = BLOCK // step * step or step
        out = np.empty((-(-level.height // step), -(-level.width // step), 3), np.uint8)
        for y in range(0, level.height, block):
            for x in range(0, level.width, block):
                if self._tiles and self._tiles.left_out(index, x, y, block):
                    out[y // step : (y + block) // step, x // step : (x + block) // step] = self._empty
                    continue
                region = self.read(index, x, y, min(block, level.width - x), min(block, level.height - y))
                part = region[::step, ::step] if nearest else np.asarray(Image.fromarray(region).reduce(step))
                out[y // step : y // step + part.shape[0], x // step : x // step + part.shape[1]] = part
        return out

    def reading(self, level: int = 0, mpp: float | None = None) -> Reading:
        """How to read patches at pyramid ``level``, or at ``mpp`` micrometres per pixel when that is given.

        For ``mpp`` the coarsest level that is still as fine as wanted is read and reduced. Raises SlideError where the level
        does not exist, the slide states no mpp, or it would have to be enlarged by more than a quarter.
        """
        if mpp is None:
            if level >= len(self.levels):
                raise SlideError(f"has {len(self.levels)} level(s), level {level} does not exist")
            return Reading(level, 1.0, self.mpp and self.mpp * self.levels[level].downsample)
        if self.mpp is None:
            raise SlideError("states no micrometres per pixel, which --mpp needs; use --level for it")
        if self.mpp > mpp * 1.25:
            raise SlideError(f"has {self.mpp:.4g} um/pixel at best, too coarse for {mpp:g} um/pixel")
        fine = [i for i, item in enumerate(self.levels) if i == 0 or self.mpp * item.downsample <= mpp * 1.02]
        factor = mpp / (self.mpp * self.levels[fine[-1]].downsample)
        same = abs(factor - 1) < 0.005
        return Reading(fine[-1], 1.0 if same else factor, mpp)

    def patches(self, reading: Reading, places: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the place, patch (size, size, 3) uint8) for each of ``places``, in the order in which they lie on the slide.

        places: top left corners in level-0 pixels, as ``aligned`` gives them. Raises SlideError as ``read`` does.
        """
        downsample, span = self.levels[reading.level].downsample, size * reading.factor
        corners = [(round(x / downsample), round(y / downsample)) for x, y in places]
        for number, region in self._regions(reading.level, corners, math.ceil(span)):
            if reading.factor != 1.0:
                image = Image.fromarray(region)
                region = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=(0, 0, span, span)))
            yield number, region

    def _regions(self, level: int, corners: list[tuple[int, int]], side: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the corner, the square of ``side`` pixels at it) for each of ``corners``, all in pixels of ``level``."""
        if self._tiles and level in self._tiles.pages:
            for number, region in self._tiles.regions(level, corners, side):
                yield number, self._read_openslide(level, *corners[number], side, side) if region is None else region
            return
        for number in _in_bands(corners):
            yield number, self.read(level, *corners[number], side, side)

    def labels(self, places: Sequence[tuple[int, int]], span: float, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the place, a mask's red channel over ``span`` level-0 pixels at it) for each of ``places``, as ``patches``.

        Nearest neighbour at level 0, about ``size`` pixels a side, uint8.
        """
        span, step = round(span), max(1, int(span / size))
        if step == 1:
            yield from ((number, np.ascontiguousarray(region[..., 0])) for number, region in self._regions(0, places, span))
            return
        for number in _in_bands(places):  # row by row: the whole of it may be large
            x, y = places[number]
            yield number, np.stack([self.read(0, x, y + row, span, 1)[0, ::step, 0] for row in range(0, span, step)])


def aligned(value: float, downsample: float) -> int:
    """The level-0 coordinate nearest to ``value`` that a whole pixel of a level with ``downsample`` starts at."""
    return round(round(value / downsample) * downsample)


def _open(path: Path):
    try:
        import openslide
    except ImportError as error:
        raise UserError(f"reading slides needs openslide ({error}); pip install -r requirements.txt") from error
    if not path.is_file():
        raise SlideError("is not a file")
    if path.stat().st_size == 0:
        raise SlideError("is empty (0 bytes); fetch it again")
    if not os.access(path, os.R_OK):
        raise SlideError("may not be read; give yourself permission (chmod u+r)")
    try:
        return openslide.OpenSlide(str(path))
    except openslide.OpenSlideError as error:
        tiles = tiles_beyond_end(path)
        whole = tiles is not None and not tiles[0]
        kind = "a TIFF that OpenSlide does not read; save it as a tiled pyramid" if whole else "truncated or not a slide"
        raise SlideError(f"cannot be opened, {kind} ({error})") from error
    except OSError as error:
        raise SlideError(f"cannot be opened ({error.strerror or error})") from error


def tiles_beyond_end(path: Path) -> tuple[int, int] | None:
    """How many tiles or strips of a TIFF lie beyond the end of the file by its own index, of how many.

    None where tifffile does not understand it: OpenSlide has the last word.
    """
    tifffile = _tifffile()
    try:
        length = path.stat().st_size
        with tifffile.TiffFile(path) as tiff:
            ends = [np.add(page.dataoffsets, page.databytecounts) for page in tiff.pages if len(page.dataoffsets)]
    except (tifffile.TiffFileError, *_DECODING_ERRORS):
        return None
    return sum(int((end > length).sum()) for end in ends), sum(map(len, ends))


def _tifffile():
    """tifffile, imported only where it is needed, and silent: what is wrong with a file is ours to say."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return tifffile


def _mpp(properties) -> float | None:
    """Micrometres per level-0 pixel from OpenSlide's own property, else from TIFF resolution tags."""
    try:
        mpp = float(properties.get("openslide.mpp-x") or 0)
        if not mpp:
            unit = {"centimeter": 10_000.0, "inch": 25_400.0}[properties.get("tiff.ResolutionUnit", "")]
            mpp = unit / float(properties["tiff.XResolution"])
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return mpp if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] else None


class _TiffTiles:
    """Reads the tiled levels of a TIFF tile by tile.

    ``read`` keeps the last tiles decoded, those that BAND pixels of the level's height need: more would not be looked at again, and
    memory that is new to the process costs a tenth of decoding a tile into it.
    """

    def __init__(self, tiff, pages: dict[int, object], empty: int):
        self._tiff, self._empty = tiff, empty
        self.pages = pages
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._bytes, self._room = 0, TILE_CACHE_BYTES

    @classmethod
    def of(cls, path: Path, slide, levels: list[Level], empty: int) -> _TiffTiles | None:
        """The reader for a file where it applies to some level, else None."""
        tifffile = _tifffile()
        if slide.properties.get("openslide.vendor") not in {"generic-tiff", "aperio"}:
            return None
        try:
            tiff = tifffile.TiffFile(path)
            pages = {}
            for page in tiff.pages:
                size = (page.imagewidth, page.imagelength)
                match = [i for i, level in enumerate(levels) if (level.width, level.height) == size and i not in pages]
                if match and _readable(page):
                    pages[match[0]] = page
        except (*_DECODING_ERRORS, tifffile.TiffFileError):
            return None
        return cls(tiff, pages, empty)

    def close(self) -> None:
        self._tiff.close()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray | None:
        """As ``Slide.read``; None where a tile cannot be decoded here, so that OpenSlide has the last word."""
        page = self.pages[level]
        self._room = min(TILE_CACHE_BYTES, 3 * page.imagewidth * (BAND + height + 2 * page.tilelength))
        out = np.full((height, width, 3), self._empty, np.uint8)
        for index in _tiles_under(page, x, y, width, height):
            try:
                _paste(out, (x, y), page, index, self._kept(level, index))
            except _DECODING_ERRORS:
                return None
        return out

    def regions(self, level: int, corners: list[tuple[int, int]], side: int) -> Iterator[tuple[int, np.ndarray | None]]:
        """As ``Slide._regions``, with None for one that needs a tile which cannot be decoded here.

        Each tile is decoded once, copied at once to all that need it, while the processor has it at hand, and dropped: a third
        faster on a large slide than to keep tiles until the next row of patches asks for them.
        """
        page, needed_by, missing = self.pages[level], defaultdict(list), {}
        for number, (x, y) in enumerate(corners):
            indices = _tiles_under(page, x, y, side, side)
            missing[number] = len(indices)
            for index in indices:
                needed_by[index].append(number)
        yield from ((number, np.full((side, side, 3), self._empty, np.uint8)) for number, count in missing.items() if not count)
        unfinished: dict[int, np.ndarray | None] = {}
        for index in sorted(needed_by):
            self._spread(level, index, [(number, corners[number]) for number in needed_by[index]], side, unfinished)
            for number in needed_by[index]:
                missing[number] -= 1
                if not missing[number]:
                    yield number, unfinished.pop(number)

    def _spread(self, level: int, index: int, users: list, side: int, unfinished: dict[int, np.ndarray | None]) -> None:
        """Copy one tile to the ``unfinished`` regions of its ``users``, (number, corner) each; None for a tile that is damaged."""
        try:
            tile = self._decoded(level, index)
        except _DECODING_ERRORS:
            unfinished |= {number: None for number, _ in users}
            return
        for number, corner in users:
            out = unfinished[number] if number in unfinished else np.full((side, side, 3), self._empty, np.uint8)
            unfinished[number] = out
            if out is not None:
                _paste(out, corner, self.pages[level], index, tile)

    def left_out(self, level: int, x: int, y: int, side: int) -> bool:
        """Whether the file has no tile at all in the square of ``side`` pixels at (x, y); False for levels not read here."""
        page = self.pages.get(level)
        if page is None:
            return False
        columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
        left, right = x // page.tilewidth, min((x + side - 1) // page.tilewidth + 1, columns)
        below = range(y // page.tilelength, min((y + side - 1) // page.tilelength + 1, rows))
        return not any(any(page.databytecounts[row * columns + left : row * columns + right]) for row in below)

    def _kept(self, level: int, index: int) -> np.ndarray | None:
        """As ``_decoded``, from the tiles that are kept where it is among them."""
        key = level, index
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        tile = self._decoded(level, index)
        if tile is not None:
            self._cache[key] = tile
            self._bytes += tile.nbytes
        while self._bytes > self._room:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _decoded(self, level: int, index: int) -> np.ndarray | None:
        """Tile (h, w, 3); None for one that the file leaves out. Raises one of _DECODING_ERRORS for a damaged one."""
        page = self.pages[level]
        count = page.databytecounts[index]
        if not count:
            return None
        handle = self._tiff.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(count)
        if len(data) != count or (page.compression == _COMPRESSION_JPEG and data.rstrip(b"\0")[-2:] != b"\xff\xd9"):
            raise ValueError("tile is cut short")
        return page.decode(data, index, jpegtables=page.jpegtables)[0][0]


def _in_bands(corners: Sequence[tuple[int, int]]) -> list[int]:
    """Numbers of ``corners`` in an order that comes back to a tile soon."""
    return sorted(range(len(corners)), key=lambda i: (corners[i][1] // BAND, corners[i]))


def _readable(page) -> bool:
    """Whether a TIFF page is 8-bit RGB in tiles that tifffile decodes exactly as OpenSlide does."""
    return bool(
        page.is_tiled
        and page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and (page.compression == _COMPRESSION_JPEG or (page.compression in _LOSSLESS and page.photometric == 2))
        and page.photometric in {2, 6}
        and 0 < page.tilewidth * page.tilelength <= MAX_TILE_PIXELS
    )


def _tiles_under(page, x: int, y: int, width: int, height: int) -> list[int]:
    """Numbers of the tiles that a region of a page touches; it may lie partly or wholly outside."""
    across = -(-page.imagewidth // page.tilewidth)
    rows = range(max(y, 0) // page.tilelength, -(-min(y + height, page.imagelength) // page.tilelength))
    columns = range(max(x, 0) // page.tilewidth, -(-min(x + width, page.imagewidth) // page.tilewidth))
    return [row * across + column for row in rows for column in columns]


def _paste(out: np.ndarray, corner: tuple[int, int], page, index: int, tile: np.ndarray | None) -> None:
    """Copy what tile ``index`` of a page shows of the region at ``corner`` to ``out``; nothing for a tile that is left out."""
    if tile is None:
        return
    row, column = divmod(index, -(-page.imagewidth // page.tilewidth))
    x, y = column * page.tilewidth - corner[0], row * page.tilelength - corner[1]
    x0, y0 = max(x, 0), max(y, 0)
    x1 = min(x + tile.shape[1], out.shape[1], page.imagewidth - corner[0])
    y1 = min(y + tile.shape[0], out.shape[0], page.imagelength - corner[1])
    if x1 > x0 and y1 > y0:
        out[y0:y1, x0:x1] = tile[y0 - y : y1 - y, x0 - x : x1 - x]


def slide_files(folder: Place) -> list[Place]:
    """Everything in ``folder`` (not below it) that is named like a slide, sorted by name, hidden files left out."""
    return slides_among(files_in(folder).values())


def slides_among(files: Iterable[Place]) -> list[Place]:
    """Those of ``files`` that are named like a slide, hidden ones left out."""
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
