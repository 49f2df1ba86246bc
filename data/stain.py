"""Stain in optical density: separation, jitter, and normalisation to the look of one set of patches.

Beer-Lambert: light that passes a stain falls off exponentially with its amount, so stains add up in optical density (OD), not in
RGB. The fixed hematoxylin and eosin directions are those of Ruifrok and Johnston, "Quantification of histochemical staining by
color deconvolution" (2001); jitter follows Tellez et al., "Whole-slide mitosis detection in H&E breast histology" (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

HEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
# The third direction is orthogonal to both, so that the separation has an inverse.
_BASIS = np.array([HEMATOXYLIN, EOSIN, np.cross(HEMATOXYLIN, EOSIN)], dtype=np.float32)
_BASIS /= np.linalg.norm(_BASIS, axis=1, keepdims=True)
_INVERSE = np.linalg.inv(_BASIS)
NORMALIZERS = ("macenko", "reinhard")


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


def fit_normalizer(method: str, references: Iterable[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A function uint8 (H, W, 3) -> uint8 (H, W, 3) that gives a patch the common stain of ``references``.

    ``method``: "macenko" (Macenko et al. 2009) or "reinhard" (Reinhard et al. 2001), both by torchstain. The references (uint8,
    (H, W, 3)) are laid on top of each other as one target. A patch in which no stain can be found comes back unchanged. A patch's
    own stain is measured on it alone, as both papers do with an image: one that is mostly glass, or of one stain, is stretched to
    the target as well, so that glass may turn lilac (reinhard) and pale secretion granular and dark (macenko).
    """
    import torchstain  # slow to import, so only on request

    target = np.concatenate(list(references), axis=0)
    if method == "macenko":
        normalizer = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    elif method == "reinhard":
        normalizer = torchstain.normalizers.ReinhardNormalizer(backend="numpy")
    else:
        raise UserError(f"stain normalisation {method!r} is not one of {', '.join(NORMALIZERS)}; choose one of these")
    normalizer.fit(target)

    def normalize(image: np.ndarray) -> np.ndarray:
        if rgb_to_od(image).mean() < 0.02:
            return image  # blank: no stain direction to find
        try:
            result = normalizer.normalize(I=image)
        except np.linalg.LinAlgError:
            return image
        result = result[0] if isinstance(result, tuple) else result
        return np.clip(np.nan_to_num(np.asarray(result), nan=255.0), 0, 255).astype(np.uint8)

    return normalize
