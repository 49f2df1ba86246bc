"""Where is tissue, where is pen, what is blank or blurred: numpy in, numpy out.

Tissue takes up stain, glass and padding do not: both hematoxylin and eosin absorb green light most (Ruifrok and Johnston,
Analytical and Quantitative Cytology and Histology 23, 2001), whatever the scanner's white. So tissue is found by colour in
optical density, relative to the slide's own background, with Otsu's threshold (IEEE Transactions on Systems, Man, and
Cybernetics 9, 1979) held between limits that keep it sane on a slide that is all tissue or none.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from PIL import Image
from scipy import ndimage

STAIN_LIMITS = (0.045, 0.055)  # optical density of colour between which the threshold for tissue lies
MIN_PIECE = 40  # pixels of the overview; smaller pieces are dust
MAX_HOLE = 600  # pixels of the overview; larger holes (wide lumina, gaps between cores) stay holes
MIN_PEN = 25  # pixels of the overview; smaller specks are pigment or dust
PEN_MARGIN = 2  # pixels of the overview by which a mark's frayed edge is widened
MIN_STAINED = 0.15  # share of a patch that must be stained, else it is blank
FOCUS_MPP = 0.5  # micrometres per pixel at which focus is judged
# Measured on 667 patches of 43 real slides: 3 sharp ones count as blurred; blurred by a Gaussian of 2 pixels (1 um) all do, of
# 1 pixel 26.
MIN_FINE_DETAIL = 0.023
MIN_DETAIL = 20.0  # grey levels squared
MIN_SIDE_TO_QUARTER = 64  # pixels
MAX_PEN_SHARE = 0.05  # of a patch at full resolution
MIN_CONTRAST = 6.0  # standard deviation of grey levels at a quarter of the size; the flattest tissue lies above, glass below


def optical_density(rgb: np.ndarray, white: float | np.ndarray = 255.0) -> np.ndarray:
    """Optical density (Beer-Lambert): -log10(I / white), float32 of the same shape, 0 and up. ``rgb``: uint8, ``white``: 1..255."""
    table = -np.log10(np.maximum(np.arange(256, dtype=np.float32), 1.0) / 255.0)
    shift = np.log10(np.asarray(white, np.float32) / 255.0)
    return np.maximum(table[rgb] + shift, 0.0)


_LEVELS = np.arange(256, dtype=np.uint8)


def background(rgb: np.ndarray) -> np.ndarray:
    """The glass's colour as three numbers 1..255: the commonest bright and nearly grey colour other than pure white padding.

    255 three times where hardly anything looks like glass.
    """
    planes = [np.ascontiguousarray(rgb[..., i]) for i in range(3)]
    lowest, highest = np.minimum.reduce(planes), np.maximum.reduce(planes)
    glass = (highest > 200) & (lowest > 170) & (highest - lowest < 22) & (lowest < 255)
    colours = [plane[glass] for plane in planes]
    if len(colours[1]) < 0.05 * lowest.size:
        return np.full(3, 255.0)
    commonest = int(np.argmax(np.bincount(colours[1], minlength=256)))
    near = (colours[1] >= max(commonest - 3, 0)) & (colours[1] <= min(commonest + 3, 255))
    return np.array([_median(plane[near]) for plane in colours])


def _median(values: np.ndarray) -> float:
    """Median of uint8 ``values``, from how often each occurs: they need not be sorted for it."""
    below = np.bincount(values, minlength=256).cumsum()
    return float(np.searchsorted(below, [(values.size - 1) // 2, values.size // 2], side="right").mean())


def otsu(values: np.ndarray, bins: int = 128) -> float:
    """Otsu's threshold of ``values`` (any shape): splits them so that the variance between the two parts is largest."""
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + np.argmax(np.nan_to_num(between))])


def stain(rgb: np.ndarray, white: np.ndarray | float = 255.0) -> np.ndarray:
    """How strongly a pixel is coloured by stain: optical density of green beyond that of the clearest channel, (H, W) float32."""
    whites = np.broadcast_to(white, 3)
    red, green, blue = (optical_density(_LEVELS, whites[i]).take(rgb[..., i]) for i in range(3))
    return green - np.minimum(red, blue)


def find_tissue(overview: np.ndarray, pen: np.ndarray | None = None) -> np.ndarray:
    """Tissue on a slide's overview, (H, W, 3) uint8 at about 16 level-0 pixels a pixel, as a (H, W) bool mask.

    Specks are dropped and small lumina filled, so that a share of the mask is a share of tissue as a pathologist draws it.
    Pen marks are not tissue: ``pen`` is what ``find_pen`` says of the overview, where the caller knows it.
    """
    coloured = ndimage.uniform_filter(stain(overview, background(overview)), 3)
    threshold = float(np.clip(otsu(coloured), *STAIN_LIMITS))
    mask = (coloured > threshold) & ~(find_pen(overview) if pen is None else pen)
    mask = shrunk(_grown(np.pad(mask, 4), 2), 2)[4:-4, 4:-4]
    mask = _without_small(mask, MIN_PIECE)
    return mask | _small_holes(mask)


