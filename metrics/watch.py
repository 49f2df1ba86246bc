"""Scores during training: the part of the evaluation that is cheap enough to run every so many epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.progress import say
from metrics.distances import light_metrics
from metrics.features import Extractor, extract, inception

FEWEST = 3  # real patches that a KID with an error can be taken of
COUNT = 512  # images a side at most: 10 to 20 seconds on two CPU cores


class Watch:
    """Scores images against real patches of the same size, (M, S, S, 3) uint8, always with the same latents.

    The network is loaded and the real patches are measured at the first call, so that a start does not wait for it.
    """

    def __init__(self, real: np.ndarray, seed: int, device: str, cache: Path | None = None):
        self.real, self.seed, self.device, self.cache = real, seed, device, cache
        self._extractor: Extractor | None = None
        self._features = np.empty(0)

    def __call__(self, sample: Callable[[int, int], np.ndarray]) -> dict[str, float]:
        """{"kid", "kid_se", "precision", "recall"} of ``sample(count, seed)``; {} where the weights are not installed."""
        if self._extractor is None:
            try:
                self._extractor = inception(device=self.device)
            except UserError as error:
                say(f"note: no scores during training, {error}")
                return {}
            self._features = extract(self.real, self._extractor, "measuring real patches", self.cache)
        return light_metrics(sample, self._features, self._extractor, COUNT, self.seed)
