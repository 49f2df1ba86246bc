"""Where everything lies in one demo core: its outline, its regions, the glands with their cells, the flow of the fibres.

Nothing is coloured here. Slow fields live on a grid of every fourth pixel (``COARSE``), sharp ones on all pixels.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from data import demo_glands
from data.demo_glands import Gland
from data.demo_texture import SIDE, resize, smooth_noise

COARSE = 4
EPITHELIAL = ("luminal", "acinar", "fused", "anaplastic", "basal")
# Columns of ``Core.traits``, one row for each gland.
PATTERN, TONE_H, TONE_E, FROTH, SECRETION_H, SECRETION_E, CLEFT = range(7)
NO_GLAND = (-1, 0, 0, 0, 0, 0, 0)


@dataclass
class Core:
    """One core of h x w pixels (multiples of 4), ``um`` of which are a micrometre.

    Coarse (h / 4, w / 4): inside, float32 pixels into the tissue, negative outside; region, uint8, the pattern planned for the
    place (0 benign, 3, 4, 5); angle, float32, direction of the fibres from 0 to pi; distance, float32 pixels from the nearest
    gland; cleft, float32, how far that gland is detached. Fine (h, w): gland, int32 row of ``traits``, 0 where there is none;
    epithelium, lumen, necrosis, uint8 soft masks 0..255. cells: kind -> arrays (n, 3) of x, y in pixels and angle.
    """

    um: float
    inside: np.ndarray
    region: np.ndarray
    gland: np.ndarray
    epithelium: np.ndarray
    lumen: np.ndarray
    necrosis: np.ndarray
    traits: list[tuple[float, ...]] = field(default_factory=lambda: [NO_GLAND])
    cells: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    angle: np.ndarray | None = None
    distance: np.ndarray | None = None
    cleft: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.gland.shape


def plan_core(rng: np.random.Generator, um: float, shape: tuple[int, int], width: float, segments: list, rough: np.ndarray) -> Core:
    """Lay out one core, ``width`` pixels wide, from top to bottom of ``shape``.

    segments: (share of the length, pattern) in turn from the top. rough: (SIDE, SIDE) noise that makes edges uneven.
    """
    core = _outline(rng, um, shape, width, segments)
    taken = _place_glands(rng, core, rough)
    _measure_surroundings(rng, core)
    _single_cells(rng, core, rough, taken)
    _stroma_cells(rng, core)
    _settle_cells(core)
    return core


def _outline(rng, um, shape, width, segments) -> Core:
    coarse = (shape[0] // COARSE, shape[1] // COARSE)
    y = np.linspace(-1, 1, coarse[0], dtype=np.float32)[:, None]
    x = np.arange(coarse[1], dtype=np.float32)[None, :] * COARSE
    free = max((shape[1] - width) / 2 - 6 * um, 0)
    middle = shape[1] / 2 + free * (rng.uniform(-0.45, 0.45) * y + rng.uniform(-0.5, 0.5) * (y**2 - 0.4))
    knots = rng.standard_normal((max(shape[0] // 500, 2) + 2, 1)).astype(np.float32)
    edge = width / 2 * (1 + 0.1 * resize(knots, (coarse[0], 1)))
    inside = np.minimum(edge - abs(x - middle), (1 - abs(y)) * shape[0] / 2 - rng.uniform(8, 25) * um)
    inside += um * (5 * smooth_noise(rng, coarse, 25 * um / COARSE) + 1.2 * smooth_noise(rng, coarse, 6 * um / COARSE))
    along = (y + 1) / 2 + 35 * um / shape[0] * smooth_noise(rng, coarse, 110 * um / COARSE)
    region = np.zeros(coarse, np.uint8)
    start = 0.0
    for share, pattern in segments:
        region[along >= start] = pattern
        start += share
    masks = (np.zeros(shape, np.uint8) for _ in range(3))
    return Core(um, inside.astype(np.float32), region, np.zeros(shape, np.int32), *masks)


def _polygon(outline: np.ndarray, shape: tuple[int, int], pad: int) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """Rasterise an outline (pixels): the window it covers and its (h, w) uint8 mask there; None when it lies outside."""
    low = np.maximum(np.floor(outline.min(0)).astype(int) - pad, 0)
    high = np.minimum(np.ceil(outline.max(0)).astype(int) + pad + 1, shape[::-1])
    if (high - low < 2).any():
        return None
    (left, top), (right, bottom) = low.tolist(), high.tolist()
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).polygon((outline - low).ravel().tolist(), fill=1)
    return (slice(top, bottom), slice(left, right)), np.asarray(image)


def _depth(outline: np.ndarray, shape: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """Window of an outline and, in it, the float32 pixels from its edge (0 outside)."""
    spot = _polygon(outline, shape, pad=3)
    if spot is None:
        return None
    return spot[0], ndimage.distance_transform_edt(np.pad(spot[1], 1))[1:-1, 1:-1].astype(np.float32)


def _place_glands(rng, core, rough) -> np.ndarray:
    """Fill the regions with glands, the large ones first; returns where glands are on the coarse grid."""
    taken = np.zeros(core.region.shape, bool)
    scale = core.um / COARSE  # coarse pixels per micrometre
    for pattern, make in demo_glands.GLANDS.items():
        ys, xs = np.nonzero((core.inside > 0) & (core.region == pattern))
        for (low, high), tries in demo_glands.SIZES[pattern]:
            for pick in rng.integers(0, len(xs), int(tries * len(xs) / scale**2 / 1e6)) if len(xs) else ():
                radius, gap = rng.uniform(low, high), rng.uniform(*demo_glands.GAPS[pattern])
                middle = np.array([xs[pick], ys[pick]])
                if _crowded(taken, middle, 0.7 * radius * scale):
                    continue
                gland = make(rng, radius)
                if _claim(taken, gland, middle, gap, scale):
                    draw_gland(rng, core, gland, middle * COARSE, rough)
    return taken


def _crowded(taken: np.ndarray, middle: np.ndarray, reach: float) -> bool:
    x, y = middle.tolist()
    bottom, right = taken.shape[0] - 1, taken.shape[1] - 1
    around = ((0, 0), (reach, 0), (-reach, 0), (0, reach), (0, -reach))
    return any(taken[min(max(int(y + dy), 0), bottom), min(max(int(x + dx), 0), right)] for dx, dy in around)


def _claim(taken, gland, middle, gap, scale) -> bool:
    """Mark the gland's place, grown by ``gap`` micrometres, unless it would lie over another gland."""
    grown = scale * (1 + gap / gland.radius)
    spots = [_polygon(part * grown + middle, taken.shape, pad=0) for part in gland.parts]
    if not any(spots) or any((taken[spot[0]] & spot[1].view(bool)).any() for spot in spots if spot):
        return False
    for part in gland.parts:
        spot = _polygon(part * scale + middle, taken.shape, pad=0)
        if spot:
            taken[spot[0]] |= spot[1].view(bool)
    return True


