"""Images for the metric tests: stationary, varied, the colours of H&E, and no two alike."""

import numpy as np
from scipy.ndimage import gaussian_filter


def drawn_tissue(count: int, side: int = 32, seed: int = 0, coarseness: float = 1.5) -> np.ndarray:
    """(count, side, side, 3) uint8: smooth noise between pink and purple."""
    draws = np.random.default_rng(seed)
    noise = gaussian_filter(draws.standard_normal((count, side, side)), (0, coarseness, coarseness), mode="wrap")
    share = 1 / (1 + np.exp(-2 * noise / noise.std()))[..., None]
    colour = share * [235, 170, 210] + (1 - share) * [110, 60, 140]
    return np.clip(colour + draws.normal(0, 3, colour.shape), 0, 255).astype(np.uint8)
