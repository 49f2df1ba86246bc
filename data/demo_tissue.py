"""The demo tissue painter: a laid-out core becomes densities of hematoxylin and eosin.

Painted from the bottom up: fibres of the stroma, cytoplasm with cell borders, what stands in the lumina, and the cells on top. The
sharp layers are painted in bands of rows, which stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from data import demo_layout, demo_texture
from data.demo_layout import COARSE, Core
from data.demo_texture import ANGLES, DIRECTIONS, SIDE, magnify, smooth_noise, spread

BAND = 256  # rows painted at a time
Window = tuple[slice, slice]


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
class Painted:
    """A painted core: ``hematoxylin`` and ``eosin`` densities and ``tissue`` (0..1), (h, w) float32, and what they show."""

    core: Core
    hematoxylin: np.ndarray
    eosin: np.ndarray
    tissue: np.ndarray


def paint_core(rng: np.random.Generator, palette: Palette, shape: tuple[int, int], width: float, segments: list) -> Painted:
    """Lay out and paint one core (arguments as for ``data.demo_layout.plan_core``)."""
    core = demo_layout.plan_core(rng, palette.um, shape, width, segments, palette.grains[1])
    painted = Painted(core, *(np.zeros(shape, np.float32) for _ in range(3)))
    hollows = demo_layout.place_vessels(rng, core)
    slow = _slow_fields(rng, core)
    border, tint = _cell_borders(rng, core)
    traits = np.array(core.traits, np.float32)
    windows = list(bands(core))
    for window in windows:
        _stroma(rng, palette, painted, slow, window)
    for window, hollow in hollows:
        painted.eosin[window] *= 1 - 0.95 * hollow
        painted.hematoxylin[window] *= 1 - 0.95 * hollow
    for window in windows:
        look = traits[core.gland[window]]
        _cytoplasm(rng, palette, painted, look, magnify(border, 2, window), magnify(tint, 2, window), window)
        _lumen(rng, palette, painted, look, slow, window)
    _scatter_debris(rng, core)
    _stamp(rng, palette, painted)
    painted.eosin *= painted.tissue
    painted.hematoxylin *= painted.tissue
    return painted


def bands(core: Core) -> Iterator[Window]:
    """Windows that together hold all tissue: bands of rows, as wide as the tissue is there."""
    h, w = core.shape
    margin = int(4 * core.um)
    for top in range(0, h, BAND):
        rows = slice(top, min(top + BAND, h))
        columns = np.nonzero((core.inside[top // COARSE : rows.stop // COARSE] > -margin).any(0))[0]
        if len(columns):
            yield rows, slice(int(columns[0]) * COARSE, min((int(columns[-1]) + 1) * COARSE, w))


def _slow_fields(rng, core) -> dict[str, np.ndarray]:
    """Coarse fields that vary slowly over the core."""

    def noise(scale_um: float) -> np.ndarray:
        return smooth_noise(rng, core.region.shape, scale_um * core.um / COARSE)

    dense = noise(70)
    fields = {
        "dense": dense,
        "loose": np.clip(0.5 + 0.5 * noise(45) - 0.3 * dense, 0, 1),
        "wave_x": 1.6 * core.um * noise(13),
        "wave_y": 1.6 * core.um * noise(13),
        "blue": noise(30),
        "secretion": noise(16),
        # Above 0 where the gland has come off its stroma.
        "retraction": np.where(core.cleft > 0, core.cleft * (1.6 + 2.0 * noise(18)) - core.distance / core.um, -9.0),
        "cos": np.cos(2 * core.angle),
        "sin": np.sin(2 * core.angle),
    }
    return {name: np.ascontiguousarray(value, np.float32) for name, value in fields.items()}


def _stroma(rng, palette, painted, slow, window) -> None:
    """Wavy collagen and smooth muscle with clefts between the bundles, and the retraction clefts around glands."""
    core, um = painted.core, palette.um
    here = {name: magnify(field, COARSE, window) for name, field in slow.items()}
    fibres = _fibres(palette, window, here)
    fine = spread(rng, palette.grains[0], fibres.shape)
    loose = here["loose"]
    eosin = 0.82 + 0.13 * here["dense"] + (0.17 + 0.14 * loose) * fibres + 0.1 * fine
    gap = np.clip((-fibres - (1.6 - 0.95 * loose)) / 0.45, 0, 1)
    gap = np.maximum(gap, np.clip(here["retraction"] + 0.15 * fine, 0, 1))
    painted.eosin[window] = np.maximum(eosin, 0.12) * (1 - 0.92 * gap)
    painted.hematoxylin[window] = np.maximum(0.10 + 0.03 * fibres + 0.03 * here["blue"], 0.02) * (1 - 0.92 * gap)
    edge = magnify(core.inside, COARSE, window) + 0.8 * um * spread(rng, palette.grains[1], fibres.shape)
    painted.tissue[window] = np.clip(edge / (0.8 * um), 0, 1)


def _fibres(palette, window, here) -> np.ndarray:
    """Fibre texture of a window: per pixel the two tiles nearest to the local direction, mixed, read at wavy places."""
    y = np.arange(window[0].start, window[0].stop, dtype=np.int32)[:, None] + here["wave_y"].astype(np.int32)
    x = np.arange(window[1].start, window[1].stop, dtype=np.int32)[None, :] + here["wave_x"].astype(np.int32)
    place = (y & (SIDE - 1)) * SIDE + (x & (SIDE - 1))
    step = np.mod(np.arctan2(here["sin"], here["cos"]) * np.float32(DIRECTIONS / 2 / np.pi), DIRECTIONS)
    low = step.astype(np.int32)
    part = step - low
    flat = palette.fibres.reshape(-1)
    fibres = (1 - part) * flat[low % DIRECTIONS * (SIDE * SIDE) + place]
    fibres += part * flat[(low + 1) % DIRECTIONS * (SIDE * SIDE) + place]
    # Neighbouring directions share about 60 % of their variance: keep the contrast even between the tiles.
    return fibres / np.sqrt((1 - part) ** 2 + part**2 + 1.2 * part * (1 - part))


def _cell_borders(rng, core) -> tuple[np.ndarray, np.ndarray]:
    """(h / 2, w / 2) float32: cell borders 0..1 half-way between epithelial nuclei, and a random tint of each cell."""
    places = np.concatenate([cells[:, :2] for kind in demo_layout.EPITHELIAL[:-1] for cells in core.cells[kind]])
    border, tint = np.zeros((2, core.shape[0] // 2, core.shape[1] // 2), np.float32)
    wanted = (core.epithelium[::2, ::2] > 12) & (core.lumen[::2, ::2] < 250)
    wanted &= (core.inside > -4).repeat(2, 0).repeat(2, 1)
    ys, xs = np.nonzero(wanted)
    if len(places) > 1 and len(xs):
        near, which = cKDTree(places).query(np.column_stack([xs, ys]) * 2.0, k=2)
        border[ys, xs] = np.exp(-(((near[:, 1] - near[:, 0]) / (0.9 * core.um)) ** 2))
        tint[ys, xs] = rng.normal(size=len(places)).astype(np.float32)[which[:, 0]]
    return border, tint


def _cytoplasm(rng, palette, painted, look, border, tint, window) -> None:
    """Paint the epithelium: tone per gland and per cell, froth, borders between cells; then necrosis over it."""
    core = painted.core
    fine, middle, coarse = (spread(rng, tile, border.shape) for tile in palette.grains)
    foam = look[..., demo_layout.FROTH] * np.clip(0.2 + 0.75 * middle + 0.55 * coarse + 0.3 * fine, 0, 1.4)
    texture = np.maximum((1 + 0.2 * tint + 0.26 * fine + 0.2 * middle) * (1 - 0.66 * foam), 0.1)
    cover = core.epithelium[window] * np.float32(1 / 255)
    dead = core.necrosis[window] * np.float32(1 / 255)
    for dye, tone, membrane, debris in (
        (painted.eosin, demo_layout.TONE_E, 0.45, 0.62 + 0.18 * middle + 0.12 * coarse),
        (painted.hematoxylin, demo_layout.TONE_H, 0.15, 0.16 + 0.07 * fine + 0.05 * middle),
    ):
        dye[window] += cover * (look[..., tone] * (texture + membrane * border) - dye[window])
        dye[window] += dead * (debris - dye[window])


def _lumen(rng, palette, painted, look, slow, window) -> None:
    """Open the lumina and put secretion into those that hold some: pink and granular, or blue mucin in wisps."""
    middle, coarse = (spread(rng, tile, look.shape[:2]) for tile in palette.grains[1:])
    slow_here = magnify(slow["secretion"], COARSE, window)
    body = np.clip(0.75 + 0.7 * slow_here, 0, 1) * (1 + 0.18 * middle)
    wisps = np.clip(0.3 + 0.6 * coarse + 0.5 * slow_here, 0, 1.5)
    open_ = painted.core.lumen[window] * np.float32(1 / 255)
    for dye, content in (
        (painted.eosin, look[..., demo_layout.SECRETION_E] * body + 0.01),
        (painted.hematoxylin, look[..., demo_layout.SECRETION_H] * wisps),
    ):
        dye[window] += open_ * (content - dye[window])


def _scatter_debris(rng, core) -> None:
    """Dark fragments of nuclei in necrosis."""
    y, x = np.nonzero(core.necrosis[::COARSE, ::COARSE] > 150)
    pick = rng.integers(0, len(x), int(len(x) * COARSE**2 / core.um**2 / 90)) if len(x) else np.empty(0, int)
    core.cells["pyknotic"].append(np.column_stack([x[pick] * COARSE, y[pick] * COARSE, rng.uniform(0, np.pi, len(pick))]))


def _stamp(rng, palette, painted) -> None:
    """Lay the cell sprites over the layers: a nucleus hides most of the cytoplasm below it."""
    h, w = painted.core.shape
    for kind, groups in painted.core.cells.items():
        cells = np.concatenate(groups) if groups else np.empty((0, 3))
        bank = palette.cells[kind]
        side = bank.shape[-1]
        bins = (np.mod(cells[:, 2], np.pi) / np.pi * ANGLES).astype(int) % ANGLES
        variants = len(bank) // ANGLES
        chosen = bins * variants + rng.integers(0, variants, len(cells))
        corners = np.rint(cells[:, :2]).astype(int) - side // 2
        inside = ((corners >= 0) & (corners + side <= (w, h))).all(1)
        for (x, y), sprite in zip(corners[inside].tolist(), chosen[inside].tolist(), strict=True):
            hematoxylin, eosin, cover = bank[sprite]
            for dye, stamp, hidden in ((painted.hematoxylin, hematoxylin, 0.85), (painted.eosin, eosin, 0.75)):
                part = dye[y : y + side, x : x + side]
                part *= 1 - hidden * cover
                part += stamp