def _raise(layer: np.ndarray, window: tuple[slice, slice], value: np.ndarray) -> None:
    """Soft union: ``value`` (0..1, clipped here) into a uint8 mask."""
    layer[window] = np.maximum(layer[window], (np.clip(value, 0, 1) * 255).astype(np.uint8))


def draw_gland(rng, core: Core, gland: Gland, middle: np.ndarray, rough: np.ndarray) -> None:
    """Write a gland's masks, traits and cells into the core; ``middle`` in pixels."""
    um = core.um
    number = len(core.traits)
    core.traits.append((gland.pattern, *gland.tone, gland.froth, *gland.secretion, gland.cleft))
    for found in (_depth(part * um + middle, core.shape) for part in gland.parts):
        if not found:
            continue
        window, depth = found
        top, left = (int(rng.integers(0, SIDE - side)) if side < SIDE else 0 for side in depth.shape)
        uneven = np.resize(rough[top : top + depth.shape[0], left : left + depth.shape[1]], depth.shape)
        edge = np.where(depth > 0, depth + 0.25 * um * uneven, 0)
        core.gland[window][edge > 0.2 * um] = number
        _raise(core.epithelium, window, edge / (0.6 * um))
        if gland.height:
            _raise(core.lumen, window, (depth / um - gland.height + 0.9 * uneven) / 1.6 + 0.5)
            _place_content(rng, core, gland, window, depth)
        if gland.necrosis:
            _raise(core.necrosis, window, (depth / um - (gland.radius * 0.75 - gland.necrosis)) / 5 + 0.5 * uneven)
    for found in (_depth(hole * um + middle, core.shape) for hole in gland.lumina):
        if found:
            _raise(core.lumen, found[0], found[1] / (1.2 * um))
    _plan_cells(rng, core, gland, middle)


