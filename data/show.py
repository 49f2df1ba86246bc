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
    pixels = np.stack([dataset.pixels(index) for index in chosen])
    squares = pixels.reshape(len(pixels), size, dataset.image_size // size, size, dataset.image_size // size, 3)
    return grid(squares.mean((2, 4)).round().astype(np.uint8), COLUMNS, captions)


def augmented_grid(dataset: PatchDataset, seed: int) -> Image.Image:
    """A column of patches as they are, and beside each what its augmentation makes of it."""
    order = BalancedOrder(dataset.groups(), seed)
    pictures = []
    for row in range(min(ROWS, len(dataset))):
        pixels = dataset.pixels(order(row))
        images = [dataset.augmentation(torch.from_numpy(pixels).permute(2, 0, 1), COLUMNS * row + k) for k in range(COLUMNS - 1)]
        pictures += [pixels[None], to_uint8(torch.stack(images))]
    return grid(np.concatenate(pictures), COLUMNS)
