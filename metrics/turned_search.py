"""The training patch that an image repeats turned by any angle or at another size.

Two steps, since trying every turn and size against every patch takes too long. Features that hardly depend on place or turn name
the likeliest patches; the pixels of these are then compared with the image in many turns and sizes, at every shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.progress import track
from metrics.distances import distances
from metrics.features import Extractor, extract
from metrics.pixel_search import SIDE, Matches, high_passed, over_all_shifts, spectra, symmetries

LIKELIEST = 12  # patches whose pixels are compared
ANGLES = tuple(-45 + 7.5 * step for step in range(12))  # degrees; the symmetries of the square make a whole circle of them
SIZES = tuple(1.1**step for step in range(-4, 3))  # a patch enlarged by 1.1 is found by reducing the image
_FINE = 2 * SIDE  # pixels of the pictures that are turned
_CHUNK = 256
_VIEWS = 64  # correlated at a time: their maps stay in a CPU's cache


def turned_matches(images: np.ndarray, training: np.ndarray, thumbnails: np.ndarray, extractor: Extractor, what: str) -> Matches:
    """Best match of each image (N, S, S, 3) uint8 among the patches in any turn and size, by what ``pixel_search`` compares.

    training: features (M, D) of the patches' ``thumbnails`` (M, 32, 32, 3) by ``extractor``, whose features do not depend on turns.
    Takes about 0.1 s an image on one CPU thread, however many patches there are; ``what`` to call it meanwhile.
    """
    features = extract(reduced(images), extractor, f"{what}: features")
    views, found = _views().to(extractor.device), []
    likeliest = enumerate(_likeliest(features, training))
    for row, nearest in track(likeliest, what, total=len(images), unit="images"):
        score, place, symmetry = _over_all_turns(images[row], thumbnails[nearest], views)
        found.append((score, nearest[place], symmetry))
    return Matches(*map(np.array, zip(*found, strict=True)))


def _likeliest(features: np.ndarray, training: np.ndarray) -> Iterator[np.ndarray]:
    """For each of the images' features (N, D) the numbers of the patches (M, D) that are nearest, at most LIKELIEST."""
    scale = training.std(0) + 1e-6
    training = training / scale
    for start in range(0, len(features), _CHUNK):
        yield from distances(features[start : start + _CHUNK] / scale, training).argsort(1, kind="stable")[:, :LIKELIEST]


def reduced(images: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N, 32, 32, 3), by area averaging as the patches' thumbnails are."""
    parts = []
    for start in range(0, len(images), _CHUNK):
        whole = torch.from_numpy(images[start : start + _CHUNK]).permute(0, 3, 1, 2).float()
        parts.append(F.adaptive_avg_pool2d(whole, SIDE).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def _turn(angle: float, size: float) -> Tensor:
    """What reads an image turned by degrees and ``size`` times as large, (2, 3)."""
    cosine, sine = math.cos(math.radians(angle)) / size, math.sin(math.radians(angle)) / size
    return torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])


def _views() -> Tensor:
    """Where every turn and size reads an image, (V, 64, 64, 2)."""
    turns = torch.stack([_turn(angle, size) for angle in ANGLES for size in SIZES])
    return F.affine_grid(turns, [len(turns), 1, _FINE, _FINE], align_corners=False)


def _over_all_turns(image: np.ndarray, thumbnails: np.ndarray, views: Tensor) -> tuple[float, int, int]:
    """Largest correlation of an image (S, S, 3) with any of the thumbnails (K, 32, 32, 3): with which, under which symmetry."""
    grey = torch.from_numpy(image.mean(2, dtype=np.float32)).to(views.device)
    fine = F.adaptive_avg_pool2d(grey[None, None], _FINE).expand(len(views), -1, -1, -1)
    read = F.grid_sample(fine, views, mode="bilinear", padding_mode="reflection", align_corners=False)
    pictures = np.concatenate(symmetries(high_passed(F.avg_pool2d(read, 2)[:, 0].cpu().numpy())))
    patches = spectra(high_passed(thumbnails.mean(3, dtype=np.float32)), views.device)
    likeness, nearest = over_all_shifts(spectra(pictures, views.device).conj().resolve_conj(), patches, _VIEWS)
    view = int(likeness.argmax())
    return float(likeness[view]), int(nearest[view]), view // len(views)
