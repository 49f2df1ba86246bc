"""Is a generated image a copy of a training patch?

Small high-passed grey pictures are correlated with those of every training patch, which sees through colour, contrast, noise and
slight warps: whole images at every shift and half by half, over the eight symmetries of the square (metrics.pixel_search), which
finds images that are put together or blended from two patches too, and in other turns and sizes (metrics.turned_search). What
counts as near is learnt from held-out real patches, which are no copies. What is found and what is not: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.html import data_uri
from common.pictures import grid
from metrics.features import Extractor, extract
from metrics.pixel_search import Matches, half_matches, sketches, undo, whole_matches
from metrics.section import Finding, Section, Table
from metrics.turned_search import turned_matches

# What each search reaches on real tissue of other slides and on planted copies: docs/evaluation.md.
WHOLE_LIMIT, HALF_LIMIT, TURNED_LIMIT = 0.38, 0.85, 0.38
WHOLE_CERTAIN, HALF_CERTAIN = 0.80, 0.90  # correlations that are never chance: one such image is a finding
MARGIN = 0.05  # above what nearly all held-out patches reach
SHARE_LIMIT = 0.005  # of the images
_SHOWN = 12
_CELL = 128  # pixels: smaller pictures are enlarged to about this side


@dataclass(frozen=True)
class Gallery:
    """All training patches, small enough to keep: thumbnails (M, 32, 32, 3) uint8 by area averaging, names, and a patch by its
    index.
    """

    thumbnails: np.ndarray
    names: np.ndarray
    picture: Callable[[int], np.ndarray]


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


def turned_suspicion(
    images: np.ndarray, held_out: np.ndarray, thumbnails: np.ndarray, extractor: Extractor, cache: Path | None = None
) -> Suspicion:
    """Likeness in any turn and size. extractor: of features that no turn changes. cache: folder for those of the patches."""
    training = extract(thumbnails, extractor, "copies: features of training patches", cache)
    what = "copies: {} in every turn"
    found = turned_matches(images, training, thumbnails, extractor, what.format("generated images"))
    control = turned_matches(held_out, training, thumbnails, extractor, what.format("held-out patches"))
    return _pixel_suspicion("turned or resized", TURNED_LIMIT, WHOLE_CERTAIN, found, control)


def copies_section(images: np.ndarray, names: np.ndarray, suspicions: list[Suspicion], gallery: Gallery) -> Section:
    """Share of copies and pictures of the most suspicious pairs. images (N, S, S, 3) uint8 and names (N,): the generated ones."""
    excess = np.stack([suspicion.excess for suspicion in suspicions])
    control = np.stack([suspicion.held_out_excess for suspicion in suspicions])
    share, real_share = float((excess > 1).any(0).mean()), float((control > 1).any(0).mean())
    section = Section("copies", "Copies of training patches", _explanation(suspicions, gallery))
    section.numbers = {"share": share, "held_out_share": real_share, "n_generated": len(images), "n_training": len(gallery.names)}
    section.numbers["kinds"] = {
        suspicion.kind: {"limit": suspicion.limit, "share": float((suspicion.excess > 1).mean())} for suspicion in suspicions
    }
    rows = [[s.kind, f"{s.limit:.2f}", f"{(s.excess > 1).mean():.1%}", f"{(s.held_out_excess > 1).mean():.1%}"] for s in suspicions]
    rows.append(["any", "", f"{share:.1%}", f"{real_share:.1%}"])
    section.tables.append(Table("Share of images beyond the limit", ["likeness", "limit", "generated", "held-out real"], rows))
    cells, pairs = _pairs(images, names, suspicions, gallery)
    section.numbers["most_suspicious"] = pairs
    _judge(section, names, suspicions, share, SHARE_LIMIT + real_share)
    section.tables.append(Table("Most suspicious pairs", ["image", "training patch", "likeness", "of the limit"], pairs))
    caption = "The same pairs from left to right: generated image, and the training patch in the nearest of its eight symmetries"
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


def _explanation(suspicions: list[Suspicion], gallery: Gallery) -> str:
    text = (
        f"The pixels of each image are compared with all {len(gallery.names)} training patches under the eight symmetries of the "
        "square: as a whole moved by any distance, and half by half"
    )
    if len(suspicions) > 2:
        text += "; with the likeliest patches also turned by any angle, enlarged and reduced"
    return text + (
        ". The limits are what held-out patches keep to; an image beyond them repeats a patient's tissue. Few are objected to "
        f"where they are more than {SHARE_LIMIT:.1%}, one alone where its pixels leave no doubt: correlation of whole images above "
        f"{WHOLE_CERTAIN}, of halves above {HALF_CERTAIN}."
    )


def _first(names: np.ndarray, chosen: np.ndarray, most: int = 3) -> str:
    listed = ", ".join(map(str, names[chosen][:most]))
    return listed + (" and more" if chosen.sum() > most else "")


def _pairs(
    images: np.ndarray, names: np.ndarray, suspicions: list[Suspicion], gallery: Gallery
) -> tuple[np.ndarray, list[list[str]]]:
    excess = np.stack([suspicion.excess for suspicion in suspicions])
    cells, rows = [], []
    for image in np.argsort(-excess.max(0), kind="stable")[:_SHOWN]:
        suspicion = suspicions[int(excess[:, image].argmax())]
        index = int(suspicion.matches.index[image])
        cells += [images[image], undo(gallery.picture(index), int(suspicion.matches.symmetry[image]))]
        rows.append([str(names[image]), str(gallery.names[index]), suspicion.kind, f"{suspicion.excess[image]:.2f}"])
    enlarged = max(_CELL // images.shape[1], 1)
    return np.stack(cells).repeat(enlarged, 1).repeat(enlarged, 2), rows
