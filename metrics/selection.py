"""Of several generated images of a label, the one that shows it most clearly.

A generator's images do not all show the label that they were asked for. Xue et al., "Selective synthetic augmentation with HistoGAN
for improved histopathology image classification" (Medical Image Analysis, 2021), choose among them before they train a classifier;
here a classifier of the real training patches chooses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection

import numpy as np

from common.errors import UserError
from metrics.features import Extractor, extract
from metrics.images import ImageSet
from metrics.utility import MIN_PER_LABEL, Classifier, Labelled, shared_classes


class LabelJudge:
    """A classifier of real patches by their labels, asked how clearly other images show one.

    Learns the labels of ``train`` that name something and have at least MIN_PER_LABEL patches. Raises UserError, before it takes
    time, when one of ``asked`` is not among them or they are fewer than two.
    """

    def __init__(self, train: ImageSet, asked: Collection[str], extractor: Extractor):
        self.labels = list(shared_classes(train))
        if len(self.labels) < 2:
            raise UserError(f"--best_of needs patches of at least two labels, {MIN_PER_LABEL} of each; leave it out")
        if unknown := sorted(set(asked) - set(self.labels)):
            learned = ", ".join(self.labels)
            raise UserError(f"--best_of cannot judge {unknown[0]!r}, since the patches teach {learned} alone; leave it out")
        train = train.take(np.isin(train.labels, self.labels))
        self.extractor = extractor
        self.classifier = Classifier(Labelled(extract(train.images, extractor, "learn the labels"), train.labels, train.groups))

    def clarity(self, images: np.ndarray, label: str) -> np.ndarray:
        """Log-probability (N,) of ``label``, one of ``labels``, for images (N, S, S, 3) uint8."""
        return self.classifier.log_probabilities(extract(images, self.extractor, None))[:, self.labels.index(label)]


def digest(train: ImageSet) -> str:
    """SHA-256 of what a judge learns from: images and labels."""
    found = hashlib.sha256("\n".join(train.labels).encode())
    found.update(np.ascontiguousarray(train.images))
    return found.hexdigest()


def best_of(sample: Callable[..., np.ndarray], judge: LabelJudge, candidates: int) -> Callable[[int, int, str, int], np.ndarray]:
    """``sample``, only that each image is the clearest of ``candidates``.

    sample(count, seed, label, start): uint8 (count, S, S, 3), image k following from seed, label and k alone. So it is for what is
    returned: image k is one of the images from k * candidates on.
    """

    def choose(count: int, seed: int, label: str, start: int = 0) -> np.ndarray:
        images = sample(count * candidates, seed, label, start * candidates)
        best = judge.clarity(images, label).reshape(count, candidates).argmax(axis=1)
        return images.reshape(count, candidates, *images.shape[1:])[np.arange(count), best]

    return choose
