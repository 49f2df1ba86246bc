"""Is a generated image a copy of a training patch?

Two searches, for two ways of copying. Pixels: correlation of small high-passed grey pictures, of whole images at every shift and of
halves, over the eight symmetries of the square (metrics.pixel_search); it sees through colour, contrast, noise, mirrors, quarter
turns, shifts and slight warps, finds images that are put together or blended from two patches, and takes in every training patch.
Features: the distance in a network's local features among the patches that were measured, which finds some of the copies turned by
7 degrees or enlarged by a tenth that pixels miss, and overlooks shifts. Neither sees through turns by 15 degrees or enlargement by
a quarter (docs/evaluation.md). What counts as near is learnt from held-out real patches, which are no copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.html import data_uri
from common.pictures import grid
from metrics.distances import distances
from metrics.features import Extractor, extract
from metrics.pixel_search import Best, Matches, half_matches, sketches, symmetries, undo, whole_matches
from metrics.section import Finding, Section, Table

# What each search reaches on real tissue of other slides and on planted copies: docs/evaluation.md.
WHOLE_LIMIT, HALF_LIMIT = 0.38, 0.85
WHOLE_CERTAIN, HALF_CERTAIN = 0.80, 0.90  # correlations that are never chance: one such image is a finding
MARGIN = 0.05  # above what nearly all held-out patches reach
FEATURE_RATIO = 0.75  # of the distance that nearly all held-out patches keep
SHARE_LIMIT = 0.005  # of the images
_SHOWN = 12
_CELL = 128  # pixels: smaller pictures are enlarged to about this side
_CHUNK = 256


@dataclass(frozen=True)
class Gallery:
    """All training patches, small enough to keep: thumbnails (M, 32, 32, 3) uint8 by area averaging, names, and a patch by its
    index.
    """

    thumbnails: np.ndarray
    names: np.ndarray
    picture: Callable[[int], np.ndarray]


def feature_matches(
    images: np.ndarray, training: np.ndarray, extractor: Extractor, what: str, cache: Path | None = None
) -> Matches:
    """Nearest of the training features (M, D) over the symmetries of the images; score is the distance, small is near."""
    best = Best(len(images))
    features = extract(np.concatenate(symmetries(images)), extractor, what, cache).reshape(8, len(images), -1)
    for symmetry in range(8):
        for start in range(0, len(images), _CHUNK):
            at = slice(start, start + _CHUNK)
            best.update(at, -distances(features[symmetry, at], training), symmetry)
    return Matches(-best.score, best.index, best.symmetry)


@dataclass(frozen=True)
class Suspicion:
    """One kind of likeness. excess: (N,) how far beyond the limit, as a ratio; above 1 means copy. certain: the excess above which
    one image is enough.
    """

    kind: str
    limit: float
    excess: np.ndarray
    held_out_excess: np.ndarray
    matches: Matches
    certain: float = np.inf


def pixel_suspicions(images: np.ndarray, held_out: np.ndarray, thumbnails: np.ndarray, device: str = "cpu") -> list[Suspicion]:
    """Whole-image and half-image likeness of ``images`` (N, S, S, 3), with limits that held-out patches keep."""
    gallery, small, real = sketches(thumbnails), sketches(images), sketches(held_out)
    what = "copies: {} at every shift"
    whole = whole_matches(small, gallery, what.format("generated images"), device)
    whole_control = whole_matches(real, gallery, what.format("held-out patches"), device)
    return [
        _pixel_suspicion("whole image", WHOLE_LIMIT, WHOLE_CERTAIN, whole, whole_control),
        _pixel_suspicion("half image", HALF_LIMIT, HALF_CERTAIN, half_matches(small, gallery), half_matches(real, gallery)),
    ]


def _pixel_suspicion(kind: str, base: float, certain: float, found: Matches, control: Matches) -> Suspicion:
    limit = min(max(base, float(np.quantile(control.score, 0.99)) + MARGIN), 0.95)
    return Suspicion(kind, limit, found.score / limit, control.score / limit, found, max(certain / limit, 1.0))


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
    section = Section("copies", "Copies of training patches", _explanation(suspicions, gallery, sampled))
    section.numbers = {"share": share, "held_out_share": real_share, "n_generated": len(images), "n_training": len(gallery.names)}
    section.numbers["kinds"] = {
        suspicion.kind: {"limit": suspicion.limit, "share": float((suspicion.excess > 1).mean())} for suspicion in suspicions
    }
    rows = [[s.kind, f"{s.limit:.2f}", f"{(s.excess > 1).mean():.1%}", f"{(s.held_out_excess > 1).mean():.1%}"] for s in suspicions]
    rows.append(["any", "", f"{share:.1%}", f"{real_share:.1%}"])
    section.tables.append(Table("Share of images beyond the limit", ["likeness", "limit", "generated", "held-out real"], rows))
    cells, pairs = _pairs(images, names, suspicions, gallery, sampled)
    section.numbers["most_suspicious"] = pairs
    _judge(section, names, suspicions, share, SHARE_LIMIT + real_share)
    section.tables.append(Table("Most suspicious pairs", ["image", "training patch", "likeness", "of the limit"], pairs))
    caption = "The same pairs from left to right: generated image, and the training patch in its matching turn"
    section.figures.append((caption, data_uri(grid(cells, 6), "JPEG")))
    return section


def _judge(section: Section, names: np.ndarray, suspicions: list[Suspicion], share: float, limit: float) -> None:
    certain = np.any([suspicion.excess > suspicion.certain for suspicion in suspicions], axis=0)
    count = section.numbers["certain"] = int(certain.sum())
    if share > limit:
        text = f"{share:.1%} of the images are copies of training patches, turned, recoloured, mixed or shifted ones included"
        section.findings.append(Finding("copies", text, share, limit))
    elif count:
        text = f"training patches are repeated almost pixel by pixel in {count} of {len(names)} images: {_first(names, certain)}"
        section.findings.append(Finding("copies", text, count, 0))


def _explanation(suspicions: list[Suspicion], gallery: Gallery, sampled: Gallery) -> str:
    text = (
        "Each image is compared under the eight symmetries of the square: its pixels, as a whole moved by any distance and half by "
        f"half, with all {len(gallery.names)} training patches"
    )
    if any(suspicion.kind == "features" for suspicion in suspicions):
        text += f"; its local features with the {len(sampled.names)} that --max_images chose"
    return text + (
        ". The limits are what held-out patches keep to; an image beyond them repeats a patient's tissue. Few are objected to "
        f"where they are more than {SHARE_LIMIT:.1%}, one alone where its pixels leave no doubt: correlation of whole images above "
        f"{WHOLE_CERTAIN}, of halves above {HALF_CERTAIN}."
    )


def _first(names: np.ndarray, chosen: np.ndarray, most: int = 3) -> str:
    listed = ", ".join(map(str, names[chosen][:most]))
    return listed + (" and more" if chosen.sum() > most else "")


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