def _place_content(rng, core, gland, window, depth) -> None:
    """A body such as a corpus amylaceum where the lumen is widest, if it fits."""
    if gland.content is None or depth.max() < (gland.height + 16) * core.um:
        return
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    core.cells[gland.content].append(np.array([[x + window[1].start, y + window[0].start, rng.uniform(0, np.pi)]]))


def _plan_cells(rng, core, gland, middle) -> None:
    if gland.fill:
        outline = np.concatenate(gland.parts)
        places = demo_glands.hexagons(rng, outline.min(0), outline.max(0), gland.fill)
        gland.cells.append((gland.kind, places, rng.uniform(0, np.pi, len(places))))
    for kind, places, angle in gland.cells:
        core.cells[kind].append(np.column_stack([places * core.um + middle, angle]))


def _measure_surroundings(rng, core) -> None:
    """Distance to the glands, and the fibres: around the glands near them, elsewhere a slow flow along the core."""
    um = core.um
    gland = core.gland[COARSE // 2 :: COARSE, COARSE // 2 :: COARSE]
    distance, nearest = ndimage.distance_transform_edt(gland == 0, return_indices=True)
    distance = ndimage.gaussian_filter(distance.astype(np.float32), 0.7)
    core.distance = distance * COARSE
    core.cleft = np.array(core.traits, np.float32)[gland[tuple(nearest)], CLEFT]
    flow = (
        np.pi / 2
        + 0.8 * smooth_noise(rng, gland.shape, 120 * um / COARSE)
        + 0.25 * smooth_noise(rng, gland.shape, 28 * um / COARSE)
    )
    gy, gx = np.gradient(ndimage.gaussian_filter(distance, 2.4))
    around = np.arctan2(gy, gx) + np.pi / 2
    steep = np.hypot(gx, gy)
    weight = np.exp(-core.distance / (22 * um)) * steep / (steep + 0.5)
    cos, sin = ((1 - weight) * wave(2 * flow) + weight * wave(2 * around) for wave in (np.cos, np.sin))
    core.angle = np.mod(0.5 * np.arctan2(sin, cos), np.pi).astype(np.float32)


def _free_places(core: Core, allowed: np.ndarray, per_mm2: float, rng) -> np.ndarray:
    """(n, 2) random places in pixels where ``allowed`` (coarse) holds, about ``per_mm2`` of them per square millimetre of it."""
    ys, xs = np.nonzero(allowed)
    count = int(len(xs) * (COARSE / core.um) ** 2 / 1e6 * per_mm2)
    picks = rng.integers(0, len(xs), count) if len(xs) else []
    return np.column_stack([xs[picks], ys[picks]]) * float(COARSE)


def _single_cells(rng, core, rough, taken) -> None:
    """Pattern 5 between the sheets: cords one cell wide and single tumour cells."""
    tone, froth = (rng.uniform(0.2, 0.34), rng.uniform(0.28, 0.42)), rng.uniform(0.2, 0.7)
    for place in _free_places(core, (core.inside > 6 * core.um) & (core.region == 5) & ~taken, 550, rng):
        turn = rng.choice((0, np.pi))
        for _ in range(rng.choice((1, rng.integers(3, 10)), p=(0.55, 0.45))):
            x, y = place.astype(int)
            if not (0 <= y < core.shape[0] and 0 <= x < core.shape[1]) or core.gland[y, x]:
                break
            body = demo_glands.blob(rng, rng.uniform(5.0, 6.8), 0.09, 1.2)
            cell = Gland(5, [body], kind="anaplastic", tone=tone, froth=froth)
            cell.cells.append(("anaplastic", np.zeros((1, 2)), rng.uniform(0, np.pi, 1)))
            draw_gland(rng, core, cell, place, rough)
            direction = core.angle[y // COARSE, x // COARSE] + turn + rng.normal(0, 0.15)
            place = place + core.um * rng.uniform(8.5, 11) * np.array([np.cos(direction), np.sin(direction)])


def _stroma_cells(rng, core) -> None:
    """Spindle nuclei along the fibres and lymphocytes, single ones and foci, all between the glands."""
    h, w = core.shape
    density = smooth_noise(rng, core.region.shape, 60 * core.um / COARSE)
    focus = smooth_noise(rng, core.region.shape, 75 * core.um / COARSE)
    everywhere = np.zeros_like(focus)
    for kind, spacing, where, least in (
        ("spindle", 15, density, -0.1),
        ("lymphocyte", 7.5, focus, 2.5),
        ("lymphocyte", 55, everywhere, -1),
    ):
        places = demo_glands.hexagons(rng, np.zeros(2), np.array([w, h]) / core.um, spacing, 0.33) * core.um
        places = places[((places >= 0) & (places < (w, h))).all(1)]
        x, y = places.astype(int).T
        cx, cy = x // COARSE, y // COARSE
        keep = where[cy, cx] + 0.5 * rng.normal(size=len(x)) > least
        keep &= (core.epithelium[y, x] < 25) & (core.inside[cy, cx] > core.um)
        core.cells[kind].append(np.column_stack([places, core.angle[cy, cx] + rng.normal(0, 0.15, len(x))])[keep])


def place_vessels(rng, core: Core) -> list[tuple[tuple[slice, slice], np.ndarray]]:
    """Small vessels between the glands: adds endothelium and red cells; returns windows and float32 coverage of the hollows."""
    um = core.um
    hollows = []
    for middle in _free_places(core, (core.inside > 14 * um) & (core.distance > 13 * um), 45, rng):
        outline = demo_glands.blob(rng, rng.uniform(3.5, 11), 0.08, rng.uniform(1, 2.4))
        found = _depth(outline * um + middle, core.shape)
        if not found:
            continue
        window, depth = found
        hollows.append((window, np.clip(depth / (0.8 * um), 0, 1)))
        wall, normal = demo_glands.lining(rng, outline, rng.uniform(9, 15), -0.8, 0.3)
        core.cells["spindle"].append(np.column_stack([wall * um + middle, normal + np.pi / 2]))
        if rng.random() < 0.7:
            blood = demo_glands.hexagons(rng, outline.min(0), outline.max(0), rng.uniform(5, 7), 0.3) * um + middle
            x, y = np.clip(blood.astype(int) - (window[1].start, window[0].start), 0, np.array(depth.shape[::-1]) - 1).T
            core.cells["erythrocyte"].append(np.column_stack([blood, rng.uniform(0, np.pi, len(blood))])[depth[y, x] > 1.5 * um])
    return hollows


def _settle_cells(core) -> None:
    """Drop epithelial cells that lie in a lumen, outside their gland, in necrosis, or on one another."""
    h, w = core.shape
    for kind in EPITHELIAL:
        cells = np.concatenate(core.cells[kind]) if core.cells[kind] else np.empty((0, 3))
        cells = cells[((cells[:, :2] >= 0) & (cells[:, :2] < (w, h))).all(1)]
        x, y = cells[:, :2].astype(int).T
        good = (core.epithelium[y, x] > 150) & (core.lumen[y, x] < 12) & (core.necrosis[y, x] < 75)
        cells = cells[good & (core.inside[y // COARSE, x // COARSE] > 0)]
        core.cells[kind] = [cells[_apart(cells[:, :2], (3.6 if kind == "basal" else 5.6) * core.um)]]


def _apart(places: np.ndarray, distance: float) -> np.ndarray:
    """(n,) bool: keep places so that no two kept ones are closer than ``distance``; earlier ones win."""
    keep = np.ones(len(places), bool)
    pairs = cKDTree(places).query_pairs(distance, output_type="ndarray") if len(places) > 1 else np.empty((0, 2), int)
    for first, second in pairs[np.lexsort(pairs.T[::-1])].tolist():
        if keep[first] and keep[second]:
            keep[second] = False
    return keep
