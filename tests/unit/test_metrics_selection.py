"""Choosing among generated images by how clearly they show their label."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from metrics.features import Extractor
from metrics.images import image_set
from metrics.selection import LabelJudge, best_of

COLOURS = {"benign": (230, 150, 200), "gleason4": (120, 60, 150), "unlabelled": (0, 200, 0)}
MEANS = Extractor("means", "none", lambda batch: batch.float().mean(dim=(2, 3)) / 255)


def tissue(label, count, seed=0, noise=40):
    draws = np.random.default_rng(seed)
    middle = np.array(COLOURS[label]) + draws.normal(0, noise, (count, 1, 1, 3))
    return np.clip(middle + draws.normal(0, 5, (count, 8, 8, 3)), 0, 255).astype(np.uint8)


def patches(*labels, count=40):
    known = ["" if label == "unlabelled" else label for label in labels]
    return image_set(np.concatenate([tissue(label, count) for label in labels]), np.repeat(known, count))


def judge():
    return LabelJudge(patches("benign", "gleason4"), ["benign"], MEANS)


def numbered(count, seed, label, start=0):
    """Image k of a label, whatever else was asked for."""
    return np.concatenate([tissue(label, 1, seed * 1000 + start + k, noise=60) for k in range(count)])


def test_the_clearest_of_each_group_is_kept():
    sample, learned = best_of(numbered, judge(), 4), judge()
    chosen, candidates = sample(5, 1, "gleason4"), numbered(20, 1, "gleason4").reshape(5, 4, 8, 8, 3)
    for image, group in zip(chosen, candidates, strict=True):
        clarity = learned.clarity(group, "gleason4")
        assert np.array_equal(image, group[clarity.argmax()])
        assert learned.clarity(image[None], "gleason4")[0] == pytest.approx(clarity.max())
    assert learned.clarity(chosen, "gleason4").mean() > learned.clarity(numbered(20, 1, "gleason4"), "gleason4").mean() + 0.1


def test_image_k_depends_on_k_alone():
    sample = best_of(numbered, judge(), 3)
    assert np.array_equal(sample(6, 2, "benign")[4:], sample(2, 2, "benign", 4))


def test_clarity_is_a_log_probability_that_follows_the_label():
    images = tissue("benign", 30, seed=5, noise=5)
    clear, unclear = (judge().clarity(images, label) for label in ("benign", "gleason4"))
    assert np.allclose(np.exp(clear) + np.exp(unclear), 1) and (clear > unclear).all()


def test_labels_that_say_nothing_are_not_learned():
    assert LabelJudge(patches("benign", "gleason4", "unlabelled"), [], MEANS).labels == ["benign", "gleason4"]


@pytest.mark.parametrize(
    ("labels", "count", "asked", "words"),
    [
        (("benign", "gleason4"), 40, "gleason5", "'gleason5'"),
        (("benign", "unlabelled"), 40, "benign", "two labels"),
        (("benign", "gleason4"), 10, "benign", "two labels"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_features_are_taken(labels, count, asked, words):
    def never(batch: torch.Tensor) -> torch.Tensor:
        raise AssertionError("features were taken")

    with pytest.raises(UserError, match=words):
        LabelJudge(patches(*labels, count=count), [asked], Extractor("never", "none", never))
