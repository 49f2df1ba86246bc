"""Is a generated image a copy of a training patch? Every one is compared with every training patch.

Two searches, for two ways of copying. Pixels: correlation of small high-passed grey pictures, of whole images and of halves,
over the eight symmetries of the square; it sees through colour, contrast, noise, mirrors and quarter turns, finds images that are
put together or blended from two patches, and is exhaustive because it is cheap. Features: the distance in a network's local
features, which also sees through shifts and crops. What counts as near is learnt from held-out real patches, which are no copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from common.html import data_uri
from common.pictures import grid
from metrics.distances import distances
from metrics.features import Extractor, extract
from metrics.section import Finding, Section, Table

SIDE = 32  # pixels of the small pictures; also what ``Gallery.thumbnails`` are reduced to
HIGH_PASS = 1.5  # standard deviation in small pixels; below it, all tissue with the same lumen looks alike
# Real tissue of other slides reaches 0.42 whole and 0.61 half; copies, turned or recoloured ones 1.00, halves of mixtures 0.95,
# blends of two patches 0.68 (docs/evaluation.md).
WHOLE_LIMIT, HALF_LIMIT = 0.60, 0.85
NOISE = 0.7  # grey levels, which half of the pixels of a sketch must exceed: below it is nothing to compare
BLANK_HALF = 0.1  # of the usual deviation: half of a half's pixels must exceed it, for glass with one edge matches any other such
MARGIN = 0.05  # above what nearly all held-out patches reach
FEATURE_RATIO = 0.75  # of the distance that nearly all held-out patches keep
SHARE_LIMIT = 0.005  # of the images
_SHOWN = 12
_CELL = 128  # pixels: smaller pictures are enlarged to about this side
_CHUNK = 256
_HALVES = tuple(np.s_[:, part, :] for part in (slice(0, SIDE // 2), slice(SIDE // 2, None)))
_HALVES += tuple(np.s_[:, :, part] for part in (slice(0, SIDE // 2), slice(SIDE // 2, None)))


@dataclass(frozen=True)
class Gallery:
    """All training patches, small enough to keep: thumbnails (M, 32, 32, 3) uint8 by area averaging, names, and a patch by its
    index.
    """

    thumbnails: np.ndarray
    names: np.ndarray
    picture: Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Matches:
    """For each image its best match among the training patches: correlation, index, and which symmetry of the image matched."""

    score: np.ndarray
    index: np.ndarray
    symmetry: np.ndarray


def symmetries(images: np.ndarray) -> list[np.ndarray]:
    """The eight pictures of (N, S, S, ...) under the symmetries of the square; entries 2k and 2k + 1 are k quarter turns, plain
    and mirrored.
    """
    turned = [np.rot90(images, quarter, (1, 2)) for quarter in range(4)]
    return [picture for turn in turned for picture in (turn, turn[:, :, ::-1])]


def undo(image: np.ndarray, symmetry: int) -> np.ndarray:
    """Turn a training patch (S, S, 3) into the frame of the image whose ``symmetry`` matched it."""
    plain = image[:, ::-1] if symmetry % 2 else image
    return np.rot90(plain, -(symmetry // 2))


def sketches(images: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N, 32, 32) float32: grey, reduced by area averaging, low frequencies removed."""
    grey = torch.from_numpy(images.mean(3, dtype=np.float32))[:, None]
    small = torch.nn.functional.adaptive_avg_pool2d(grey, SIDE)[:, 0].numpy()
    return small - gaussian_filter(small, (0, HIGH_PASS, HIGH_PASS))


def pixel_matches(images: np.ndarray, gallery: np.ndarray) -> tuple[Matches, Matches]:
    """Best matches of sketches (N, 32, 32) among the gallery's (M, 32, 32): of whole images, and of the best half."""
    whole_gallery = _unit(gallery, NOISE)
    textured = max(BLANK_HALF * float(np.median(gallery.std((1, 2)))), NOISE)
    half_galleries = [_unit(gallery[window], textured) for window in _HALVES]
    whole, half = _Best(len(images)), _Best(len(images))
    for start in range(0, len(images), _CHUNK):
        at = slice(start, start + _CHUNK)
        for symmetry, turned in enumerate(symmetries(images[at])):
            whole.update(at, _unit(turned, NOISE) @ whole_gallery.T, symmetry)
            for window, half_gallery in zip(_HALVES, half_galleries, strict=True):
                half.update(at, _unit(turned[window], textured) @ half_gallery.T, symmetry)
    return whole.matches(), half.matches()


def _unit(pictures: np.ndarray, least: float) -> np.ndarray:
    """Flat vectors without mean, of length 1; below ``least`` in median absolute deviation they become 0."""
    flat = pictures.reshape(len(pictures), -1)
    blank = np.median(np.abs(flat - np.median(flat, axis=1, keepdims=True)), axis=1, keepdims=True) < least
    flat = flat - flat.mean(1, keepdims=True)
    return np.where(blank, 0, flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)).astype(np.float32)


class _Best:
    """Running maximum of correlations over symmetries and windows."""

    def __init__(self, count: int):
        self.score, self.index, self.symmetry = np.full(count, -1.0), np.zeros(count, int), np.zeros(count, int)

    def update(self, at: slice, correlations: np.ndarray, symmetry: int) -> None:
        index = correlations.argmax(1)
        score = correlations[np.arange(len(index)), index]
        better = np.flatnonzero(score > self.score[at])
        rows = better + at.start
        self.score[rows], self.index[rows], self.symmetry[rows] = score[better], index[better], symmetry

    def matches(self) -> Matches:
        return Matches(self.score, self.index, self.symmetry)


