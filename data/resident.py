"""Patches held on the GPU: mirrored and turned there, so that a step waits for nothing but two numbers an image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.dataset import PatchDataset
from data.order import BatchesFrom

MEMORY_SHARE = 0.25  # of what is free on the card: the networks need the rest
_CHUNK = 256  # patches copied at once


def fits(dataset: PatchDataset, device: torch.device) -> bool:
    """Whether the patches, decoded and changed by nothing but their symmetries, have room on this CUDA device."""
    if device.type != "cuda" or dataset.decodes or not dataset.augmentation.symmetries_only:
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return len(dataset) * dataset.image_size**2 * 3 <= MEMORY_SHARE * free


class Resident:
    """The batches of a DataLoader over ``dataset``, bit for bit, from patches that lie on ``device``: (N, 3, S, S) and (N,).

    on_device: nothing is loaded between two steps, so no time is spent waiting for data.
    """

    on_device = True

    def __init__(self, dataset: PatchDataset, batches: BatchesFrom, device: torch.device):
        self._augmentation, self._batches, self._device = dataset.augmentation, batches, device
        self._labels = torch.tensor([dataset.label(index) for index in range(len(dataset))], device=device)
        side = dataset.image_size
        self._pixels = torch.empty(len(dataset), 3, side * side, dtype=torch.uint8, device=device)
        for start in range(0, len(dataset), _CHUNK):
            stop = min(start + _CHUNK, len(dataset))
            part = torch.from_numpy(np.stack([dataset.pixels(index) for index in range(start, stop)]))
            self._pixels[start:stop] = part.to(device).permute(0, 3, 1, 2).flatten(2)
        places = torch.arange(side * side, device=device).reshape(1, side, side)
        self._ways = [(across, down, turns) for across in (False, True) for down in (False, True) for turns in range(4)]
        self._places = torch.stack([self._augmentation.moved(places, *way).flatten() for way in self._ways])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        side = round(self._pixels.shape[-1] ** 0.5)
        for draws in self._batches:
            ways = [self._ways.index(self._augmentation.symmetry(draw.seed)) for draw in draws]
            numbers = torch.tensor([[draw.index for draw in draws], ways])
            if self._device.type == "cuda":
                numbers = numbers.pin_memory()
            index, way = numbers.to(self._device, non_blocking=True)
            places = self._places[way][:, None].expand(-1, 3, -1)
            images = self._pixels[index].gather(2, places).unflatten(2, (side, side))
            images = images.to(torch.float32, memory_format=torch.channels_last).div_(255.0).mul_(2.0).sub_(1.0)
            yield images, self._labels[index]
