"""Faults of single images that a feature distance may forgive: dead corners and periodic patterns, and those of colour
(metrics.colour).
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from common.html import figure_uri
from metrics.colour import COLOUR_EXPLANATION, add_colours
from metrics.images import MIN_IMAGES, ImageSet
from metrics.section import Finding, Section, Table, number, worst

CORNER = 1 / 8  # of a side: the legs of the triangle that counts as a corner
BLACK, WHITE = 20, 245  # grey levels: darker and lighter than tissue gets
CORNER_LIMIT = 0.02  # share of images beyond what real patches have
PERIODS = (2, 4, 8, 16)  # pixels: strides of the upsampling layers
PERIOD_LIMIT = 0.2  # decades of power above what real patches have at that period
FEW_LIMIT = 2.0  # decades over the root of how many images there are: below 100 their spectrum is noisier than PERIOD_LIMIT
VISIBLE = 0.1  # grey levels, root mean square: an eye at its best sees gratings of about 0.4 on tissue of 200
_CHUNK = 256


def dead_corners(images: np.ndarray, black: bool) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N,) bool: at least one corner triangle is uniformly black (or white)."""
    side = images.shape[1]
    leg = max(int(side * CORNER), 2)
    dead = np.zeros(len(images), bool)
    triangle = np.add.outer(np.arange(leg), np.arange(leg)) < leg
    for turn in range(4):
        corner = np.rot90(images, turn, (1, 2))[:, :leg, :leg][:, triangle]
        uniform = corner.max(2) < BLACK if black else corner.min(2) > WHITE
        dead |= uniform.mean(1) > 0.95
    return dead


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Mean power spectrum (S, S) of grey images under a Hann window, zero frequency first; S even."""
    side = images.shape[1] // 2 * 2
    window = np.outer(np.hanning(side + 1)[:-1], np.hanning(side + 1)[:-1]).astype(np.float32)
    total = np.zeros((side, side))
    for start in range(0, len(images), _CHUNK):
        grey = images[start : start + _CHUNK, :side, :side].mean(3, dtype=np.float32)
        grey -= grey.mean((1, 2), keepdims=True)
        total += (np.abs(np.fft.fft2(grey * window)) ** 2).sum(0)
    return total / len(images)


def periodic_peaks(spectrum: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of every frequency of a pattern of this period (pixels) that is not already one of a shorter period: how far it stands out of
    its surroundings, in decades of power, and its mean square in grey levels over the images. None where the side is shorter than
    eight periods.

    A pattern along rows, columns or both has its energy at multiples of S / period; the surroundings are two to four bins away.
    """
    side = len(spectrum)
    if side < 8 * period:
        return None
    step = side / period
    lines = [round(k * step) % side for k in range(period)]
    new = {round(k * step) % side for k in range(1, period, 2)}
    peaks = [(row, column) for row in lines for column in lines if {row, column} & new]
    logs = np.log10(spectrum + 1e-9)
    offsets = [(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5) if max(abs(dy), abs(dx)) >= 2]

    def stands_out(row: int, column: int) -> tuple[float, float]:
        # On an axis the surroundings lie on that axis too: it carries more power than the plane beside it.
        near = [(dy, dx) for dy, dx in offsets if (row or not dy) and (column or not dx)]
        around = np.median([logs[(row + dy) % side, (column + dx) % side] for dy, dx in near])
        power = max(0.0, spectrum[row, column] - 10.0**around)
        # A wave of amplitude A has A / 2 times the window's sum, (S / 2)^2, at both its frequencies, or A where they are one: all
        # frequencies together have the pattern's mean square.
        return float(logs[row, column] - around), power / (side / 2) ** 4

    return tuple(np.array([stands_out(row, column) for row, column in peaks]).T)


def artefacts_section(fake: ImageSet, train: ImageSet, held_out: ImageSet) -> Section:
    """Dead corners, periodic patterns and colour of generated images against training patches, held-out patches as control."""
    section = Section("artefacts", "Corners, patterns, colour", f"{_EXPLANATION} {COLOUR_EXPLANATION}")
    if len(fake) < MIN_IMAGES:
        section.untested.append(f"Corners, patterns and colour were not tested: fewer than {MIN_IMAGES} images.")
        return section
    pictures = fake.images, train.images, held_out.images
    _corners(section, *pictures)
    _periods(section, *pictures)
    add_colours(section, fake, train, held_out)
    return section


