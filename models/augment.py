"""What the discriminator sees: differentiable augmentation of real and generated images alike.

With few patches a discriminator learns them by heart; shown each at random places and in random colours it cannot (Zhao et al.,
"Differentiable augmentation for data-efficient GAN training", 2020). Below a bounded probability the generator still has to
match the images as they are, and nothing of it leaks into the samples (Karras et al., ADA, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("translation", "color", "stain", "elastic", "noise")
MOST = 0.6  # largest probability of each kind: above it samples begin to carry the augmentation
TARGET = 0.8  # share of real images judged real above which D learns by heart, ADA's 0.6 for the mean sign
TARGET_PAIRS = 0.93  # share of pairs put in order by a D that judges TARGET of real ones real, docs/experiments_labels.md
ADAPT_IMAGES = 100_000.0  # images from probability 0 to 1

# Optical densities of haematoxylin, eosin and the rest by channel (Ruifrok and Johnston 2001), rows of length 1.
_STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])


@cache
def _stains(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """From amounts of stain to densities and back, (3, 3) each."""
    stains = _STAINS.to(dtype)
    return stains.to(device), torch.linalg.inv(stains).to(device)


def adapt(probability: float, share: float, images: int, pairs: bool = False) -> float:
    """The next probability after ``images`` images of which D judged ``share`` of the real ones real, or put ``pairs`` in order."""
    step = images / ADAPT_IMAGES
    return min(MOST, max(0.0, probability + (step if share > (TARGET_PAIRS if pairs else TARGET) else -step)))


@dataclass(frozen=True)
class Rows:
    """Which images of a whole batch of ``total`` a tensor holds: every ``stride``-th from ``first`` on.

    Random numbers are drawn for the whole batch, so that an image meets the same ones however the batch is divided.
    """

    total: int
    first: int = 0
    stride: int = 1

    def rand(self, *shape: int, device: torch.device) -> Tensor:
        """(n, *shape), uniform in 0..1."""
        return torch.rand(self.total, *shape, device=device)[self.first :: self.stride]

    def randn(self, *shape: int, device: torch.device) -> Tensor:
        """(n, *shape), standard normal."""
        return torch.randn(self.total, *shape, device=device)[self.first :: self.stride]

    def put(self, rows: Tensor, whole: Tensor) -> Tensor:
        """``whole`` with these rows in their places."""
        result = whole.clone()
        result[self.first :: self.stride] = rows
        return result


def augment(images: Tensor, probability: float | Tensor, kinds: tuple[str, ...] = KINDS, rows: Rows | None = None) -> Tensor:
    """(N, 3, S, S) in [-1, 1] -> the same shape; each kind happens to each image with ``probability``.

    probability: 0 changes nothing; a tensor is above it. rows: the images' places in a larger batch; None where they are all of it.
    """
    if not torch.is_tensor(probability) and probability <= 0.0:
        return images
    rows = rows or Rows(len(images))
    for kind in kinds:
        chosen = rows.rand(1, 1, 1, device=images.device) < probability
        images = torch.where(chosen, _OF[kind](images, rows), images)
    return images.contiguous(memory_format=torch.channels_last)


def _uniform(images: Tensor, rows: Rows, *shape: int) -> Tensor:
    return rows.rand(*shape, device=images.device) * 2.0 - 1.0


def _resample(images: Tensor, shift: Tensor) -> Tensor:
    """Images read at displaced places, (N, S, S, 2) in units of half a side, mirrored at the borders."""
    identity = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid + shift, mode="bilinear", padding_mode="reflection", align_corners=False)


def _translation(images: Tensor, rows: Rows) -> Tensor:
    """By whole pixels, up to an eighth of the side."""
    side = images.shape[-1]
    pixels = (_uniform(images, rows, 1, 1, 2) * (side / 8)).round()
    return _resample(images, pixels * (2.0 / side))


def _elastic(images: Tensor, rows: Rows) -> Tensor:
    """A smooth displacement of up to 3 % of the side."""
    coarse = F.interpolate(_uniform(images, rows, 2, 4, 4) * 0.06, size=images.shape[2:], mode="bicubic", align_corners=False)
    return _resample(images, coarse.permute(0, 2, 3, 1))


def _color(images: Tensor, rows: Rows) -> Tensor:
    """Brightness by up to a tenth of the range, saturation and contrast by up to a quarter."""
    images = images + _uniform(images, rows, 1, 1, 1) * 0.2
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (1.0 + 0.25 * _uniform(images, rows, 1, 1, 1))
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    return middle + (images - middle) * (1.0 + 0.25 * _uniform(images, rows, 1, 1, 1))


def _stain(images: Tensor, rows: Rows) -> Tensor:
    """Each stain's density by up to a fifth (Tellez et al. 2018)."""
    stains, unmixing = _stains(images.device, images.dtype)
    density = -torch.log((images + 1.0).clamp(min=0.02) / 2.0)
    amounts = torch.einsum("nchw,cs->nshw", density, unmixing)
    amounts = amounts * (1.0 + 0.2 * _uniform(images, rows, 3, 1, 1))
    return 2.0 * torch.exp(-torch.einsum("nshw,sc->nchw", amounts, stains)) - 1.0


def _noise(images: Tensor, rows: Rows) -> Tensor:
    """White noise of up to 5 % of the range."""
    amount = rows.rand(1, 1, 1, device=images.device)
    return images + 0.1 * rows.randn(*images.shape[1:], device=images.device) * amount


_OF = {"translation": _translation, "color": _color, "stain": _stain, "elastic": _elastic, "noise": _noise}
