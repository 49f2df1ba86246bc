"""Scores during training: the part of the evaluation that is cheap enough to run every so many epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.progress import say
from metrics.distances import coverage_metrics, kid_by_side
from metrics.features import Extractor, extract, inception

FEWEST = 3  # real patches that a KID with an error can be taken of
COUNT = 512  # images a side at most: 10 to 20 seconds on two CPU cores


class Watch:
    """Scores images against real patches of the same size, (M, S, S, 3) uint8, always with the same latents.

    The network is loaded and the real patches are measured at the first call, so that a start does not wait for it.
    """

    def __init__(
        self,
        real: np.ndarray,
        seed: int,
        device: str,
        cache: Path | None = None,
        trained_on: Callable[[], np.ndarray] | None = None,
    ):
        """trained_on: gives real patches that the networks learn from, where ``real`` are others: what can be reached."""
        self.real, self.seed, self.device, self.cache = real, seed, device, cache
        self._trained_on = trained_on
        self._extractor: Extractor | None = None
        self._features, self._digest = np.empty(0), ""
        self._reachable: dict[str, float] = {}

    def __call__(self, sample: Callable[[int, int], np.ndarray]) -> dict[str, float | str]:
        """Scores of ``sample(count, seed)``, uint8 images (count, H, W, 3); {} where the weights are not installed.

        kid, kid_se: with the standard error of both sides. kid_se_drawn: that of the generated side alone, which is all there is
        between two scores against the same patches. kid_real: that of patches that were trained on, in place of the images; where
        there are such. precision, recall: of as many on both sides. scored_on: digest of the patches
        and of the network that measured them; only scores that have it in common can be ranked.
        """
        if self._extractor is None:
            try:
                self._extractor = inception(device=self.device)
            except UserError as error:
                say(f"note: no scores during training, {error}")
                return {}
            self._features = extract(self.real, self._extractor, "measuring real patches", self.cache)
            self._digest = self._extractor.key(self.real)[:16]
            if self._trained_on is not None:
                features = extract(self._trained_on(), self._extractor, "measuring training patches", self.cache)
                self._reachable = {"kid_real": kid_by_side(self._features, features)[0]}
        fake = extract(sample(COUNT, self.seed), self._extractor, "scoring samples")
        value, *errors = kid_by_side(self._features, fake)
        equal = min(len(self._features), len(fake))
        # The first ones, not a draw: every epoch is compared with the same real images.
        shares = coverage_metrics(self._features[:equal], fake[:equal])
        scores = {"kid": value, "kid_se": float(np.hypot(*errors)), "kid_se_drawn": errors[1]} | self._reachable
        return scores | {name: shares[name] for name in ("precision", "recall")} | {"scored_on": self._digest}
