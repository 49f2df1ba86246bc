"""Tissue has no preferred position: over many patches, every pixel position must look the same.

A generator that paints something into one place of every image (rings in the corners, a seam along the border, both known to it
from its own zero padding) can please a feature distance; it cannot pass here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter

from common.html import figure_uri
from metrics.images import MIN_IMAGES, ImageSet
from metrics.section import Section, Table, number, worst

LIMIT = 6.0  # standard errors: the largest of all positions, fields and scales stays below it on real patches (docs/evaluation.md)
REAL_MARGIN = 1.3  # times what real patches show, where they are less even than that
MAX_SIDE = 128  # pixels: larger images are halved first, which keeps what recurs and takes a quarter of the time
COARSE = 16  # parts of a side over which the second scale averages
FIELDS = ("red density", "green density", "blue density", "edge energy", "contrast")
# Fine detail, averages over a sixteenth of the side, and whole rows and columns of fine detail: a seam one pixel wide hides in each
# of its pixels, not in their sum.
SCALES = ("fine", "coarse", "rows", "columns")
_CHUNK = 128


@dataclass(frozen=True)
class PositionMaps:
    """Mean over images of each field at each position, and its standard error, each at the scales of SCALES.

    fine, coarse: (F, S, S); rows: (F, S, 1); columns: (F, 1, S). The error of a position is at least that of its whole map: a
    position that hardly varies among few images must not look infinitely certain.
    """

    means: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]


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
    steps = _steps(grey) + np.swapaxes(_steps(np.swapaxes(grey, 1, 2)), 1, 2)
    # Roots and absolute values rather than squares: a few strong edges must not carry the mean of a position.
    parts = (np.sqrt(steps), np.abs(grey))
    relative = [part / np.maximum(part.mean((1, 2), keepdims=True), 1e-4) - 1 for part in parts]
    return np.stack([*np.moveaxis(density, 3, 0), *relative])


def _steps(grey: np.ndarray) -> np.ndarray:
    """Mean difference to the neighbours above and below, (N, S, S); symmetric, so that turned images give turned fields."""
    step = np.pad(np.abs(np.diff(grey, axis=1)), ((0, 0), (1, 1), (0, 0)), mode="edge")
    return step[:, :-1] + step[:, 1:]


def _reduced(images: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return images
    side = images.shape[1] // factor
    blocks = images[:, : side * factor, : side * factor].reshape(len(images), side, factor, side, factor, 3)
    return blocks.mean((2, 4), dtype=np.float32)


def position_maps(images: np.ndarray, groups: np.ndarray | None = None) -> PositionMaps:
    """Maps of images (N, S, S, 3) uint8. ``groups`` (N,): the slide of each; the error then counts slides, not patches.

    Patches of one slide share how its tissue lies in the grid of patches: they are not independent, not even in this.
    """
    halving = -(-images.shape[1] // MAX_SIDE)
    width = max(images.shape[1] // halving // COARSE, 2) | 1  # an even window is not symmetric
    means = {scale: _ClusteredMean() for scale in SCALES}
    for indices, starts in _whole_groups(np.arange(len(images)) if groups is None else groups):
        values = fields(_reduced(images[indices], halving))
        coarse = uniform_filter(values, (0, 0, width, width), mode="reflect")
        fine = values - coarse
        parts = (fine, coarse, fine.mean(3, keepdims=True), fine.mean(2, keepdims=True))
        for mean, part in zip(means.values(), parts, strict=True):
            mean.add(np.add.reduceat(part, starts, axis=1), np.diff([*starts, len(indices)]))
    return PositionMaps(*({scale: getattr(mean, what)() for scale, mean in means.items()} for what in ("mean", "error")))


def _whole_groups(groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of about _CHUNK images at a time, whole groups together, and where in them each group starts."""
    order = np.argsort(groups, kind="stable")
    ranks = np.unique(groups[order], return_inverse=True)[1]
    edges = np.flatnonzero(np.diff(ranks, prepend=-1))
    last = 0
    for edge in [*edges[1:], len(order)]:
        if edge - last >= _CHUNK or edge == len(order):
            yield order[last:edge], edges[(edges >= last) & (edges < edge)] - last
            last = edge


class _ClusteredMean:
    """Mean of values that come in groups, with the standard error that groups of correlated values leave."""

    def __init__(self):
        self.sums = self.squares = self.weighted = 0.0
        self.count = self.squared_sizes = 0

    def add(self, sums: np.ndarray, sizes: np.ndarray) -> None:
        """sums (F, G, ...) over the members of each group; sizes (G,)."""
        self.sums = self.sums + sums.sum(1, dtype=np.float64)
        self.squares = self.squares + np.einsum("fg...,fg...->f...", sums, sums)
        self.weighted = self.weighted + np.einsum("fg...,g->f...", sums, sizes.astype(np.float32))
        self.count += int(sizes.sum())
        self.squared_sizes += int((sizes**2).sum())

    def mean(self) -> np.ndarray:
        return self.sums / self.count

    def error(self) -> np.ndarray:
        mean = self.mean()
        between = self.squares - 2 * mean * self.weighted + mean**2 * self.squared_sizes
        variance = np.maximum(between, 0) / self.count**2
        return np.sqrt(np.maximum(variance, variance.mean((1, 2), keepdims=True))) + 1e-9


