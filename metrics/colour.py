"""Colour in optical density: a cast, when it is off on average; loss of stain variety, when all images have nearly the same."""

from __future__ import annotations

import numpy as np

from metrics.images import MIN_IMAGES, ImageSet
from metrics.section import Finding, Section, Table, worst
from metrics.stationarity import optical_density

COLOUR_LIMIT = 1.5  # standard deviations between training slides
VARIETY_LIMIT = 0.5  # of the standard deviation between training patches; less for few images, whose own is uncertain
CONTROL = 0.8  # of what held-out patches keep, where that is less
COLOURS = ("red density", "green density", "blue density", "red share", "blue share")
_CHUNK = 256


def colours(images: np.ndarray) -> np.ndarray:
    """(N, 5): mean optical density of red, green and blue, and red's and blue's share of the density (COLOURS)."""
    parts = [optical_density(images[start : start + _CHUNK]).mean((1, 2)) for start in range(0, len(images), _CHUNK)]
    density = np.concatenate(parts)
    shares = density / np.maximum(density.sum(1, keepdims=True), 1e-3)
    return np.concatenate([density, shares[:, [0, 2]]], axis=1)


def between_groups(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Standard deviation over groups (slides) of the groups' means, (K,) for values (N, K)."""
    names, which = np.unique(groups, return_inverse=True)
    means = np.stack([values[which == index].mean(0) for index in range(len(names))])
    return means.std(0, ddof=1) if len(means) > 1 else values.std(0)


def between_images(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Standard deviation between images of one label, (K,) for values (N, K) and labels (N,)."""
    names, which = np.unique(labels, return_inverse=True)
    rest = values - np.stack([values[which == index].mean(0) for index in range(len(names))])[which]
    return np.sqrt((rest**2).sum(0) / max(len(values) - len(names), 1))


def add_colours(section: Section, fake: ImageSet, train: ImageSet, held_out: ImageSet) -> None:
    """Mean colour of the generated images and its variety, against training patches and with held-out patches as control."""
    sets = fake, train, held_out
    values = [colours(images.images) for images in sets]
    _cast(section, *values, between_groups(values[1], train.groups) + 1e-4)
    # Without labels of the images' own, the differences between labels count on both sides.
    labels = [images.labels if fake.labels.astype(bool).any() else np.zeros(len(images)) for images in sets]
    spreads = (between_images(*pair) for pair in zip(values, labels, strict=True))
    if not _variety(section, *_kept(*spreads, len(fake))):  # one fault, one finding
        _variety_by_label(section, [images.labels for images in sets], values)


COLOUR_EXPLANATION = (
    "Colour is measured in optical density. A cast, from a generator that has not learnt the stain, is in units of how much "
    "training slides differ among themselves; variety is how much images of one label differ, over how much training patches do."
)


def _cast(section: Section, made: np.ndarray, reference: np.ndarray, control: np.ndarray, unit: np.ndarray) -> None:
    shift, real_shift = (made.mean(0) - reference.mean(0)) / unit, (control.mean(0) - reference.mean(0)) / unit
    limits = np.maximum(COLOUR_LIMIT, np.abs(real_shift) + 0.5)
    rows = []
    for name, value, real, limit in zip(COLOURS, shift, real_shift, limits, strict=True):
        rows.append([name, f"{value:+.2f}", f"{real:+.2f}", f"{limit:.2f}"])
        section.numbers[name] = {"generated": float(value), "held_out": float(real), "limit": float(limit)}
    names = [f"{name} is {'higher' if value > 0 else 'lower'}" for name, value in zip(COLOURS, shift, strict=True)]
    section.findings += worst("colour", "colour cast against the training slides: {}", names, list(np.abs(shift)), list(limits))
    columns = ["", "generated", "held-out", "limit"]
    section.tables.append(Table("Shift of mean colour, in standard deviations between training slides", columns, rows))


def _kept(made: np.ndarray, reference: np.ndarray, control: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Standard deviations (K,) of ``count`` images and of held-out patches over those of training patches; the images' limits.

    Held-out patches whose deviation is NaN lower no limit.
    """
    ratios, real = made / (reference + 1e-4), control / (reference + 1e-4)
    return ratios, real, np.fmin(VARIETY_LIMIT * (1 - np.sqrt(2 / count)), CONTROL * real)


def _variety(section: Section, ratios: np.ndarray, real: np.ndarray, limits: np.ndarray) -> bool:
    """Of all images together; whether too little is left."""
    rows, low = [], []
    for name, ratio, kept, limit in zip(COLOURS, ratios, real, limits, strict=True):
        rows.append([name, f"{ratio:.2f}", f"{kept:.2f}", f"{limit:.2f}"])
        section.numbers[f"variety of {name}"] = {"generated": float(ratio), "held_out": float(kept), "limit": float(limit)}
        low += [(name, float(ratio), float(limit))] if ratio < limit else []
    if low:
        names, values, least = zip(*low, strict=True)
        text = f"loss of stain variety: the images are all of nearly the same {', '.join(names)}"
        section.findings.append(Finding("stain variety", text, values[0], least[0]))
    columns = ["", "generated", "held-out", "limit"]
    section.tables.append(Table("Variety of colour, over that of training patches", columns, rows))
    return bool(low)


def _variety_by_label(section: Section, labels: list[np.ndarray], values: list[np.ndarray]) -> None:
    """The colour that varies least in each label: one label without variety is lost among others that have it."""
    rows, low = [], []
    for label in filter(None, np.unique(labels[0]).tolist()):
        parts = [value[own == label] for value, own in zip(values, labels, strict=True)]
        if min(len(part) for part in parts[:2]) < MIN_IMAGES:
            continue
        spreads = [part.std(0, ddof=1) if len(part) >= MIN_IMAGES else np.full(len(COLOURS), np.nan) for part in parts]
        ratios, real, limits = _kept(*spreads, len(parts[0]))
        least = int(np.argmin(ratios / limits))
        ratio, limit = float(ratios[least]), float(limits[least])
        kept = "-" if np.isnan(real[least]) else f"{real[least]:.2f}"
        rows.append([label, COLOURS[least], f"{ratio:.2f}", kept, f"{limit:.2f}"])
        section.numbers[f"variety within {label}"] = {"colour": COLOURS[least], "generated": ratio, "limit": limit}
        low += [(ratio / limit, f"{label} ({COLOURS[least]})", ratio, limit)] if ratio < limit else []
    if low:
        text = f"loss of stain variety within labels: nearly one stain in {', '.join(name for _, name, _, _ in low)}"
        section.findings.append(Finding("stain variety", text, *min(low)[2:]))
    if rows:
        columns = ["", "colour that varies least", "generated", "held-out", "limit"]
        section.tables.append(Table("Variety of colour within each label, over that of its training patches", columns, rows))
