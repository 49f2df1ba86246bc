"""From painted cores to one demo slide: layout, the provider's stain and scanner, pen marks and blur."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from data import demo_layout, demo_tissue
from data.demo_layout import COARSE
from data.demo_texture import magnify, smooth_noise
from data.panda import gleason_patterns

CORE_SLOT_UM = 640  # one core beside another
CORE_WIDTH_UM = (320, 400)

# What each provider's laboratory and scanner do: stain vectors in optical density (R, G, B), strength, white, optical blur.
_LOOK = {
    "radboud": {
        "hematoxylin": (0.62, 0.71, 0.35),
        "eosin": (0.12, 0.97, 0.22),
        "strength": 0.96,
        "white": (247, 245, 248),
        "blur": 0.72,
    },
    "karolinska": {
        "hematoxylin": (0.56, 0.77, 0.32),
        "eosin": (0.06, 0.98, 0.17),
        "strength": 1.02,
        "white": (243, 241, 244),
        "blur": 0.5,
    },
}
_INKS = {"black": (1.5, 1.5, 1.4), "blue": (2.2, 1.2, 0.25), "green": (1.9, 0.45, 1.2), "red": (0.12, 1.7, 1.5)}


@dataclass(frozen=True)
class SlidePlan:
    """What one demo slide is to show. score: ``3+4`` and so on, ``0+0`` for no cancer; blank: no tissue at all."""

    slide_id: str
    provider: str
    score: str
    mpp: float
    pen: bool = False
    blur: bool = False
    blank: bool = False


def paint_slide(rng: np.random.Generator, plan: SlidePlan, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint one slide: (size, size, 3) uint8 RGB and the (size, size) uint8 mask in the provider's convention."""
    look = _LOOK[plan.provider]
    white = np.array(look["white"], np.float32) + rng.uniform(-1.5, 1.5)
    image = np.empty((size, size, 3), np.uint8)
    image[:] = white
    mask = np.zeros((size, size), np.uint8)
    if not plan.blank:
        _lay_cores(rng, plan, image, mask, white)
    if plan.blur:
        _blur(rng, image, mask)
    if plan.pen:
        _draw_pen(rng, image, 1 / plan.mpp)
    if rng.random() < 0.5:
        image, mask = image.transpose(1, 0, 2), mask.T
    return np.ascontiguousarray(image), np.ascontiguousarray(mask)


def _lay_cores(rng, plan, image, mask, white) -> None:
    size, um = len(image), 1 / plan.mpp
    count = max(1, int(size / (CORE_SLOT_UM * um) + 0.15))
    slot = size // count // COARSE * COARSE
    palette = demo_tissue.Palette.draw(rng, plan.mpp)
    stains = _stains(rng, plan.provider)
    for number in range(count):
        top = int(rng.uniform(0.0, 0.06) * size)
        height = (int(size * rng.uniform(0.9, 1.0)) - top) // COARSE * COARSE
        width = min(rng.uniform(*CORE_WIDTH_UM) * um, 0.86 * slot)
        painted = demo_tissue.paint_core(rng, palette, (height, slot), width, _segments(rng, plan.score, height / um))
        place = np.s_[top : top + height, number * slot : (number + 1) * slot]
        _colour(rng, painted, stains, white, _LOOK[plan.provider]["blur"], image[place])
        mask[place] = _labels(painted, plan.provider)


def _segments(rng, score: str, length_um: float) -> list[tuple[float, int]]:
    """Shares of a core's length and the pattern there: the primary pattern holds more than the secondary, some tissue is benign.

    Short cores of two patterns have no benign part, so that both find room.
    """
    primary, secondary = gleason_patterns(score)
    if not primary:
        return [(1.0, 0)]
    benign = rng.uniform(0.16, 0.26) if length_um > 600 or primary == secondary else 0.0
    second = 0.0 if primary == secondary else max(rng.uniform(0.17, 0.24), min(130 / length_um, 0.38))
    parts = [(1 - benign - second, primary), (second, secondary), (benign, 0)]
    return [parts[i] for i in rng.permutation(3) if parts[i][0] > 0]


def _stains(rng, provider: str) -> np.ndarray:
    """(2, 3) float32: optical density of one unit of hematoxylin and of eosin on this slide."""
    look = _LOOK[provider]
    vectors = np.array([look["hematoxylin"], look["eosin"]]) + rng.normal(0, 0.018, (2, 3))
    vectors = np.maximum(vectors, 0.02) / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors * look["strength"] * np.exp(rng.normal(0, (0.10, 0.12)))[:, None]).astype(np.float32)