def deviations(fake: PositionMaps, real: PositionMaps) -> dict[str, np.ndarray]:
    """Field -> (S, S): how many standard errors each position of ``fake`` lies from real tissue, the largest of all scales.

    Patches that were cut on a grid may be uneven themselves. Who trained with flips and quarter turns learnt their average over
    the symmetries of the square, and a generator without a notion of place is even: the reference is the real map, that average,
    or evenness, whichever is nearer.
    """
    candidates = [_standardised(fake, reference) for reference in (real, _symmetrised(real), _even(real))]
    nearest = min(candidates, key=lambda scales: sum((z**2).mean() for z in scales))
    scales = np.stack(np.broadcast_arrays(*nearest))
    largest = np.take_along_axis(scales, np.abs(scales).argmax(0)[None], 0)[0]
    return dict(zip(FIELDS, largest, strict=True))


def _standardised(fake: PositionMaps, real: PositionMaps) -> list[np.ndarray]:
    return [(fake.means[s] - real.means[s]) / np.hypot(fake.errors[s], real.errors[s]) for s in SCALES]


def _even(maps: PositionMaps) -> PositionMaps:
    """Maps that are the same everywhere, exactly; each field counts relative to its image, so that is 0."""
    return PositionMaps(*({name: np.zeros_like(part) for name, part in parts.items()} for parts in (maps.means, maps.errors)))


def _symmetrised(maps: PositionMaps) -> PositionMaps:
    """The maps averaged over the symmetries of the square; errors likewise, for they are no smaller than that."""

    def average(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        squares = {name: _all_turns(parts[name]).mean(0) for name in ("fine", "coarse")}
        line = (parts["rows"] + np.swapaxes(parts["columns"], 1, 2)) / 2
        line = (line + line[:, ::-1]) / 2
        return squares | {"rows": line, "columns": np.swapaxes(line, 1, 2)}

    return PositionMaps(average(maps.means), average(maps.errors))


def _all_turns(maps: np.ndarray) -> np.ndarray:
    turned = [np.rot90(maps, quarter, (1, 2)) for quarter in range(4)]
    return np.stack([*turned, *(turn[..., ::-1] for turn in turned)])


def stationarity_section(fake: ImageSet, train: ImageSet, held_out: ImageSet) -> Section:
    """Evenness of generated images against the training patches, with held-out patches as the control."""
    section = Section("stationarity", "Does something sit in the same place of every image?", _EXPLANATION)
    if not (_enough(fake) and _enough(train)):
        needed = f"it takes {MIN_IMAGES} images of at least two slides, both generated and real"
        section.untested.append(f"Whether something sits in the same place of every image was not tested: {needed}.")
        return section
    reference = position_maps(train.images, train.groups)
    parts = {"generated": fake} | ({"held-out real": held_out} if _enough(held_out) else {})
    found = {name: deviations(position_maps(part.images, part.groups), reference) for name, part in parts.items()}
    generated, control = found["generated"], found.get("held-out real")
    rows, beyond = [], []
    for field in FIELDS:
        value = float(np.abs(generated[field]).max())
        real = float(np.abs(control[field]).max()) if control else None
        limit = max(LIMIT, REAL_MARGIN * (real or 0.0))
        rows.append([field, f"{value:.1f}", number(real, 1), f"{limit:.1f}"])
        section.numbers[field] = {"generated": value, "held_out": real, "limit": limit}
        beyond.append((f"{field} {where(generated[field])}", value, limit))
    text = "every image has something in the same place: {}"
    section.findings += worst("stationarity", text, *map(list, zip(*beyond, strict=True)))
    columns = ["field", "generated", "held-out real", "limit"]
    section.tables.append(Table("Largest deviation of any position, in standard errors", columns, rows))
    section.figures.append(("Deviation per position in standard errors", _heat_maps(found)))
    return section


def _enough(part: ImageSet) -> bool:
    """Whether there is a mean and an error of it: the error counts groups (slides; each generated image is one)."""
    return len(part) >= MIN_IMAGES and len(np.unique(part.groups)) > 1


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


def _heat_maps(found: dict[str, dict[str, np.ndarray]]) -> str:
    """A row for each set of maps by field, under its name."""
    figure = Figure(figsize=(12, 2.5 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(FIELDS), squeeze=False)
    for row, (name, maps) in enumerate(found.items()):
        for axis, field in zip(axes[row], FIELDS, strict=True):
            picture = axis.imshow(maps[field], cmap="RdBu_r", vmin=-2 * LIMIT, vmax=2 * LIMIT, interpolation="nearest")
            axis.set_title(f"{field}, {name}", fontsize=9)
            axis.set_axis_off()
    figure.colorbar(picture, ax=axes, shrink=0.7)
    return figure_uri(figure)
