"""Noise and cell sprites for the demo tissue: everything is a stain density (hematoxylin, eosin), numpy and scipy only.

Lengths are in pixels unless a name ends in ``_um``; noise has zero mean and about unit variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import fft, ndimage

SIDE = 1024  # of the periodic noise tiles; a power of two, so that wrapping is a bit mask
DIRECTIONS = 12  # fibre textures between 0 and 180 degrees; between two of them the painter interpolates
ANGLES = 24  # orientations of each cell sprite over 180 degrees
VARIANTS = 10  # cells of each kind and orientation, at most; fewer of large ones
FIBRES = ((0.65, 15.0, 1.1), (0.95, 6.0, 0.36), (0.35, 30.0, 3.5))  # weight, half length and half width in micrometres


def resize(field: np.ndarray, shape: tuple[int, int], box: tuple[float, ...] | None = None) -> np.ndarray:
    """``field`` (h, w) float32, or its ``box`` (left, top, right, bottom), stretched to ``shape`` with bicubic weights."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(field)).resize(shape[::-1], Image.Resampling.BICUBIC, box))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """(h, w) float32 noise whose features are about ``scale`` pixels across, without period."""
    step = max(scale / 2, 1.0)
    knots = rng.standard_normal([int(np.ceil(side / step)) + 4 for side in shape], np.float32)
    # Smoothed knots hide the directions of the grid; 3.2 restores the unit variance.
    knots = ndimage.gaussian_filter(knots, 0.9) * np.float32(3.2)
    y, x = rng.uniform(1, 2, 2).tolist()
    return resize(knots, shape, (x, y, x + shape[1] / step, y + shape[0] / step))


def magnify(field: np.ndarray, step: int, window: tuple[slice, slice]) -> np.ndarray:
    """The part of ``field`` (on a grid ``step`` pixels wide) below a ``window`` in pixels, with bicubic weights."""
    rows, columns = window
    box = (columns.start / step, rows.start / step, columns.stop / step, rows.stop / step)
    return resize(field, (rows.stop - rows.start, columns.stop - columns.start), box)


def _noise_tile(spectrum: np.ndarray, gain: np.ndarray) -> np.ndarray:
    gain[0, 0] = 0
    tile = fft.irfft2(spectrum * gain, s=(SIDE, SIDE), workers=1)
    return tile / tile.std()


def _spectrum(rng: np.random.Generator) -> np.ndarray:
    return fft.rfft2(rng.standard_normal((SIDE, SIDE), np.float32), workers=1)


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    return fft.fftfreq(SIDE).astype(np.float32)[:, None], fft.rfftfreq(SIDE).astype(np.float32)[None, :]


def fibre_tiles(rng: np.random.Generator, um: float) -> np.ndarray:
    """(DIRECTIONS, SIDE, SIDE) float32: bundles of collagen fibres that run at angle k * pi / DIRECTIONS (y points down)."""
    spectrum = _spectrum(rng)
    fy, fx = _frequencies()
    tiles = np.empty((DIRECTIONS, SIDE, SIDE), np.float32)
    for k in range(DIRECTIONS):
        cos, sin = math.cos(math.pi * k / DIRECTIONS), math.sin(math.pi * k / DIRECTIONS)
        along, across = (fx * cos + fy * sin) ** 2, (fy * cos - fx * sin) ** 2
        gain = np.zeros_like(along)
        for weight, length_um, width_um in FIBRES:
            length, width = length_um * um, width_um * um
            # The square root of the area makes each size of fibre contribute its weight to the standard deviation.
            gain += weight * math.sqrt(length * width) * np.exp(-2 * math.pi**2 * (along * length**2 + across * width**2))
        tiles[k] = _noise_tile(spectrum, gain)
    return tiles


def grain_tiles(rng: np.random.Generator, um: float, sizes_um: tuple[float, ...]) -> list[np.ndarray]:
    """For each size one (SIDE, SIDE) float32 tile of isotropic band-pass noise: granules and vacuoles."""
    fy, fx = _frequencies()
    square = -2 * math.pi**2 * (fx**2 + fy**2)
    sigmas = [size * um / 2 for size in sizes_um]
    return [_noise_tile(_spectrum(rng), np.exp(square * s**2) - np.exp(square * (2.2 * s) ** 2)) for s in sigmas]


def spread(rng: np.random.Generator, tile: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A periodic tile continued over ``shape`` from a random place, mirrored at random."""
    tile = tile[:: int(rng.choice((-1, 1))), :: int(rng.choice((-1, 1)))]
    rows, columns = ((np.arange(side) + int(rng.integers(SIDE))) & (SIDE - 1) for side in shape)
    return tile[rows[:, None], columns[None, :]]


