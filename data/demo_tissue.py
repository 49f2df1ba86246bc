"""The demo tissue painter: one needle core as stain densities (hematoxylin, eosin) and Gleason patterns.

A core is painted in layers: outline, glands, fibres that flow around them, cytoplasm with cell borders, nuclei. Everything is
laid out in micrometres and rasterised at the slide's resolution. Colour follows from the densities by Beer and Lambert's law
(Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution", 2001).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from data import demo_glands, demo_texture
from data.demo_glands import Gland
from data.demo_texture import resize, smooth_noise

COARSE = 4  # the layout is planned on a grid this many times coarser
NO_GLAND = 255


@dataclass
class Palette:
    """Textures and cell sprites of one slide; ``um`` is pixels per micrometre."""

    um: float
    fibres: np.ndarray
    grains: list[np.ndarray]
    cells: dict[str, np.ndarray]

    @classmethod
    def draw(cls, rng: np.random.Generator, mpp: float) -> Palette:
        """Draw all textures for slides of ``mpp`` micrometres per pixel."""
        um = 1 / mpp
        cells = {name: demo_texture.cell_sprites(rng, kind, um) for name, kind in demo_texture.CELL_KINDS.items()}
        return cls(um, demo_texture.fibre_tiles(rng, um), demo_texture.grain_tiles(rng, um, (0.9, 1.8, 3.6)), cells)


@dataclass
class Core:
    """Layers of one core, all (h, w): ``hematoxylin`` and ``eosin`` densities, soft masks 0..1, and labels.

    region: pattern planned for the place (0 benign, 3, 4, 5). pattern: that of the epithelium drawn there, 255 where there is none.
    """

    tissue: np.ndarray
    region: np.ndarray
    layers: dict[str, np.ndarray]
    pattern: np.ndarray
    cells: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    hematoxylin: np.ndarray | None = None
    eosin: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.tissue.shape


def paint_core(
    rng: np.random.Generator, palette: Palette, shape: tuple[int, int], width: float, segments: list[tuple[float, int]]
) -> Core:
    """Paint one core, ``width`` pixels wide, from top to bottom of ``shape`` with ``segments`` (share of the length, pattern)."""
    core = _outline(rng, palette.um, shape, width, segments)
    taken = _place_glands(rng, palette, core)
    distance = _distance_to_glands(core)
    angle = _fibre_angle(rng, palette.um, core.shape, distance)
    _single_cells(rng, palette, core, angle, taken)
    _stroma(rng, palette, core, angle, distance)
    _vessels(rng, palette, core, taken)
    _stroma_cells(rng, palette.um, core, angle)
    places = _epithelial_cells(palette.um, core)
    _cytoplasm(rng, palette, core, places)
    _lumen(rng, palette, core)
    _stamp(rng, palette, core)
    core.hematoxylin *= core.tissue
    core.eosin *= core.tissue
    return core


def _outline(rng, um, shape, width, segments) -> Core:
    h, w = shape
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    x = np.arange(w, dtype=np.float32)[None, :]
    free = max((w - width) / 2 - 6 * um, 0)
    middle = w / 2 + free * (rng.uniform(-0.45, 0.45) * y + rng.uniform(-0.5, 0.5) * (y**2 - 0.4))
    edge = width / 2 * (1 + 0.1 * resize(rng.standard_normal((max(h // 500, 2) + 2, 1)).astype(np.float32), (h, 1)))
    inside = np.minimum(edge - abs(x - middle), (1 - abs(y)) * h / 2 - rng.uniform(8, 25) * um)
    ragged = inside + um * (5 * smooth_noise(rng, shape, 25 * um) + 1.6 * smooth_noise(rng, shape, 5 * um))
    ragged += 0.7 * um * smooth_noise(rng, shape, 1.6 * um)
    along = (y + 1) / 2 + 35 * um / h * smooth_noise(rng, shape, 110 * um)
    region = np.zeros(shape, np.uint8)
    start = 0.0
    for share, pattern in segments:
        region[along >= start] = pattern
        start += share
    names = ("epithelium", "lumen", "tone_h", "tone_e", "froth", "secretion_h", "secretion_e", "necrosis", "cleft")
    layers = {name: np.zeros(shape, np.float32) for name in names}
    return Core(np.clip(ragged / (0.8 * um), 0, 1), region, layers, np.full(shape, NO_GLAND, np.uint8))


def _polygon(outline: np.ndarray, shape: tuple[int, int], pad: int = 3) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """Rasterise an outline (pixels): the window it covers and its (h, w) bool mask there; None when it lies outside."""
    low = np.maximum(np.floor(outline.min(0)).astype(int) - pad, 0)
    high = np.minimum(np.ceil(outline.max(0)).astype(int) + pad + 1, shape[::-1])
    if (high - low < 2).any():
        return None
    image = Image.new("1", tuple(int(side) for side in high - low))
    ImageDraw.Draw(image).polygon([(float(px), float(py)) for px, py in outline - low], fill=1)
    return (slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0]))), np.asarray(image)


def _place_glands(rng, palette, core) -> np.ndarray:
    """Fill the regions with glands, the large ones first; returns where glands are on the coarse grid."""
    tissue, region = core.tissue[::COARSE, ::COARSE] > 0.5, core.region[::COARSE, ::COARSE]
    taken = np.zeros(tissue.shape, bool)
    scale = palette.um / COARSE  # coarse pixels per micrometre
    for pattern, make in demo_glands.GLANDS.items():
        ys, xs = np.nonzero(tissue & (region == pattern))
        for (low, high), tries in demo_glands.SIZES[pattern]:
            for pick in rng.integers(0, len(xs), int(tries * len(xs) / scale**2 / 1e6)) if len(xs) else ():
                radius, gap = rng.uniform(low, high), rng.uniform(*demo_glands.GAPS[pattern])
                middle = np.array([xs[pick], ys[pick]])
                if _crowded(taken, middle, 0.7 * radius * scale):
                    continue
                gland = make(rng, radius)
                if _claim(taken, gland, middle, gap, scale):
                    _draw(rng, palette, core, gland, middle * COARSE)
    return taken


def _crowded(taken: np.ndarray, middle: np.ndarray, reach: float) -> bool:
    steps = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]) * reach
    x, y = np.clip((middle + steps).astype(int), 0, np.array(taken.shape[::-1]) - 1).T
    return bool(taken[y, x].any())


def _claim(taken, gland, middle, gap, scale) -> bool:
    """Mark the gland's place, grown by ``gap`` micrometres, unless it would lie over another gland."""
    spots = [_polygon(part * (1 + gap / gland.radius) * scale + middle, taken.shape, pad=0) for part in gland.parts]
    spots = [spot for spot in spots if spot is not None]
    if not spots or any((taken[window] & mask).any() for window, mask in spots):
        return False
    for part in gland.parts:
        spot = _polygon(part * scale + middle, taken.shape, pad=0)
        if spot is not None:
            taken[spot[0]] |= spot[1]
    return True