def _colour(rng, painted, stains, white, blur: float, image) -> None:
    """Fill ``image`` by Beer and Lambert: section thickness varies slowly, the optics blur, the sensor adds noise."""
    core = painted.core
    thickness = 1 + 0.07 * smooth_noise(rng, core.region.shape, 260 * core.um / COARSE)
    for window in demo_tissue.bands(core):
        local = magnify(thickness, COARSE, window)
        around = tuple(slice(max(part.start - 3, 0), part.stop + 3) for part in window)
        own = tuple(slice(part.start - outer.start, part.stop - outer.start) for part, outer in zip(window, around, strict=True))
        dyes = [ndimage.gaussian_filter(dye[around], blur, radius=3)[own] * local for dye in (painted.hematoxylin, painted.eosin)]
        grain = rng.standard_normal(local.shape, np.float32) * 1.3 * (painted.tissue[window] > 0) + 0.5
        for channel in range(3):
            light = white[channel] * np.exp(-dyes[0] * stains[0, channel] - dyes[1] * stains[1, channel])
            image[window][..., channel] = np.clip(light + grain, 0, 255)


def _labels(painted, provider: str) -> np.ndarray:
    """Mask in the provider's values: Radboud per epithelium, Karolinska whole areas of benign or cancerous tissue."""
    core = painted.core
    inside = painted.tissue > 0.5
    if provider == "karolinska":
        cancer = (core.region > 0).repeat(COARSE, 0).repeat(COARSE, 1)
        return np.where(inside, np.where(cancer, 2, 1), 0).astype(np.uint8)
    value = {demo_layout.NO_GLAND[0]: 1, 0: 2, 3: 3, 4: 4, 5: 5}
    values = np.array([value[row[demo_layout.PATTERN]] for row in core.traits], np.uint8)
    return np.where(inside & (core.lumen < 128), values[core.gland], 0).astype(np.uint8)


def _blur(rng, image, mask) -> None:
    """Blur some places over tissue, as where the scanner lost the focus."""
    size = len(image)
    ys, xs = np.nonzero(mask[::16, ::16])
    for pick in rng.integers(0, len(xs), 4):
        side = int(min(rng.uniform(500, 900), size / 2.5))
        y, x = (int(np.clip(at * 16 - side // 2, 0, size - side)) for at in (ys[pick], xs[pick]))
        part = image[y : y + side, x : x + side].astype(np.float32)
        soft = ndimage.gaussian_filter(part, (rng.uniform(3, 6),) * 2 + (0,), truncate=2.5)
        grid = np.linspace(-1, 1, side, dtype=np.float32)
        weight = np.clip((1 - np.hypot(grid[:, None], grid[None, :])) * 4, 0, 1)[..., None]
        image[y : y + side, x : x + side] = part + weight * (soft - part)


def _draw_pen(rng, image, um: float) -> None:
    """Add felt-pen strokes, which absorb light on top of whatever lies below."""
    size = len(image)
    for _ in range(2):
        t = np.linspace(0, 1, 24)
        start, stop = rng.uniform(0.05, 0.95, 2), rng.uniform(0.05, 0.95, 2)
        bow = 0.12 * np.sin(np.pi * t * rng.uniform(0.5, 2)) * rng.choice((-1, 1))
        line = (start + (stop - start) * t[:, None] + bow[:, None]) * size / 4
        canvas = Image.new("L", (size // 4, size // 4))
        width = int(min(rng.uniform(40, 75) * um, size / 12) / 4)
        ImageDraw.Draw(canvas).line([tuple(point) for point in line.tolist()], fill=255, width=width, joint="curve")
        ink = ndimage.gaussian_filter(np.asarray(canvas, np.float32) / 255, 1.5)
        ink *= 0.8 + 0.2 * smooth_noise(rng, ink.shape, 12)
        ink = np.asarray(Image.fromarray(ink).resize((size, size), Image.Resampling.BILINEAR))
        ys, xs = np.nonzero(ink > 0.01)
        window = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        density = np.array(_INKS[str(rng.choice(list(_INKS)))], np.float32) * rng.uniform(0.6, 1.1)
        for channel in range(3):
            image[window][..., channel] = image[window][..., channel] * np.exp(-ink[window] * density[channel])