def _small_holes(mask: np.ndarray) -> np.ndarray:
    """Pieces of fewer than MAX_HOLE pixels outside ``mask`` that do not reach the edge of the picture."""
    pieces, count = ndimage.label(~mask)
    fill = np.bincount(pieces.ravel(), minlength=count + 1) < MAX_HOLE
    for edge in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        fill[edge] = False
    fill[0] = False  # the mask itself
    return fill[pieces]


def find_pen(overview: np.ndarray) -> np.ndarray:
    """Ink of marker pens (blue, green, black, red) on an overview (H, W, 3) uint8, as a (H, W) bool mask, edges included.

    A stroke counts where it is surely ink somewhere, and then as far as it could be ink: thin ink lets tissue shine through.
    """
    sure, possible = _ink(overview)
    if np.count_nonzero(sure) < MIN_PEN:
        return np.zeros(sure.shape, bool)
    strokes, count = ndimage.label(_grown(shrunk(np.pad(possible, 1, mode="edge")))[1:-1, 1:-1])
    evidence = np.bincount(strokes[sure], minlength=count + 1) >= MIN_PEN
    evidence[0] = False
    return _grown(evidence[strokes], PEN_MARGIN)


def _ink(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that are surely ink, and those that may be: colours that H&E does not have.

    H&E absorbs green more than red; blue and green ink do the reverse. Black ink is dark and grey where nuclei are dark and
    blue. Red ink is purer than eosin and blood.
    """
    red, green, blue = (rgb[..., i].astype(np.int16) for i in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    spread = brightest - np.minimum(np.minimum(red, green), blue)
    cold = (green - red > 8) & (spread > 25) & (red < 190)
    grey = (brightest < 140) & (spread < 35) & (blue - red < 15)
    scarlet = (red > 140) & (green < 80) & (np.abs(blue - green) < 30) & (red - green > 100)
    navy = (red < 50) & (blue - red > 50) & (green < red + 30)
    sure_cold = ((green - red > 20) & (spread > 30) & (red < 180)) | (navy & (red < 35))
    sure = sure_cold | (grey & (brightest < 80)) | (scarlet & (green < 60))
    return sure, cold | navy | grey | scarlet


class Inspection:
    """The tests of one patch at full resolution, (H, W, 3) uint8; what several of them look at is computed once.

    mpp: micrometres per pixel, 0.5 where unknown.
    """

    def __init__(self, patch: np.ndarray, mpp: float | None = None):
        self._image = Image.fromarray(patch)
        self._step = max(1, round(FOCUS_MPP / (mpp or FOCUS_MPP)))

    def is_blank(self) -> bool:
        """Whether it shows glass or padding rather than tissue: nearly flat, or hardly anything stained."""
        return bool(self._quarter_grey.std() < MIN_CONTRAST or _share(self._stained) < MIN_STAINED)

    def pen_share(self) -> float:
        """Share 0..1 that is surely ink, seen 16 times smaller: nuclei blend in."""
        return _share(_ink(np.asarray(self._image.reduce(16)))[0])

    def sharpness(self) -> float:
        """Variance of the Laplacian of its grey levels, squared grey levels; low means out of focus.

        Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.
        """
        return _variance(self._laplacian)

    def is_blurred(self) -> bool:
        """Whether half or more of its stained quarters are out of focus.

        Focus shows in how much of the detail at 2 um is left at 0.5 um, whatever the stain's contrast; where there is next to
        no detail at all a quarter is blurred beyond that comparison.
        """
        if self._step == 1:
            detail, coarse, stained = self._laplacian, _laplacian(self._quarter_grey), self._stained
        else:
            fine = self._image.reduce(self._step)
            small = fine.reduce(4)
            detail, coarse, stained = _laplacian(_grey(fine)), _laplacian(_grey(small)), _is_stained(small)
        if min(self._image.size) // self._step < MIN_SIDE_TO_QUARTER:
            return _lacks_detail(detail, coarse)
        parts = list(zip(_quarters(detail, 1), _quarters(coarse, 1), _quarters(stained, 0), strict=True))
        judged = [part for part in parts if _share(part[2]) >= 0.5] or parts
        return 2 * sum(_lacks_detail(fine, rough) for fine, rough, _ in judged) >= len(judged)

    @cached_property
    def _quarter(self) -> Image.Image:
        return self._image.reduce(4)

    @cached_property
    def _quarter_grey(self) -> np.ndarray:
        return _grey(self._quarter)

    @cached_property
    def _stained(self) -> np.ndarray:
        return _is_stained(self._quarter)

    @cached_property
    def _laplacian(self) -> np.ndarray:
        return _laplacian(_grey(self._image))


def _is_stained(image: Image.Image) -> np.ndarray:
    """Pixels that took up stain, (H, W) bool."""
    return stain(np.asarray(image)) > STAIN_LIMITS[0]


def _share(mask: np.ndarray) -> float:
    """Share 0..1 of a bool array that is True."""
    return np.count_nonzero(mask) / mask.size


def _quarters(array: np.ndarray, border: int) -> list[np.ndarray]:
    """The four quarters of an array that lost ``border`` positions on each side, each without its own border."""
    half_height, half_width = ((side + 2 * border) // 2 for side in array.shape)
    height, width = half_height - 2 * border, half_width - 2 * border
    return [array[y : y + height, x : x + width] for y in (0, half_height) for x in (0, half_width)]


def _lacks_detail(fine: np.ndarray, coarse: np.ndarray) -> bool:
    """Whether the Laplacian of a part varies little, or little beside that of the part seen four times smaller."""
    detail = _variance(fine)
    if not coarse.size:  # a patch of a few pixels
        return detail < MIN_DETAIL
    return detail < MIN_DETAIL or detail < MIN_FINE_DETAIL * _variance(coarse)


def _laplacian(grey: np.ndarray) -> np.ndarray:
    """(H, W) float32 -> (H - 2, W - 2): the four neighbours minus four times the middle."""
    result = grey[:-2, 1:-1] + grey[2:, 1:-1]
    result += grey[1:-1, :-2]
    result += grey[1:-1, 2:]
    result -= 4 * grey[1:-1, 1:-1]
    return result


def _variance(values: np.ndarray) -> float:
    values = values.ravel()
    return float(np.dot(values, values) / values.size - (values.sum(dtype=np.float64) / values.size) ** 2)


def _grey(image: Image.Image) -> np.ndarray:
    """Luminance (ITU-R 601) as float32."""
    return np.asarray(image.convert("L"), np.float32)


def _grown(mask: np.ndarray, times: int = 1) -> np.ndarray:
    """``mask`` with the four neighbours of each of its pixels: scipy's binary_dilation, ten times as fast."""
    for _ in range(times):
        result = mask.copy()
        result[1:] |= mask[:-1]
        result[:-1] |= mask[1:]
        result[:, 1:] |= mask[:, :-1]
        result[:, :-1] |= mask[:, 1:]
        mask = result
    return mask


def shrunk(mask: np.ndarray, times: int = 1) -> np.ndarray:
    """The pixels of ``mask`` (bool) whose four neighbours are in it too; outside the picture nothing is."""
    for _ in range(times):
        result = np.zeros_like(mask)
        inner = result[1:-1, 1:-1]
        np.logical_and(mask[1:-1, 1:-1], mask[:-2, 1:-1], out=inner)
        inner &= mask[2:, 1:-1]
        inner &= mask[1:-1, :-2]
        inner &= mask[1:-1, 2:]
        mask = result
    return mask


def _without_small(mask: np.ndarray, size: int) -> np.ndarray:
    """``mask`` without its connected pieces of fewer than ``size`` pixels."""
    pieces, count = ndimage.label(mask)
    if not count:
        return mask
    keep = np.bincount(pieces.ravel()) >= size
    keep[0] = False
    return keep[pieces]


class Shares:
    """Share of a bool mask (H, W) inside rectangles with fractional corners, exact and in constant time (summed-area table)."""

    def __init__(self, mask: np.ndarray):
        self._sums = np.pad(mask.astype(np.float32).cumsum(0, dtype=np.float64).cumsum(1), ((1, 0), (1, 0)))

    def __call__(self, x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
        """Shares 0..1 for top left corners ``x, y`` in mask pixels (arrays that broadcast); outside the mask counts as False."""
        x, y = np.asarray(x, float), np.asarray(y, float)
        rows, columns = (side - 1 for side in self._sums.shape)
        left, right, top, bottom = _split(x, columns), _split(x + width, columns), _split(y, rows), _split(y + height, rows)
        total = self._at(right, bottom) - self._at(left, bottom) - self._at(right, top) + self._at(left, top)
        return np.clip(total / (width * height), 0.0, 1.0)

    def _at(self, x: tuple, y: tuple) -> np.ndarray:
        (column, u, opposite_u), (row, v, opposite_v) = x, y
        upper = self._sums[row, column] * opposite_u + self._sums[row, column + 1] * u
        lower = self._sums[row + 1, column] * opposite_u + self._sums[row + 1, column + 1] * u
        return upper * opposite_v + lower * v


def _split(positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions held between 0 and ``length``: the pixel each lies in, how far into it, and how far from the next one."""
    positions = np.clip(positions, 0, length)
    pixel = np.minimum(positions.astype(int), length - 1)
    return pixel, positions - pixel, 1 - (positions - pixel)
