"""Pictures of patches as training takes them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from common.pictures import grid, to_uint8
from data.dataset import PatchDataset
from data.order import BalancedOrder

ROWS, COLUMNS = 8, 8


def real_grid(dataset: PatchDataset, size: int) -> Image.Image:
    """Real patches laid out as the sample pictures are: a row of eight a class that has patches (few ones repeat), or four rows.

    size: side in pixels that they are averaged down to, of which the dataset's is a multiple.
    """
    labels = np.array([dataset.label(index) for index in range(len(dataset))])
    rows = [np.flatnonzero(labels == number) for number in range(len(dataset.classes))] or np.array_split(
        np.arange(len(dataset)), 4
    )
    captions = [name for name, row in zip(dataset.classes, rows, strict=False) if len(row)]
    chosen = [row[place] for row in rows if len(row) for place in np.linspace(0, len(row) - 1, COLUMNS).astype(int)]
    pixels = _middle_of(np.stack([dataset.pixels(index) for index in chosen]), dataset.image_size)
    squares = pixels.reshape(len(pixels), size, dataset.image_size // size, size, dataset.image_size // size, 3)
    return grid(squares.mean((2, 4)).round().astype(np.uint8), COLUMNS, captions)


def augmented_grid(dataset: PatchDataset, seed: int) -> Image.Image:
    """A column of patches as they are, and beside each what its augmentation makes of it for the discriminator."""
    order = BalancedOrder(dataset.groups(), seed)
    pictures = []
    for row in range(min(ROWS, len(dataset))):
        pixels = dataset.pixels(order(row))
        canvas = torch.from_numpy(pixels).permute(2, 0, 1)
        images = [dataset.augmentation(canvas, dataset.image_size, COLUMNS * row + k) for k in range(COLUMNS - 1)]
        pictures += [_middle_of(pixels[None], dataset.image_size), to_uint8(torch.stack(images))]
    return grid(np.concatenate(pictures), COLUMNS)


def _middle_of(pixels: np.ndarray, size: int) -> np.ndarray:
    """(N, C, C, 3) -> (N, size, size, 3), the middle of the canvas that augmentation works on."""
    start = (pixels.shape[1] - size) // 2
    return pixels[:, start : start + size, start : start + size]
