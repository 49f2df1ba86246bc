"""Where is tissue, where is pen, what is blank or blurred: numpy in, numpy out.

Tissue takes up stain, glass and padding do not: both hematoxylin and eosin absorb green light most (Ruifrok and Johnston,
Analytical and Quantitative Cytology and Histology 23, 2001), whatever the scanner's white. So tissue is found by colour in
optical density, relative to the slide's own background, with Otsu's threshold (IEEE Transactions on Systems, Man, and
Cybernetics 9, 1979) held between limits that keep it sane on a slide that is all tissue or none.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

STAIN_LIMITS = (0.045, 0.09)  # optical density of colour between which the threshold for tissue lies
MIN_PIECE = 40  # pixels of the overview; smaller pieces are dust
MAX_HOLE = 600  # pixels of the overview; larger holes (wide lumina, gaps between cores) stay holes
MIN_PEN = 25  # pixels of the overview; smaller specks are pigment or dust
PEN_MARGIN = 2  # pixels of the overview by which a mark's frayed edge is widened
MIN_STAINED = 0.15  # share of a patch that must be stained, else it is blank
MIN_CONTRAST = 7.0  # standard deviation of grey levels of the flattest tissue; glass stays below


def optical_density(rgb: np.ndarray, white: float | np.ndarray = 255.0) -> np.ndarray:
    """Optical density (Beer-Lambert): -log10(I / white), float32 of the same shape, 0 and up. ``rgb``: uint8, ``white``: 1..255."""
    table = -np.log10(np.maximum(np.arange(256, dtype=np.float32), 1.0) / 255.0)
    shift = np.log10(np.asarray(white, np.float32) / 255.0)
    return np.maximum(table[rgb] + shift, 0.0)


def background(rgb: np.ndarray) -> np.ndarray:
    """The glass's colour as three numbers 1..255: the commonest bright colour that is not pure white padding.

    Glass may be tinted, so brightness relative to the slide decides; 255 three times where there is nothing like glass.
    """
    pixels = rgb.reshape(-1, 3)
    luminance = pixels.mean(axis=1)
    glass = pixels[(luminance > 190) & (np.ptp(pixels, axis=1) < 40) & (pixels.min(axis=1) < 255)]
    if len(glass) < 0.02 * len(pixels):
        return np.full(3, 255.0)
    grey = glass.mean(axis=1).astype(int)
    commonest = np.argmax(np.bincount(grey, minlength=256))
    return np.maximum(np.median(glass[np.abs(grey - commonest) <= 3], axis=0), 1.0)


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
    density = optical_density(rgb, white)
    return density[..., 1] - np.minimum(density[..., 0], density[..., 2])


def find_tissue(overview: np.ndarray) -> np.ndarray:
    """Tissue on a slide's overview, (H, W, 3) uint8 at about 16 level-0 pixels a pixel, as a (H, W) bool mask.

    Specks are dropped and small lumina filled, so that a share of the mask is a share of tissue as a pathologist draws it.
    Pen marks are not tissue.
    """
    coloured = ndimage.uniform_filter(stain(overview, background(overview)), 3)
    threshold = float(np.clip(otsu(coloured), *STAIN_LIMITS))
    mask = (coloured > threshold) & ~find_pen(overview)
    mask = ndimage.binary_closing(np.pad(mask, 4), iterations=2)[4:-4, 4:-4]
    mask = _without_small(mask, MIN_PIECE)
    return ~_without_small(~mask, MAX_HOLE)


def find_pen(overview: np.ndarray) -> np.ndarray:
    """Ink of marker pens (blue, green, black, red) on an overview (H, W, 3) uint8, as a (H, W) bool mask, edges included."""
    ink = _ink(overview)
    ink = _without_small(ndimage.binary_opening(np.pad(ink, 1, mode="edge"))[1:-1, 1:-1], MIN_PEN)
    return ndimage.binary_dilation(ink, iterations=PEN_MARGIN)


def _ink(rgb: np.ndarray) -> np.ndarray:
    """Pixels with a colour that H&E does not have: red absorbed more than green (blue, green), near black, or pure red."""
    red, green, blue = (rgb[..., i].astype(np.int16) for i in range(3))
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    cold = (green - red > 12) & (spread > 30) & (red < 180)
    black = (red < 75) & (green < 65) & (blue < 85) & (spread < 35)
    scarlet = (red > 140) & (green < 70) & (np.abs(blue - green) < 30) & (red - green > 110)
    return cold | black | scarlet


def pen_share(patch: np.ndarray) -> float:
    """Share 0..1 of a full-resolution patch (H, W, 3) uint8 that is ink, looked at eight times smaller so that nuclei blend in."""
    height, width = (side // 8 * 8 for side in patch.shape[:2])
    if not height or not width:
        return float(_ink(patch).mean())
    small = patch[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3))
    return float(_ink(small.astype(np.uint8)).mean())


def is_blank(patch: np.ndarray, white: np.ndarray | float = 255.0) -> bool:
    """Whether a patch (H, W, 3) uint8 shows glass or padding rather than tissue; ``white``: the slide's background."""
    grey = patch.mean(axis=2)
    return bool(grey.std() < MIN_CONTRAST or (stain(patch, white) > STAIN_LIMITS[0]).mean() < MIN_STAINED)


def sharpness(patch: np.ndarray) -> float:
    """Variance of the Laplacian of the grey patch (H, W, 3) uint8, in grey levels squared; low means out of focus.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.
    """
    grey = patch @ np.array([0.299, 0.587, 0.114], np.float32)
    return float(ndimage.laplace(grey).var())


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
        total = self._at(x + width, y + height) - self._at(x, y + height) - self._at(x + width, y) + self._at(x, y)
        return np.clip(total / (width * height), 0.0, 1.0)

    def _at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        height, width = (side - 1 for side in self._sums.shape)
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        column, row = np.minimum(x.astype(int), width - 1), np.minimum(y.astype(int), height - 1)
        u, v = x - column, y - row
        upper = self._sums[row, column] * (1 - u) + self._sums[row, column + 1] * u
        lower = self._sums[row + 1, column] * (1 - u) + self._sums[row + 1, column + 1] * u
        return upper * (1 - v) + lower * v