def _depth(outline, shape):
    spot = _polygon(outline, shape)
    return None if spot is None else (spot[0], ndimage.distance_transform_edt(np.pad(spot[1], 1))[1:-1, 1:-1].astype(np.float32))


def _draw(rng, palette, core, gland: Gland, middle) -> None:
    """Write a gland's masks, tone and cells into the layers; ``middle`` in pixels."""
    um, layers = palette.um, core.layers
    grain = palette.grains[1]
    for part in gland.parts:
        found = _depth(part * um + middle, core.shape)
        if found is None:
            continue
        window, depth = found
        first = rng.integers(0, demo_texture.SIDE // 2, 2)
        rough = grain[tuple(slice(int(at), int(at) + side) for at, side in zip(first, depth.shape, strict=True))]
        rough = rough if rough.shape == depth.shape else np.resize(rough, depth.shape)
        inside = np.clip((depth + 0.25 * um * rough) / (0.6 * um), 0, 1)
        new = inside > 0.3
        layers["epithelium"][window] = np.maximum(layers["epithelium"][window], inside)
        core.pattern[window][new] = gland.pattern
        values = {"tone_h": gland.tone[0], "tone_e": gland.tone[1], "froth": gland.froth, "cleft": gland.cleft}
        values |= {"secretion_h": gland.secretion[0], "secretion_e": gland.secretion[1]}
        for name, value in values.items():
            layers[name][window][new] = value
        if gland.height:
            apex = (depth - um * gland.height) / um + 0.9 * rough
            layers["lumen"][window] = np.maximum(layers["lumen"][window], np.clip(apex / 1.6 + 0.5, 0, 1))
        if gland.necrosis:
            dead = np.clip((depth / um - (gland.radius * 0.75 - gland.necrosis)) / 5 + 0.6 * rough, 0, 1)
            layers["necrosis"][window] = np.maximum(layers["necrosis"][window], dead)
    for hole in gland.lumina:
        found = _depth(hole * um + middle, core.shape)
        if found is not None:
            window, depth = found
            layers["lumen"][window] = np.maximum(layers["lumen"][window], np.clip(depth / (1.2 * um), 0, 1))
    _plan_cells(rng, um, core, gland, middle)


def _plan_cells(rng, um, core, gland, middle) -> None:
    if gland.fill:
        outline = np.concatenate(gland.parts)
        places = demo_glands.hexagons(rng, outline.min(0), outline.max(0), gland.fill)
        gland.cells.append((gland.kind, places, rng.uniform(0, np.pi, len(places))))
    for kind, places, angle in gland.cells:
        core.cells[kind].append(np.column_stack([places * um + middle, angle]))


def _distance_to_glands(core) -> np.ndarray:
    """(h / 2, w / 2) float32: pixels from the nearest epithelium."""
    return 2 * ndimage.distance_transform_edt(core.pattern[::2, ::2] == NO_GLAND).astype(np.float32)


def _fibre_angle(rng, um, shape, distance) -> np.ndarray:
    """(h, w) float32 direction of the fibres, 0..pi: around the glands near them, elsewhere a slow flow along the core."""
    small = distance[::4, ::4]
    flow = np.pi / 2 + 0.8 * smooth_noise(rng, small.shape, 120 * um / 8) + 0.25 * smooth_noise(rng, small.shape, 28 * um / 8)
    gy, gx = np.gradient(ndimage.gaussian_filter(small, 1.2))
    around = np.arctan2(gy, gx) + np.pi / 2
    weight = np.exp(-small / (22 * um)) * np.hypot(gx, gy) / (np.hypot(gx, gy) + 1)
    double = [(1 - weight) * f(2 * flow) + weight * f(2 * around) for f in (np.cos, np.sin)]
    cos, sin = (resize(part, shape) for part in double)
    return np.mod(0.5 * np.arctan2(sin, cos), np.float32(np.pi))


def _single_cells(rng, palette, core, angle, taken) -> None:
    """Pattern 5 between the sheets: cords one cell wide and single tumour cells."""
    ys, xs = np.nonzero((core.tissue[::8, ::8] > 0.9) & (core.region[::8, ::8] == 5) & ~taken[::2, ::2])
    count = int(len(xs) * (8 / palette.um) ** 2 / 1e6 * 550)
    tone, froth = (rng.uniform(0.2, 0.34), rng.uniform(0.28, 0.42)), rng.uniform(0.2, 0.7)
    for pick in rng.integers(0, len(xs), count) if len(xs) else ():
        place = np.array([xs[pick], ys[pick]]) * 8.0
        turn = rng.choice((0, np.pi))
        for _ in range(rng.choice((1, rng.integers(3, 10)), p=(0.55, 0.45))):
            x, y = place.astype(int)
            if not (0 <= y < core.shape[0] and 0 <= x < core.shape[1]) or core.pattern[y, x] != NO_GLAND:
                break
            body = demo_glands.blob(rng, rng.uniform(5.0, 6.8), 0.09, 1.2)
            cell = Gland(5, [body], kind="anaplastic", tone=tone, froth=froth)
            cell.cells.append(("anaplastic", np.zeros((1, 2)), rng.uniform(0, np.pi, 1)))
            _draw(rng, palette, core, cell, place)
            direction = angle[y, x] + turn + rng.normal(0, 0.15)
            place = place + palette.um * rng.uniform(8.5, 11) * np.array([np.cos(direction), np.sin(direction)])


def _stroma(rng, palette, core, angle, distance) -> None:
    """Wavy collagen and smooth muscle with clefts between the bundles, and the retraction clefts around glands."""
    um, shape, side = palette.um, core.shape, demo_texture.SIDE
    y = np.arange(shape[0], dtype=np.int32)[:, None] + (1.6 * um * smooth_noise(rng, shape, 13 * um)).astype(np.int32)
    x = np.arange(shape[1], dtype=np.int32)[None, :] + (1.6 * um * smooth_noise(rng, shape, 13 * um)).astype(np.int32)
    place = ((y + int(rng.integers(side))) & (side - 1)) * side + ((x + int(rng.integers(side))) & (side - 1))
    step = angle * np.float32(demo_texture.DIRECTIONS / np.pi)
    low = step.astype(np.int32)
    part = step - low
    flat = palette.fibres.reshape(-1)
    fibres = (1 - part) * flat[(low % demo_texture.DIRECTIONS) * side * side + place]
    fibres += part * flat[((low + 1) % demo_texture.DIRECTIONS) * side * side + place]
    fibres /= np.sqrt((1 - part) ** 2 + part**2 + 1.2 * part * (1 - part))
    slow = smooth_noise(rng, shape, 70 * um)
    loose = np.clip(0.5 + 0.5 * smooth_noise(rng, shape, 45 * um) - 0.25 * slow, 0, 1)
    eosin = 0.74 + 0.10 * slow + (0.13 + 0.12 * loose) * fibres + 0.06 * demo_texture.spread(rng, palette.grains[0], shape)
    gap = np.clip((-fibres - (1.75 - 0.95 * loose)) / 0.5, 0, 1)
    retraction = resize(distance, shape) - um * (1.5 + 1.6 * smooth_noise(rng, shape, 14 * um))
    cleft = resize(ndimage.maximum_filter(core.layers["cleft"][::4, ::4], int(4 * um)), shape)
    gap = np.maximum(gap, np.clip(-retraction / (0.8 * um), 0, 1) * np.clip(cleft, 0, 1))
    core.eosin = np.maximum(eosin, 0.12) * (1 - 0.9 * gap)
    core.hematoxylin = np.maximum(0.10 + 0.02 * fibres + 0.03 * smooth_noise(rng, shape, 30 * um), 0.02) * (1 - 0.9 * gap)


def _vessels(rng, palette, core, taken) -> None:
    """Small vessels: an endothelium around a gap with red blood cells."""
    um = palette.um
    ys, xs = np.nonzero((core.tissue[::8, ::8] > 0.9) & ~ndimage.binary_dilation(taken, iterations=int(9 * um / COARSE))[::2, ::2])
    for pick in rng.integers(0, len(xs), int(len(xs) * (8 / um) ** 2 / 1e6 * 40)) if len(xs) else ():
        middle = np.array([xs[pick], ys[pick]]) * 8.0
        radius = rng.uniform(4, 12)
        outline = demo_glands.blob(rng, radius, 0.08, rng.uniform(1, 2.2))
        window, depth = _depth(outline * um + middle, core.shape)
        hollow = np.clip(depth / (0.8 * um), 0, 1)
        core.eosin[window] *= 1 - 0.95 * hollow
        core.hematoxylin[window] *= 1 - 0.95 * hollow
        wall, normal = demo_glands.lining(rng, outline, rng.uniform(9, 15), -0.8, 0.3)
        core.cells["spindle"].append(np.column_stack([wall * um + middle, normal + np.pi / 2]))
        if rng.random() < 0.7:
            blood = demo_glands.hexagons(rng, outline.min(0), outline.max(0), rng.uniform(5, 7), 0.3) * um + middle
            blood = np.column_stack([blood, rng.uniform(0, np.pi, len(blood))])
            x, y = np.clip(blood[:, :2].astype(int) - (window[1].start, window[0].start), 0, np.array(depth.shape[::-1]) - 1).T
            core.cells["erythrocyte"].append(blood[depth[y, x] > 1.5 * um])


def _stroma_cells(rng, um, core, angle) -> None:
    """Spindle nuclei along the fibres and foci of lymphocytes, both between the glands."""
    h, w = core.shape
    density = smooth_noise(rng, (h // 8 + 1, w // 8 + 1), 60 * um / 8)
    focus = smooth_noise(rng, (h // 8 + 1, w // 8 + 1), 75 * um / 8)
    for kind, spacing, field_, threshold in (
        ("spindle", 17, density, -0.6),
        ("lymphocyte", 7.5, focus, 2.4),
        ("lymphocyte", 60, focus, -9),
    ):
        places = demo_glands.hexagons(rng, np.zeros(2), np.array([w, h]) / um, spacing, 0.33) * um
        places = places[((places >= 0) & (places < (w, h))).all(1)]
        x, y = places.astype(int).T
        keep = field_[y // 8, x // 8] + 0.5 * rng.normal(size=len(x)) > threshold
        keep &= (core.layers["epithelium"][y, x] < 0.1) & (core.tissue[y, x] > 0.9)
        core.cells[kind].append(np.column_stack([places, angle[y, x] + rng.normal(0, 0.12, len(x))])[keep])


def _epithelial_cells(um, core) -> np.ndarray:
    """Drop cells that lie in a lumen, outside their gland or on one another; returns the (n, 2) places of epithelial nuclei."""
    h, w = core.shape
    layers = core.layers
    kept = []
    for kind in ("luminal", "acinar", "fused", "anaplastic", "basal"):
        cells = np.concatenate(core.cells.pop(kind)) if core.cells[kind] else np.empty((0, 3))
        cells = cells[((cells[:, :2] >= 0) & (cells[:, :2] < (w, h))).all(1)]
        x, y = cells[:, :2].astype(int).T
        good = (layers["epithelium"][y, x] > 0.6) & (layers["lumen"][y, x] < 0.05) & (core.tissue[y, x] > 0.5)
        cells = cells[good & (layers["necrosis"][y, x] < 0.3)]
        cells = cells[_apart(cells[:, :2], (3.6 if kind == "basal" else 5.0) * um)]
        core.cells[kind] = [cells]
        if kind != "basal":
            kept.append(cells[:, :2])
    return np.concatenate(kept)


def _apart(places: np.ndarray, distance: float) -> np.ndarray:
    """(n,) bool: keep places so that no two kept ones are closer than ``distance``; earlier ones win."""
    keep = np.ones(len(places), bool)
    pairs = cKDTree(places).query_pairs(distance, output_type="ndarray") if len(places) > 1 else np.empty((0, 2), int)
    for first, second in pairs[np.lexsort(pairs.T[::-1])].tolist():
        if keep[first] and keep[second]:
            keep[second] = False
    return keep


def _cytoplasm(rng, palette, core, places) -> None:
    """Paint the epithelium: tone per gland and per cell, froth, borders between cells."""
    layers, um, shape = core.layers, palette.um, core.shape
    border, tint = np.zeros((2, -(-shape[0] // 2), -(-shape[1] // 2)), np.float32)
    ys, xs = np.nonzero(layers["epithelium"][::2, ::2] > 0.05)
    if len(places) > 1 and len(xs):
        near, which = cKDTree(places).query(np.column_stack([xs, ys]) * 2.0, k=2)
        border[ys, xs] = np.exp(-(((near[:, 1] - near[:, 0]) / (0.9 * um)) ** 2))
        tint[ys, xs] = rng.normal(size=len(places)).astype(np.float32)[which[:, 0]]
    border, tint = resize(border, shape), resize(tint, shape)
    fine, middle, coarse = (demo_texture.spread(rng, tile, shape) for tile in palette.grains)
    foam = layers["froth"] * np.clip(0.25 + 0.55 * middle + 0.35 * coarse + 0.25 * fine, 0, 1.3)
    texture = (1 + 0.14 * tint + 0.16 * fine + 0.12 * middle) * (1 - 0.62 * foam) + 0.3 * border
    cover = layers["epithelium"]
    core.eosin += cover * (layers["tone_e"] * np.maximum(texture, 0.12) - core.eosin)
    core.hematoxylin += cover * (layers["tone_h"] * np.maximum(texture, 0.12) - core.hematoxylin)
    dead = layers["necrosis"]
    core.eosin += dead * (0.62 + 0.18 * middle + 0.12 * coarse - core.eosin)
    core.hematoxylin += dead * (0.16 + 0.07 * fine + 0.05 * middle - core.hematoxylin)
    y, x = np.nonzero(dead[::4, ::4] > 0.6)
    pick = rng.integers(0, len(x), int(len(x) * 16 / um**2 / 90)) if len(x) else np.empty(0, int)
    core.cells["pyknotic"].append(np.column_stack([x[pick] * 4, y[pick] * 4, rng.uniform(0, np.pi, len(pick))]))


def _lumen(rng, palette, core) -> None:
    """Open the lumina and put secretion into those that hold some."""
    layers, shape = core.layers, core.shape
    middle, coarse = (demo_texture.spread(rng, tile, shape) for tile in palette.grains[1:])
    slow = smooth_noise(rng, shape, 16 * palette.um)
    body = np.clip(0.75 + 0.7 * slow, 0, 1)
    wisps = np.clip(0.3 + 0.6 * coarse + 0.5 * slow, 0, 1.5)
    core.eosin += layers["lumen"] * (layers["secretion_e"] * body * (1 + 0.16 * middle) + 0.01 - core.eosin)
    core.hematoxylin += layers["lumen"] * (layers["secretion_h"] * wisps - core.hematoxylin)


def _stamp(rng, palette, core) -> None:
    """Lay the cell sprites over the layers: a nucleus hides the cytoplasm below it."""
    h, w = core.shape
    for kind, groups in core.cells.items():
        cells = np.concatenate(groups) if groups else np.empty((0, 3))
        bank = palette.cells[kind]
        half = bank.shape[-1] // 2
        bins = np.floor(np.mod(cells[:, 2], np.pi) / np.pi * demo_texture.ANGLES).astype(int) % demo_texture.ANGLES
        chosen = bins * demo_texture.VARIANTS + rng.integers(0, demo_texture.VARIANTS, len(cells))
        corners = np.rint(cells[:, :2]).astype(int) - half
        inside = ((corners >= 0) & (corners + bank.shape[-1] <= (w, h))).all(1)
        for (x, y), sprite in zip(corners[inside].tolist(), chosen[inside].tolist(), strict=True):
            window = np.s_[y : y + bank.shape[-1], x : x + bank.shape[-1]]
            hematoxylin, eosin, cover = bank[sprite]
            core.hematoxylin[window] *= 1 - 0.85 * cover
            core.hematoxylin[window] += hematoxylin
            core.eosin[window] *= 1 - 0.75 * cover
            core.eosin[window] += eosin
