"""Gland architecture of the demo tissue: outlines, lumina and the places of nuclei, per Gleason pattern.

Follows the drawings and criteria of Epstein et al., "The 2014 ISUP Consensus Conference on Gleason Grading of Prostatic
Carcinoma", Am J Surg Pathol 40 (2016): pattern 3 discrete well-formed glands, pattern 4 fused, cribriform or poorly formed
ones, pattern 5 sheets, cords, single cells, comedonecrosis. Lengths are micrometres here; outlines are (n, 2) arrays of x, y
around their own centre, in the sense in which (-dy, dx) points inward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Cells = tuple[str, np.ndarray, np.ndarray]  # kind, (n, 2) x and y, (n,) angle


@dataclass
class Gland:
    """One epithelial structure. ``parts`` are outlines, each lined on its own; ``lumina`` are holes punched into it.

    pattern: 0 benign, 3, 4 or 5. height: of the lining cells, above which the lumen begins; None when there is no central lumen.
    fill: spacing of nuclei all over the sheet, None for glands that are lined. tone: (hematoxylin, eosin) of the cytoplasm.
    froth: how vacuolated it is. secretion: (hematoxylin, eosin) of what stands in the lumen, content: a body that lies in it.
    cleft: retraction from the stroma. necrosis: radius of the dead middle.
    """

    pattern: int
    parts: list[np.ndarray]
    lumina: list[np.ndarray] = field(default_factory=list)
    height: float | None = None
    fill: float | None = None
    kind: str = "luminal"
    tone: tuple[float, float] = (0.2, 0.3)
    froth: float = 0.4
    secretion: tuple[float, float] = (0.0, 0.0)
    cleft: float = 0.0
    necrosis: float = 0.0
    content: str | None = None
    cells: list[Cells] = field(default_factory=list)

    @property
    def radius(self) -> float:
        """Half of the larger side of the box around it."""
        return float(np.ptp(np.concatenate(self.parts), axis=0).max()) / 2


def blob(rng: np.random.Generator, radius: float, wobble: float, stretch: float = 1.0, folds: int = 0) -> np.ndarray:
    """Outline of about ``radius``: an ellipse with low harmonics, and ``folds`` papillae that push the wall inward."""
    theta = np.linspace(0, 2 * np.pi, max(40, int(4.5 * radius)), endpoint=False)
    r = np.ones_like(theta)
    for n in range(2, 7):
        r += wobble * rng.normal() / n**0.7 * np.cos(n * theta + rng.uniform(0, 2 * np.pi))
    for _ in range(folds):
        off = np.angle(np.exp(1j * (theta - rng.uniform(0, 2 * np.pi))))
        r *= 1 - rng.uniform(0.2, 0.6) * np.exp(-0.5 * (off / (rng.uniform(5, 11) / radius)) ** 2)
    r = np.clip(r, 0.25, 1.7) * radius
    turn = rng.uniform(0, np.pi)
    x, y = r * np.cos(theta) * np.sqrt(stretch), r * np.sin(theta) / np.sqrt(stretch)
    return np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1)


def lining(rng: np.random.Generator, outline: np.ndarray, spacing: float, depth: float, spread: float) -> tuple:
    """Places at equal distances along an outline, ``depth`` inward: (n, 2) points and (n,) angles of the inward normal."""
    closed = np.vstack([outline, outline[:1]])
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    count = max(int(length[-1] / spacing), 3)
    at = (np.arange(count) + rng.uniform(-0.28, 0.28, count) + rng.random()) * length[-1] / count % length[-1]
    tangent = np.roll(outline, -2, 0) - np.roll(outline, 2, 0)
    tangent = np.vstack([tangent, tangent[:1]])
    points, slope = (np.stack([np.interp(at, length, values[:, i]) for i in (0, 1)], 1) for values in (closed, tangent))
    inward = np.stack([-slope[:, 1], slope[:, 0]], 1) / np.maximum(np.hypot(*slope.T), 1e-6)[:, None]
    return points + inward * (depth + spread * rng.normal(size=count))[:, None], np.arctan2(inward[:, 1], inward[:, 0])


def hexagons(rng: np.random.Generator, low: np.ndarray, high: np.ndarray, spacing: float, jitter: float = 0.28) -> np.ndarray:
    """(n, 2) points that fill a box about evenly: a hexagonal grid, every point moved at random."""
    across, down = np.arange(low[0], high[0], spacing), np.arange(low[1], high[1], spacing * 0.866)
    x, y = np.meshgrid(across, down)
    x = x + (np.arange(len(down)) % 2)[:, None] * spacing / 2
    points = np.stack([x.ravel(), y.ravel()], 1)
    return points + rng.normal(0, jitter * spacing, points.shape)


def benign(rng: np.random.Generator, radius: float) -> Gland:
    """Large gland with papillary folds, tall pale luminal cells over a flat basal layer, and an open lumen."""
    height = rng.uniform(15, 23)
    outline = blob(rng, radius, 0.10, rng.uniform(1.0, 1.9), int(rng.integers(2, 4) + radius / 16))
    gland = Gland(0, [outline], height=height, tone=(rng.uniform(0.10, 0.2), rng.uniform(0.26, 0.42)), froth=rng.uniform(0.4, 0.9))
    places, angle = lining(rng, outline, rng.uniform(9, 14), 1.7, 0.4)
    gland.cells.append(("basal", places, angle + np.pi / 2))
    gland.cells.append(("luminal", *lining(rng, outline, rng.uniform(5.6, 6.8), rng.uniform(6.5, 9), 1.3)))
    if rng.random() < 0.5:
        gland.cells.append(("luminal", *lining(rng, outline, rng.uniform(9, 16), 12.5, 1.5)))
    if rng.random() < 0.3:
        gland.secretion = (0.02, rng.uniform(0.15, 0.6))
    gland.content = "corpus" if rng.random() < 0.3 else None
    return gland


def pattern3(rng: np.random.Generator, radius: float) -> Gland:
    """Small separate gland: one layer, prominent nucleoli, no basal cells; at times blue mucin or pink secretion."""
    outline = blob(rng, radius, rng.uniform(0.03, 0.11), rng.choice((1.0, 1.2, 1.5, 2.1), p=(0.4, 0.3, 0.2, 0.1)))
    height = min(rng.uniform(11, 17), radius * rng.uniform(0.55, 0.8))
    gland = Gland(3, [outline], height=height, kind="acinar", froth=rng.uniform(0.15, 0.9), cleft=rng.choice((0.0, 0.6, 1.0)))
    gland.tone = (rng.uniform(0.16, 0.32), rng.uniform(0.28, 0.48))
    gland.secretion = ((0.0, 0.0), (rng.uniform(0.12, 0.3), 0.0), (0.03, rng.uniform(0.4, 1.0)))[rng.choice(3, p=(0.55, 0.2, 0.25))]
    gland.content = "crystalloid" if rng.random() < 0.2 else None
    gland.cells.append(("acinar", *lining(rng, outline, rng.uniform(7.2, 9.5), min(5.4, radius * 0.4), 0.8)))
    return gland


def cribriform(rng: np.random.Generator, radius: float) -> Gland:
    """Pattern 4: one large sheet with several round lumina punched out of it."""
    outline = blob(rng, radius, 0.09, rng.uniform(1.0, 1.5))
    gland = Gland(4, [outline], fill=rng.uniform(7.6, 8.8), kind="fused", froth=rng.uniform(0.2, 0.9), cleft=rng.choice((0, 0.7)))
    gland.tone = (rng.uniform(0.18, 0.32), rng.uniform(0.28, 0.45))
    widest = min(0.2 * radius, 12.5)
    for place in hexagons(rng, outline.min(0), outline.max(0), 2 * widest + rng.uniform(9, 15), 0.12):
        hole = rng.uniform(0.55, 1) * widest
        if np.hypot(*(outline - place).T).min() > hole + 8 and _inside(outline, place) and rng.random() < 0.94:
            gland.lumina.append(place + blob(rng, hole, 0.05, rng.uniform(1, 1.3)))
    if rng.random() < 0.5:
        gland.secretion = (0.02, rng.uniform(0.1, 0.7))
    return gland


def fused(rng: np.random.Generator, radius: float) -> Gland:
    """Pattern 4: small glands grown together without stroma between them."""
    size = rng.uniform(15, 21)
    low = np.full(2, -radius)
    middles = [
        p for p in hexagons(rng, low, -low, size * rng.uniform(1.55, 1.75), 0.16) if np.hypot(*p) < radius * rng.uniform(0.75, 1)
    ]
    middles = middles or [np.zeros(2)]
    parts = [middle + blob(rng, size * rng.uniform(0.85, 1.2), 0.06, rng.uniform(1, 1.4)) for middle in middles]
    gland = Gland(4, parts, height=size * rng.uniform(0.5, 0.66), kind="fused", froth=rng.uniform(0.2, 0.9))
    gland.tone = (rng.uniform(0.16, 0.3), rng.uniform(0.27, 0.45))
    for part in parts:
        gland.cells.append(("fused", *lining(rng, part, rng.uniform(7.6, 9.2), 5.0, 1.0)))
    return gland


def poorly_formed(rng: np.random.Generator, radius: float) -> Gland:
    """Pattern 4: a small nest with hardly a lumen."""
    outline = blob(rng, radius * 0.45 + 8, 0.09, rng.uniform(1, 1.8))
    gland = Gland(4, [outline], fill=rng.uniform(8.0, 9.2), kind="fused", froth=rng.uniform(0.3, 1.0), cleft=rng.choice((0, 0.8)))
    gland.tone = (rng.uniform(0.18, 0.3), rng.uniform(0.3, 0.45))
    if rng.random() < 0.6:
        gland.lumina.append(blob(rng, rng.uniform(2.5, 4.5), 0.1, 1.6) + rng.normal(0, 3, 2))
    return gland


def pattern4(rng: np.random.Generator, radius: float) -> Gland:
    """One of the architectures of pattern 4."""
    return (cribriform, fused, poorly_formed)[rng.choice(3, p=(0.5, 0.38, 0.12))](rng, radius)


def pattern5(rng: np.random.Generator, radius: float) -> Gland:
    """Solid sheet without lumina; large ones may be necrotic in the middle (comedonecrosis)."""
    outline = blob(rng, radius, 0.12, rng.uniform(1, 1.7))
    gland = Gland(5, [outline], fill=rng.uniform(8.8, 11.5), kind="anaplastic", froth=rng.uniform(0.2, 1.0))
    gland.tone = (rng.uniform(0.14, 0.36), rng.uniform(0.22, 0.42))
    if radius > 55 and rng.random() < 0.3:
        gland.necrosis = radius * rng.uniform(0.3, 0.45)
    return gland


def _inside(outline: np.ndarray, point: np.ndarray) -> bool:
    step = np.angle(np.exp(1j * np.diff(np.arctan2(*(np.vstack([outline, outline[:1]]) - point).T[::-1]))))
    return abs(step.sum()) > np.pi


GLANDS = {0: benign, 3: pattern3, 4: pattern4, 5: pattern5}
# Radii that are tried one after another (large ones first), attempts for each per square millimetre, and the gap left around.
SIZES = {
    0: (((75, 110), 300), ((50, 75), 500), ((32, 50), 500)),
    3: (((24, 38), 600), ((17, 26), 2500), ((12, 18), 2500)),
    4: (((70, 115), 400), ((45, 70), 900), ((26, 44), 1500)),
    5: (((65, 115), 500), ((35, 65), 900), ((14, 30), 1200)),
}
GAPS = {0: (10, 34), 3: (4, 14), 4: (4, 12), 5: (2, 9)}
