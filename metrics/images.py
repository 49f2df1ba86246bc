"""Sets of images in memory, with what is known about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from common.errors import UserError
from common.labels import PROVIDERS, known, provider_in
from common.pictures import UNDECODABLE
from common.progress import track

OTHER_MIX = 0.1  # of the images would need another label to have the training patches' shares
MIN_IMAGES = 20  # of a set, below which nothing is said of their distribution


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, and one entry an image in every other field.

    images: (N, S, S, 3) uint8. names: for people. labels, providers: "" where unknown. groups: the slide; images of one slide are
    not independent.
    """

    images: np.ndarray
    names: np.ndarray
    labels: np.ndarray
    providers: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, chosen: np.ndarray) -> ImageSet:
        """The images at these indices, or where this mask is true."""
        return ImageSet(*(getattr(self, name)[chosen] for name in ("images", "names", "labels", "providers", "groups")))


def image_set(images: np.ndarray, labels: Sequence[str] | None = None, names: Sequence[str] | None = None) -> ImageSet:
    """Images that came from no slides: each its own group, without provider."""
    count = len(images)
    own = np.array([str(index) for index in range(count)])
    empty = np.array([""] * count)
    return ImageSet(images, own if names is None else np.array(names), empty if labels is None else np.array(labels), empty, own)


def draw_set(
    sample: Callable[..., np.ndarray],
    labels: Sequence[str],
    real_labels: Sequence[str],
    count: int,
    seed: int,
    providers: Iterable[str] = PROVIDERS,
) -> ImageSet:
    """``count`` generated images, the labels in the proportions of ``real_labels``, so that a set is compared with its like.

    providers: hospitals that labels may end with.

    ``sample(count, seed)``, or ``sample(count, seed, label)`` where the model has ``labels``, gives uint8 (count, S, S, 3).
    """
    if not labels:
        return image_set(sample(count, seed))
    shares = np.array([real_labels.count(label) for label in labels], float)
    shares = shares / shares.sum() if shares.sum() else np.full(len(shares), 1 / len(shares))
    counts = np.diff(np.round(np.cumsum([0, *shares]) * count).astype(int))
    parts = [sample(int(each), seed, label) for label, each in zip(labels, counts, strict=True) if each]
    drawn = image_set(np.concatenate(parts), np.repeat([known(label) for label in labels], counts))
    return replace(drawn, providers=np.repeat([provider_in(label, providers) for label in labels], counts))


def mixed_otherwise(fake: ImageSet, train: ImageSet) -> list[str]:
    """A sentence where the labels of the images have other shares than those of the training patches, else none."""
    if not fake.labels.astype(bool).any():
        return []
    named = sorted({*fake.labels, *train.labels})
    shares = [((fake.labels == name).mean(), (train.labels == name).mean()) for name in named]
    if sum(abs(one - other) for one, other in shares) / 2 < OTHER_MIX:
        return []
    text = ", ".join(f"{name or 'unlabelled'} {one:.0%} for {other:.0%}" for name, (one, other) in zip(named, shares, strict=True))
    return [
        f"The labels of the images are mixed otherwise than those of the training patches ({text}). What is said of all images "
        "together (distances, colour) counts that as a difference: read it label by label, or evaluate the checkpoint itself."
    ]


def read_images(paths: Sequence[Path], decode: Callable[[Path, int], np.ndarray], size: int, what: str) -> np.ndarray:
    """All files through ``decode(path, size)``, two at a time: (N, size, size, 3) uint8.

    Raises UserError naming a file that fails.
    """

    def one(path: Path) -> np.ndarray:
        try:
            return decode(path, size)
        except UNDECODABLE as error:
            raise UserError(f"{path} is not a readable image ({error}); remove it or run check_data.py") from error

    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(track(pool.map(one, paths), what, total=len(paths), unit="images")))


def reduced(images: np.ndarray, size: int) -> np.ndarray:
    """(N, S, S, 3) uint8 -> (N, size, size, 3) uint8 by area averaging, as files are read that are larger."""
    if images.shape[1] == size:
        return images
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX)) for image in images])


def side_of(file: Path | BinaryIO, name: Path) -> int:
    """Smaller side of an image in pixels. name: to call it when it cannot be read."""
    try:
        with Image.open(file) as image:
            return min(image.size)
    except UNDECODABLE as error:
        raise UserError(f"{name} is not a readable image ({error}); remove it") from error


def choose(count: int, limit: int, seed: int) -> np.ndarray:
    """Sorted indices of at most ``limit`` of ``count`` things, drawn without replacement; all of them when they fit."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))
