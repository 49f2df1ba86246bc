"""Scores during training: the part of the evaluation that is cheap enough to run every so many epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.progress import say
from metrics.distances import coverage_metrics, kid_by_side
from metrics.diversity import least_varied
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
        trained_on: Callable[[], tuple[np.ndarray, Sequence[str]]] | None = None,
        labels: Sequence[str] = (),
    ):
        """trained_on: gives real patches that the networks learn from and their labels, where ``real`` are others: what can be
        reached. labels: of ``real``."""
        self.real, self.seed, self.device, self.cache = real, seed, device, cache
        self._trained_on, self._labels = trained_on, labels
        self._extractor: Extractor | None = None
        self._features, self._digest = np.empty(0), ""
        self._reachable: dict[str, float] = {}
        self._varied = np.empty(0), np.empty(0)

    def __call__(self, sample: Callable[[int, int], tuple[np.ndarray, Sequence[str]]]) -> dict[str, float | str]:
        """Scores of ``sample(count, seed)``, uint8 images (count, H, W, 3) and their labels; {} where no weights are installed.

        kid, kid_se: with the standard error of both sides. kid_se_drawn: that of the generated side alone, which is all there is
        between two scores against the same patches. kid_real: that of patches that were trained on, in place of the images; where
        there are such. precision, recall: of as many on both sides. spread, spread_of: how much the images of a label vary beside
        its patches, for the label that does least, where there are labels. scored_on: digest of the patches
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
            self._varied = self._features, np.array(self._labels)
            if self._trained_on is not None:
                patches, labels = self._trained_on()
                features = extract(patches, self._extractor, "measuring training patches", self.cache)
                self._varied = features, np.array(labels)
                self._reachable = {"kid_real": kid_by_side(self._features, features)[0]}
        images, labels = sample(COUNT, self.seed)
        fake = extract(images, self._extractor, "scoring samples")
        value, *errors = kid_by_side(self._features, fake)
        equal = min(len(self._features), len(fake))
        # The first ones, not a draw: every epoch is compared with the same real images.
        shares = coverage_metrics(self._features[:equal], fake[:equal])
        scores = {"kid": value, "kid_se": float(np.hypot(*errors)), "kid_se_drawn": errors[1]} | self._reachable
        if len(self._varied[1]) and (least := least_varied(*self._varied, fake, np.array(labels))):
            scores |= {"spread": least[1], "spread_of": least[0]}
        return scores | {name: shares[name] for name in ("precision", "recall")} | {"scored_on": self._digest}
