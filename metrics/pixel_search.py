"""The training patch whose pixels are most like an image's, whole at any shift or half by half, under the eight symmetries.

Small high-passed grey pictures are correlated: that sees through colour, contrast and noise. It is exhaustive: every image with
every training patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from common.progress import track

SIDE = 32  # pixels of the small pictures; also what ``Gallery.thumbnails`` are reduced to
HIGH_PASS = 1.5  # standard deviation in small pixels; below it, all tissue with the same lumen looks alike
NOISE = 0.7  # grey levels, which half of the pixels of a sketch must exceed: below it is nothing to compare
BLANK_HALF = 0.1  # of the usual deviation: half of a half's pixels must exceed it, for glass with one edge matches any other such
_CHUNK = 256
_PATCHES = 64  # correlated at a time: their maps of all shifts stay in a CPU's cache
_TURNS_ON_GPU = 1024  # correlated with those at a time on a GPU: 0.3 GB of maps
_HALVES = tuple(np.s_[:, part, :] for part in (slice(0, SIDE // 2), slice(SIDE // 2, None)))
_HALVES += tuple(np.s_[:, :, part] for part in (slice(0, SIDE // 2), slice(SIDE // 2, None)))


@dataclass(frozen=True)
class Matches:
    """For each image its best match among the training patches: correlation, index, and which symmetry of the image matched."""

    score: np.ndarray
    index: np.ndarray
    symmetry: np.ndarray


class Best:
    """Running maximum of likenesses over symmetries and windows."""

    def __init__(self, count: int):
        self.score, self.index, self.symmetry = np.full(count, -np.inf), np.zeros(count, int), np.zeros(count, int)

    def update(self, at: slice, likeness: np.ndarray, symmetry: int) -> None:
        """likeness (n, M): of the n images ``at`` to every training patch."""
        index = likeness.argmax(1)
        score = likeness[np.arange(len(index)), index]
        better = np.flatnonzero(score > self.score[at])
        rows = better + at.start
        self.score[rows], self.index[rows], self.symmetry[rows] = score[better], index[better], symmetry

    def matches(self) -> Matches:
        return Matches(self.score, self.index, self.symmetry)


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
    parts = []
    for start in range(0, len(images), _CHUNK):
        grey = torch.from_numpy(images[start : start + _CHUNK].mean(3, dtype=np.float32))[:, None]
        parts.append(high_passed(torch.nn.functional.adaptive_avg_pool2d(grey, SIDE)[:, 0].numpy()))
    return np.concatenate(parts)


def high_passed(small: np.ndarray) -> np.ndarray:
    """Grey pictures (N, 32, 32) float32 without their low frequencies."""
    return small - gaussian_filter(small, (0, HIGH_PASS, HIGH_PASS))


def whole_matches(images: np.ndarray, gallery: np.ndarray, what: str, device: str = "cpu") -> Matches:
    """Best matches of sketches (N, 32, 32) among the gallery's (M, 32, 32), each moved by every whole number of small pixels.

    The correlation at all 1,024 shifts at once is the inverse Fourier transform of the product of two spectra. A shift takes in at
    one side what it loses at the other, so only the part that both share counts: of a patch moved by an eighth each way, three
    quarters. Takes about 24 us an image and patch on one CPU thread; ``what`` to call it meanwhile.
    """
    turned = spectra(np.concatenate(symmetries(images)), device).conj().resolve_conj()
    score, index = torch.full((len(turned),), -1.0, device=device), torch.zeros(len(turned), dtype=torch.long, device=device)
    rows = 1 if torch.device(device).type == "cpu" else _TURNS_ON_GPU
    for start in track(range(0, len(gallery), _PATCHES), what, unit=f"times {_PATCHES} patches"):
        likeness, nearest = over_all_shifts(turned, spectra(gallery[start : start + _PATCHES], device), rows)
        index = torch.where(likeness > score, nearest + start, index)
        score = torch.maximum(likeness, score)
    score, index = (part.reshape(8, len(images)).cpu().numpy() for part in (score, index))
    symmetry = score.argmax(0)
    at = symmetry, np.arange(len(images))
    return Matches(score[at].astype(float), index[at], symmetry)


def spectra(pictures: np.ndarray, device: str | torch.device) -> Tensor:
    """Of sketches (N, 32, 32), scaled so that products are correlations: (N, 32, 17)."""
    flat = torch.from_numpy(_unit(pictures, NOISE)).to(device)
    return torch.fft.rfft2(flat.reshape(-1, SIDE, SIDE))


def over_all_shifts(turned: Tensor, patches: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Largest correlation of each of (N, 32, 17) conjugate spectra with any of (P, 32, 17), and with which, (N,) each. rows: that
    are taken at a time.
    """
    found = []
    for part in turned.split(rows):
        maps = torch.fft.irfft2(part[:, None] * patches, s=(SIDE, SIDE))
        found.append(maps.flatten(2).amax(2).max(1))
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def half_matches(images: np.ndarray, gallery: np.ndarray) -> Matches:
    """Best matches of any half of sketches (N, 32, 32) with the same half of the gallery's (M, 32, 32), unshifted."""
    textured = max(BLANK_HALF * float(np.median(gallery.std((1, 2)))), NOISE)
    half_galleries = [_unit(gallery[window], textured) for window in _HALVES]
    best = Best(len(images))
    for start in range(0, len(images), _CHUNK):
        at = slice(start, start + _CHUNK)
        for symmetry, turned in enumerate(symmetries(images[at])):
            for window, half_gallery in zip(_HALVES, half_galleries, strict=True):
                best.update(at, _unit(turned[window], textured) @ half_gallery.T, symmetry)
    return best.matches()


def _unit(pictures: np.ndarray, least: float) -> np.ndarray:
    """Flat vectors without mean, of length 1; below ``least`` in median absolute deviation they become 0."""
    flat = pictures.reshape(len(pictures), -1)
    blank = np.median(np.abs(flat - np.median(flat, axis=1, keepdims=True)), axis=1, keepdims=True) < least
    flat = flat - flat.mean(1, keepdims=True)
    return np.where(blank, 0, flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)).astype(np.float32)