@dataclass(frozen=True)
class CellKind:
    """How cells of one kind look. Half axes in micrometres (lowest, highest); densities are stain concentrations at the centre.

    ``rim`` is the darker nuclear membrane, ``clumps`` the strength of the chromatin texture, ``nucleolus`` the density of its
    spot, ``bend`` the curvature of the long axis, ``uneven`` how far the outline leaves the ellipse, ``rings`` the contrast of
    concentric layers (corpora amylacea).
    """

    long_um: tuple[float, float]
    short_um: tuple[float, float]
    base: tuple[float, float]
    rim: float = 0.3
    clumps: float = 0.25
    nucleolus: float = 0.0
    bend: float = 0.0
    uneven: float = 0.06
    eosin: float = 0.1
    rings: float = 0.0


CELL_KINDS = {
    "luminal": CellKind((3.3, 4.3), (2.8, 3.4), (0.55, 0.95), 0.42, 0.35, 0.3),
    "basal": CellKind((3.6, 5.6), (1.2, 1.8), (0.95, 1.4), 0.2, 0.2, bend=0.25),
    "acinar": CellKind((3.4, 4.5), (3.1, 3.9), (0.35, 0.75), 0.6, 0.4, 1.1),
    "fused": CellKind((3.3, 4.6), (2.9, 3.8), (0.38, 0.85), 0.55, 0.42, 0.9, uneven=0.08),
    "anaplastic": CellKind((3.3, 5.6), (2.8, 4.2), (0.3, 1.1), 0.55, 0.5, 1.1, uneven=0.11),
    "spindle": CellKind((4.5, 9.5), (0.9, 1.7), (0.85, 1.4), 0.15, 0.25, bend=0.35, uneven=0.08),
    "lymphocyte": CellKind((2.6, 3.3), (2.5, 3.0), (1.3, 1.7), 0.1, 0.35),
    "pyknotic": CellKind((0.8, 2.3), (0.7, 1.8), (1.3, 2.0), 0.0, 0.1, uneven=0.15, eosin=0.5),
    "erythrocyte": CellKind((2.6, 3.4), (2.2, 3.1), (0.0, 0.03), 0.0, 0.0, uneven=0.05, eosin=1.5),
    "crystalloid": CellKind((3.0, 9.0), (0.7, 1.3), (0.0, 0.02), 0.0, 0.0, eosin=1.7),
    "corpus": CellKind((9.0, 19.0), (8.0, 16.0), (0.02, 0.15), 0.0, 0.3, uneven=0.05, eosin=0.8, rings=0.3),
}


def cell_sprites(rng: np.random.Generator, kind: CellKind, um: float) -> np.ndarray:
    """(ANGLES * n, 3, s, s) float32: hematoxylin, eosin, coverage of n cells per angle, sorted by angle over 180 degrees."""
    count = ANGLES * min(VARIANTS, int(50 / kind.long_um[1]))
    half = int(np.ceil(kind.long_um[1] * um * 1.25)) + 2
    grid = np.arange(-half, half + 1, dtype=np.float32)

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    bins = np.arange(ANGLES, dtype=np.float32).repeat(count // ANGLES)[:, None, None]
    angle = math.pi / ANGLES * (bins + draw(-0.5, 0.5))
    y, x = grid[None, :, None] + draw(-0.5, 0.5), grid[None, None, :] + draw(-0.5, 0.5)
    long, short = draw(*kind.long_um) * um, draw(*kind.short_um) * um
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle) + draw(-kind.bend, kind.bend) * (u / long) ** 2 * long * 0.5
    polar = np.arctan2(v / short, u / long)
    outline = 1 + sum(draw(-kind.uneven, kind.uneven) * np.cos(n * polar + draw(0, 6.28)) for n in (2, 3, 4))
    radius = np.hypot(u / long, v / short) / outline
    coverage = np.clip(0.5 + (1 - radius) * short / draw(0.9, 2.0), 0, 1)
    clumps = ndimage.gaussian_filter(rng.standard_normal(radius.shape, np.float32), (0, 0.45 * um, 0.45 * um))
    density = draw(*kind.base) * (1 + draw(0.4, 1.3) * kind.clumps * clumps / clumps.std())
    density = density + kind.rim * draw(0.5, 1.3) * np.exp(-(((radius - 0.88) * short / (0.55 * um)) ** 2))
    if kind.nucleolus:
        spot = np.hypot(u - draw(-0.3, 0.3) * long, v - draw(-0.3, 0.3) * short) / (draw(0.6, 0.95) * um)
        density = density + kind.nucleolus * draw(0.1, 1.2) * np.exp(-(spot**2))
    eosin = kind.eosin * draw(0.7, 1.2) * (1 - 0.25 * np.exp(-((radius * 1.6) ** 2)))
    if kind.rings:
        eosin = eosin * (1 + kind.rings * np.cos(radius * draw(12, 30) + draw(0, 6.28)))
    return np.stack([np.maximum(density, 0.0) * coverage, eosin * coverage, coverage], 1).astype(np.float32)