def feature_matches(
    images: np.ndarray, training: np.ndarray, extractor: Extractor, what: str, cache: Path | None = None
) -> Matches:
    """Nearest of the training features (M, D) over the symmetries of the images; score is the distance, small is near."""
    best = _Best(len(images))
    best.score[:] = -np.inf
    features = extract(np.concatenate(symmetries(images)), extractor, what, cache).reshape(8, len(images), -1)
    for symmetry in range(8):
        for start in range(0, len(images), _CHUNK):
            at = slice(start, start + _CHUNK)
            best.update(at, -distances(features[symmetry, at], training), symmetry)
    return Matches(-best.score, best.index, best.symmetry)


@dataclass(frozen=True)
class Suspicion:
    """One kind of likeness. excess: (N,) how far beyond the limit, as a ratio; above 1 means copy."""

    kind: str
    limit: float
    excess: np.ndarray
    held_out_excess: np.ndarray
    matches: Matches


def pixel_suspicions(images: np.ndarray, held_out: np.ndarray, thumbnails: np.ndarray) -> list[Suspicion]:
    """Whole-image and half-image likeness of ``images`` (N, S, S, 3), with limits that held-out patches keep."""
    gallery = sketches(thumbnails)
    found, control = pixel_matches(sketches(images), gallery), pixel_matches(sketches(held_out), gallery)
    suspicions = []
    for kind, base, match, real in zip(("whole image", "half image"), (WHOLE_LIMIT, HALF_LIMIT), found, control, strict=True):
        limit = min(max(base, float(np.quantile(real.score, 0.99)) + MARGIN), 0.95)
        suspicions.append(Suspicion(kind, limit, match.score / limit, real.score / limit, match))
    return suspicions


def feature_suspicion(
    images: np.ndarray, held_out: np.ndarray, training: np.ndarray, extractor: Extractor, cache: Path | None = None
) -> Suspicion:
    """Likeness in local features; ``training`` are features (M, D) of the same ``extractor``."""
    found = feature_matches(images, training, extractor, "copies: generated images, eight symmetries")
    control = feature_matches(held_out, training, extractor, "copies: held-out patches, eight symmetries", cache)
    limit = FEATURE_RATIO * float(np.quantile(control.score, 0.01))
    least = limit / 100  # an exact copy lies at distance 0
    return Suspicion("features", limit, limit / (found.score + least), limit / (control.score + least), found)


def copies_section(
    images: np.ndarray, names: np.ndarray, suspicions: list[Suspicion], gallery: Gallery, sampled: Gallery
) -> Section:
    """Share of copies and pictures of the most suspicious pairs.

    images (N, S, S, 3) uint8 and names (N,): the generated ones. sampled: the training patches whose features were compared.
    """
    excess = np.stack([suspicion.excess for suspicion in suspicions])
    control = np.stack([suspicion.held_out_excess for suspicion in suspicions])
    share, real_share = float((excess > 1).any(0).mean()), float((control > 1).any(0).mean())
    section = Section("copies", "Copies of training patches", _EXPLANATION)
    section.numbers = {"share": share, "held_out_share": real_share, "n_generated": len(images), "n_training": len(gallery.names)}
    section.numbers["kinds"] = {
        suspicion.kind: {"limit": suspicion.limit, "share": float((suspicion.excess > 1).mean())} for suspicion in suspicions
    }
    rows = [[s.kind, f"{s.limit:.2f}", f"{(s.excess > 1).mean():.1%}", f"{(s.held_out_excess > 1).mean():.1%}"] for s in suspicions]
    rows.append(["any", "", f"{share:.1%}", f"{real_share:.1%}"])
    section.tables.append(Table("Share of images beyond the limit", ["likeness", "limit", "generated", "held-out real"], rows))
    limit = SHARE_LIMIT + real_share
    if share > limit:
        text = f"{share:.1%} of the images are copies of training patches, turned, recoloured, mixed or shifted ones included"
        section.findings.append(Finding("copies", text, share, limit))
    cells, pairs = _pairs(images, names, suspicions, gallery, sampled)
    section.numbers["most_suspicious"] = pairs
    section.tables.append(Table("Most suspicious pairs", ["image", "training patch", "likeness", "of the limit"], pairs))
    caption = "The same pairs from left to right: generated image, and the training patch in its matching turn"
    section.figures.append((caption, data_uri(grid(cells, 6), "JPEG")))
    return section


_EXPLANATION = (
    "Each image is compared with the training patches under the eight symmetries of the square: as a whole, half by half, and by "
    "local "
    "features. The limits are what held-out real patches keep to; a beyond-limit image repeats a patient's tissue."
)


def _pairs(
    images: np.ndarray, names: np.ndarray, suspicions: list[Suspicion], gallery: Gallery, sampled: Gallery
) -> tuple[np.ndarray, list[list[str]]]:
    excess = np.stack([suspicion.excess for suspicion in suspicions])
    cells, rows = [], []
    for image in np.argsort(-excess.max(0), kind="stable")[:_SHOWN]:
        suspicion = suspicions[int(excess[:, image].argmax())]
        source = sampled if suspicion.kind == "features" else gallery
        index = int(suspicion.matches.index[image])
        cells += [images[image], undo(source.picture(index), int(suspicion.matches.symmetry[image]))]
        rows.append([str(names[image]), str(source.names[index]), suspicion.kind, f"{suspicion.excess[image]:.2f}"])
    enlarged = max(_CELL // images.shape[1], 1)
    return np.stack(cells).repeat(enlarged, 1).repeat(enlarged, 2), rows
