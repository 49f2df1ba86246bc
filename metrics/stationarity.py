"""Tissue has no preferred position: over many patches, every pixel position must look the same.

A generator that paints something into one place of every image (rings in the corners, a seam along the border, both known to it
from
its own zero padding) can please a feature distance; it cannot pass here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter

from common.html import figure_uri
from metrics.section import Section, Table, worst

LIMIT = 6.5  # standard errors: the largest of all positions, fields and scales stays below it on real patches (docs/evaluation.md)
REAL_MARGIN = 1.3  # times what real patches show, where they are less even than that
MAX_SIDE = 128  # pixels: larger images are halved first, which keeps what recurs and takes a quarter of the time
COARSE = 16  # parts of a side over which the second scale averages
FIELDS = ("red density", "green density", "blue density", "edge energy", "contrast")
_CHUNK = 128


@dataclass(frozen=True)
class PositionMaps:
    """Mean over images of each field at each position, (2, F, S, S): fine detail, and averages over a sixteenth of the side.

    error: (2, F, 1, 1), standard error of one position. The error of a position is that of the whole map: a position that never
    varies must not look infinitely certain.
    """

    mean: np.ndarray
    error: np.ndarray


def optical_density(images: np.ndarray) -> np.ndarray:
    """Intensities 0..255 -> absorbance -log10(I / 255), float32, in which stains add up (Ruifrok and Johnston 2001); 0 counts as
    1.
    """
    return -np.log10(np.maximum(images, 1, dtype=np.float32) / 255)


def fields(images: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (5, N, S, S) float32, FIELDS in order, each relative to its own image so that dark patches weigh no
    more.
    """
    density = optical_density(images)
    density -= density.mean((1, 2), keepdims=True)
    grey = density.mean(3)
    steps = np.abs(np.diff(grey, axis=1, append=grey[:, -2:-1])) + np.abs(np.diff(grey, axis=2, append=grey[:, :, -2:-1]))
    # Roots and absolute values rather than squares: a few strong edges must not carry the mean of a position.
    parts = (np.sqrt(steps), np.abs(grey))
    relative = [part / np.maximum(part.mean((1, 2), keepdims=True), 1e-4) - 1 for part in parts]
    return np.stack([*np.moveaxis(density, 3, 0), *relative])


def _reduced(images: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return images
    side = images.shape[1] // factor
    blocks = images[:, : side * factor, : side * factor].reshape(len(images), side, factor, side, factor, 3)
    return blocks.mean((2, 4), dtype=np.float32)


def position_maps(images: np.ndarray) -> PositionMaps:
    """Maps of images (N, S, S, 3) uint8."""
    halving = -(-images.shape[1] // MAX_SIDE)
    side = images.shape[1] // halving
    width = max(side // COARSE, 2)
    sums, squares = np.zeros((2, 2, len(FIELDS), side, side))
    for start in range(0, len(images), _CHUNK):
        values = fields(_reduced(images[start : start + _CHUNK], halving))
        coarse = uniform_filter(values, (0, 0, width, width), mode="reflect")
        for scale, part in enumerate((values - coarse, coarse)):
            sums[scale] += part.sum(1)
            squares[scale] += np.einsum("fnyx,fnyx->fyx", part, part)
    mean = sums / len(images)
    variance = np.maximum(squares / len(images) - mean**2, 0).mean((2, 3), keepdims=True)
    return PositionMaps(mean, np.sqrt(variance / len(images)) + 1e-9)


def deviations(fake: PositionMaps, real: PositionMaps) -> dict[str, np.ndarray]:
    """Field -> (S, S): how many standard errors each position of ``fake`` lies from real tissue, the larger of both scales.

    Patches that were cut on a grid may be uneven themselves. Who trained with flips and quarter turns learnt their average over
    the symmetries of the square: the reference is the real map or that average, whichever is nearer.
    """
    error = np.sqrt(fake.error**2 + real.error**2)
    references = (real.mean, _symmetrised(real.mean))
    z = min(((fake.mean - mean) / error for mean in references), key=lambda z: (z**2).sum())
    larger = np.where(np.abs(z[0]) > np.abs(z[1]), z[0], z[1])
    return dict(zip(FIELDS, larger, strict=True))


def _symmetrised(maps: np.ndarray) -> np.ndarray:
    turned = [np.rot90(maps, quarter, (2, 3)) for quarter in range(4)]
    return np.mean([*turned, *(turn[..., ::-1] for turn in turned)], axis=0)


def stationarity_section(fake: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Section:
    """Evenness of generated images against the training patches, with held-out patches as the control."""
    reference = position_maps(train)
    generated, control = (deviations(position_maps(images), reference) for images in (fake, held_out))
    section = Section("stationarity", "Does something sit in the same place of every image?", _EXPLANATION)
    rows, beyond = [], []
    for field in FIELDS:
        value, real = (float(np.abs(maps[field]).max()) for maps in (generated, control))
        limit = max(LIMIT, REAL_MARGIN * real)
        rows.append([field, f"{value:.1f}", f"{real:.1f}", f"{limit:.1f}"])
        section.numbers[field] = {"generated": value, "held_out": real, "limit": limit}
        beyond.append((f"{field} {where(generated[field])}", value, limit))
    text = "every image has something in the same place: {}"
    section.findings += worst("stationarity", text, *map(list, zip(*beyond, strict=True)))
    columns = ["field", "generated", "held-out real", "limit"]
    section.tables.append(Table("Largest deviation of any position, in standard errors", columns, rows))
    section.figures.append(("Deviation per position in standard errors", _heat_maps(generated, control)))
    return section


_EXPLANATION = (
    "Mean, contrast and edge energy of every pixel position over all images. On tissue they are even up to chance; a ring, a seam "
    "or a "
    "spot that recurs shows as a structure in the map. Feature distances overlook it."
)


def where(z: np.ndarray) -> str:
    """Where the largest |z| of a (S, S) map lies, in words: a corner, a border, or inside."""
    row, column = np.unravel_index(np.abs(z).argmax(), z.shape)
    edge = max(len(z) // 8, 1)
    vertical = "top" if row < edge else "bottom" if row >= len(z) - edge else ""
    horizontal = "left" if column < edge else "right" if column >= len(z) - edge else ""
    if vertical and horizontal:
        return f"in the {vertical} {horizontal} corner"
    return f"at the {vertical or horizontal} border" if vertical or horizontal else f"inside, around row {row}, column {column}"


def _heat_maps(generated: dict[str, np.ndarray], control: dict[str, np.ndarray]) -> str:
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, len(FIELDS))
    for row, (name, maps) in enumerate((("generated", generated), ("held-out real", control))):
        for axis, field in zip(axes[row], FIELDS, strict=True):
            picture = axis.imshow(maps[field], cmap="RdBu_r", vmin=-2 * LIMIT, vmax=2 * LIMIT, interpolation="nearest")
            axis.set_title(f"{field}, {name}", fontsize=9)
            axis.set_axis_off()
    figure.colorbar(picture, ax=axes, shrink=0.7)
    return figure_uri(figure)
