"""Stain in optical density: separation, jitter, and normalisation to the look of one set of patches.

Beer-Lambert: light that passes a stain falls off exponentially with its amount, so stains add up in optical density (OD), not in
RGB. The fixed hematoxylin and eosin directions are those of Ruifrok and Johnston, "Quantification of histochemical staining by
color deconvolution" (2001); jitter follows Tellez et al., "Whole-slide mitosis detection in H&E breast histology" (2018).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

if TYPE_CHECKING:
    from torchstain.base.normalizers import HENormalizer

HEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
# The third direction is orthogonal to both, so that the separation has an inverse.
_BASIS = np.array([HEMATOXYLIN, EOSIN, np.cross(HEMATOXYLIN, EOSIN)], dtype=np.float32)
_BASIS /= np.linalg.norm(_BASIS, axis=1, keepdims=True)
_INVERSE = np.linalg.inv(_BASIS)
NORMALIZERS = ("macenko", "reinhard")
FAINTEST = 0.05  # mean optical density below which a pixel is glass
MIN_STAINED = 0.02  # share of pixels without which a slide's stain cannot be measured
_LIGHT = 240.0  # grey level that torchstain's Macenko takes for glass


def rgb_to_od(image: np.ndarray) -> np.ndarray:
    """Optical density (..., 3) float32 in [0, 2.41] of a uint8 RGB image: -log10((v + 1) / 256), so that white is 0."""
    return -np.log10((image.astype(np.float32) + 1.0) / 256.0)


def separate(od: np.ndarray) -> np.ndarray:
    """Amounts (..., 3) of hematoxylin, eosin and the rest in an OD image (..., 3)."""
    return od @ _INVERSE


def jitter_stain(image: Tensor, strength: float) -> Tensor:
    """Scale and shift each stain of one image at random.

    image: (3, H, W) float in [0, 1]. ``strength`` s: factors from U(1 - s, 1 + s) and shifts from U(-s, s) / 10 OD, drawn from
    torch's global random state. White stays white: the shift is scaled by how much stain a pixel holds.
    """
    od = -torch.log10((image * 255.0 + 1.0) / 256.0).movedim(0, -1)
    amounts = od @ torch.from_numpy(_INVERSE)
    scale = 1.0 + strength * (2.0 * torch.rand(3) - 1.0)
    shift = 0.1 * strength * (2.0 * torch.rand(3) - 1.0)
    stained = (od.sum(-1, keepdim=True) / 0.5).clamp(max=1.0)
    od = ((amounts * scale + shift * stained) @ torch.from_numpy(_BASIS)).movedim(-1, 0)
    return ((256.0 * 10.0**-od - 1.0) / 255.0).clamp(0.0, 1.0)


class StainNormalizer:
    """Gives patches of any slide the common stain of ``references`` (uint8 (H, W, 3) each).

    ``method``: "macenko" (Macenko et al. 2009) or "reinhard" (Reinhard et al. 2001), both fitted by torchstain. A stain is measured
    on many patches of a slide at once, on their stained pixels: measured on one patch, pale secretion would be stretched until it
    is granular and dark. Raises UserError for another method, or where the references hold no stain.
    """

    def __init__(self, method: str, references: Iterable[np.ndarray]):
        if method not in NORMALIZERS:
            raise UserError(f"stain normalisation {method!r} is not one of {', '.join(NORMALIZERS)}; choose one of these")
        self._method = method
        self._target = self.measure(references)
        if self._target is None:
            raise UserError(f"no stain for --stain_normalize {method} can be found in the training patches; leave it out")

    def measure(self, patches: Iterable[np.ndarray]) -> HENormalizer | None:
        """The stain of a slide by some of its patches, uint8 (H, W, 3) each; None where they are blank or of one colour."""
        from torchstain import normalizers  # slow to import, so only on request

        pixels = np.concatenate([patch[::2, ::2].reshape(-1, 1, 3) for patch in patches])  # a quarter says as much
        stained = pixels[rgb_to_od(pixels).mean(-1) > FAINTEST][:, None]
        if len(stained) < MIN_STAINED * len(pixels) or stained.std(axis=0).max() < 1.0:
            return None
        kind = normalizers.MacenkoNormalizer if self._method == "macenko" else normalizers.ReinhardNormalizer
        stain = kind(backend="numpy")
        try:
            stain.fit(stained)
        except np.linalg.LinAlgError:
            return None
        spread = stain.maxCRef if self._method == "macenko" else stain.target_stds
        return stain if np.isfinite(spread).all() and min(spread) > 1e-3 else None

    def normalize(self, patch: np.ndarray, stain: HENormalizer) -> np.ndarray:
        """A patch (H, W, 3) uint8 whose slide has ``stain``, as if its slide had the common one. White stays white."""
        moved = (_macenko if self._method == "macenko" else _reinhard)(patch, stain, self._target)
        # Either would tint glass: the fainter the stain, the more of the patch as it is.
        stained = np.clip(rgb_to_od(patch).mean(-1, keepdims=True) / FAINTEST - 1.0, 0.0, 1.0)
        return np.clip(np.round(patch + stained * (moved - patch)), 0, 255).astype(np.uint8)


def _macenko(patch: np.ndarray, own: HENormalizer, target: HENormalizer) -> np.ndarray:
    """Amounts of the slide's own two stains, scaled by their 99th percentiles, as amounts of the target's."""
    density = -np.log((patch.reshape(-1, 3) + 1.0) / _LIGHT)
    amounts = np.linalg.lstsq(own.HERef, density.T, rcond=None)[0] * (target.maxCRef / own.maxCRef)[:, None]
    return (_LIGHT * np.exp(-target.HERef @ amounts) - 1.0).T.reshape(patch.shape)


def _reinhard(patch: np.ndarray, own: HENormalizer, target: HENormalizer) -> np.ndarray:
    """Mean and spread of each channel of LAB."""
    from torchstain.numpy.utils.lab2rgb import lab2rgb
    from torchstain.numpy.utils.rgb2lab import rgb2lab
    from torchstain.numpy.utils.split import lab_merge, lab_split

    scale = target.target_stds / own.target_stds
    shift = target.target_means - own.target_means * scale
    channels = zip(lab_split(rgb2lab(patch / np.float32(255))), scale, shift, strict=True)
    return 255.0 * lab2rgb(lab_merge(*(lab * np.float32(factor) + np.float32(offset) for lab, factor, offset in channels)))