_EXPLANATION = (
    "Dead corners come from rotated training images; periodic patterns from upsampling (checkerboard). A pattern is objected to "
    f"when it stands out further than in real patches and has more than {VISIBLE} grey levels (root mean square), a quarter of "
    "what an eye can see; one whose period is more than an eighth of the side is not measured."
)


def _corners(section: Section, fake: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> None:
    rows = []
    for name, black in (("black", True), ("white", False)):
        value, real, control = (float(dead_corners(images, black).mean()) for images in (fake, train, held_out))
        limit = max(real, control) + CORNER_LIMIT
        rows.append([f"{name} corners", f"{value:.1%}", f"{real:.1%}", f"{control:.1%}", f"{limit:.1%}"])
        section.numbers[f"{name} corners"] = {"generated": value, "training": real, "held_out": control, "limit": limit}
        if value > limit:
            text = f"{value:.0%} of the images have a {name} corner; check the rotation in the training images"
            section.findings.append(Finding(f"{name} corners", text, value, limit))
    section.tables.append(Table("Share of images with a dead corner", ["", "generated", "training", "held-out", "limit"], rows))


def _periods(section: Section, fake: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> None:
    spectra = [power_spectrum(images) for images in (fake, train, held_out)]
    rows, beyond = [], []
    for period in PERIODS:
        if (measured := _period(spectra, period, len(fake))) is None:
            rows.append([f"{period} pixels", *["-"] * 5])
            continue
        section.numbers[f"period {period}"] = measured
        rows.append([f"{period} pixels", *(number(value, 2) for value in measured.values())])
        if measured["grey_levels"] > VISIBLE:
            beyond.append((str(period), measured["generated"], measured["limit"]))
    text = "a checkerboard or grid stands out of the spectrum, with a period of {} pixels"
    if beyond:
        section.findings += worst("checkerboard", text, *map(list, zip(*beyond, strict=True)))
    columns = ["period", "generated", "training", "held-out", "limit", "generated, grey levels"]
    section.tables.append(Table("Periodic patterns, decades of power above their surroundings", columns, rows))
    section.figures.append(("Power by spatial frequency", _spectrum_figure(spectra)))


def _period(spectra: list[np.ndarray], period: int, count: int) -> dict[str, float] | None:
    """What one row shows; ``count`` generated images."""
    found = [periodic_peaks(spectrum, period) for spectrum in spectra]
    if None in found:
        return None
    value, real, control = (float(decades.max()) for decades, _ in found)
    limit = max(real, control) + max(PERIOD_LIMIT, FEW_LIMIT / np.sqrt(count))
    decades, squares = found[0]
    pattern = decades >= min(limit, value - 1e-6)  # all that stands out; the strongest where nothing does
    levels = float(np.sqrt(squares[pattern].sum()))
    return {"generated": value, "training": real, "held_out": control, "limit": limit, "grey_levels": levels}


def radial(spectrum: np.ndarray) -> np.ndarray:
    """Mean power by distance from zero frequency, in cycles per image: index 1 .. S/2."""
    frequency = np.fft.fftfreq(len(spectrum), 1 / len(spectrum))
    ring = np.hypot.outer(frequency, frequency).round().astype(int).ravel()
    return (np.bincount(ring, spectrum.ravel()) / np.maximum(np.bincount(ring), 1))[1 : len(spectrum) // 2 + 1]


def _spectrum_figure(spectra: list[np.ndarray]) -> str:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, spectrum in zip(("generated", "training", "held-out"), spectra, strict=True):
        power = radial(spectrum)
        axis.loglog(np.arange(1, len(power) + 1), power, label=name)
    axis.set_xlabel("cycles per image side")
    axis.set_ylabel("power")
    axis.legend()
    return figure_uri(figure)
