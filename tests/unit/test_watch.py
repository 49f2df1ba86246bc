"""Scores during training: what a difference between two of them is worth, and whether two can be ranked."""

import numpy as np
import pytest

from metrics.distances import kid, kid_by_side
from metrics.features import Extractor
from metrics.watch import Watch


def test_the_error_of_the_draw_is_one_side_of_that_of_kid():
    draws = np.random.default_rng(0)
    real, fake = draws.normal(0, 1, (40, 6)), draws.normal(0.3, 1, (30, 6))
    sides = kid_by_side(real, fake)[2], kid_by_side(fake, real)[2]
    assert np.hypot(*sides) == pytest.approx(kid(real, fake)[1])


def test_scores_tell_precision_from_recall_and_are_of_the_same_images_each_time(monkeypatch):
    monkeypatch.setattr("metrics.watch.inception", lambda device: Extractor("pixel", "", lambda batch: batch.float().mean((2, 3))))
    asked = []

    def sample(count, seed):
        asked.append(seed)
        return np.random.default_rng(seed).integers(120, 136, (count, 1, 1, 3), dtype=np.uint8), [""] * count

    watch = Watch(np.random.default_rng(1).integers(0, 256, (120, 1, 1, 3), dtype=np.uint8), 7, "cpu")
    scores = watch(sample)
    assert scores["precision"] > 0.9 and scores["recall"] < 0.1
    assert watch(sample) == scores and asked == [7, 7]


def test_a_digest_says_by_which_patches_was_scored(monkeypatch):
    monkeypatch.setattr("metrics.watch.inception", lambda device: Extractor("mean", "", lambda batch: batch.float().mean((2, 3))))
    draws = np.random.default_rng(0)
    real, made = draws.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), draws.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    one, again, other = (Watch(patches, 0, "cpu")(lambda count, seed: (made, [])) for patches in (real, real.copy(), real[:11]))
    assert one == again and one["scored_on"] != other["scored_on"] and 0 < one["kid_se_drawn"] < one["kid_se"]


def test_patches_that_were_trained_on_say_what_can_be_reached(monkeypatch):
    monkeypatch.setattr("metrics.watch.inception", lambda device: Extractor("mean", "", lambda batch: batch.float().mean((2, 3))))
    draws, given = np.random.default_rng(0), []
    real, made = draws.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), draws.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)

    def trained_on():
        given.append(1)
        return made, [""] * len(made)

    watch = Watch(real, 0, "cpu", trained_on=trained_on)
    scores = watch(lambda count, seed: (made, []))
    again = watch(lambda count, seed: (real, []))
    assert scores["kid_real"] == pytest.approx(scores["kid"]) and again["kid_real"] == scores["kid_real"]
    assert given == [1] and not {"kid_real", "spread"} & set(Watch(real, 0, "cpu")(lambda count, seed: (made, [])))


def test_the_label_whose_images_are_alike_is_named(monkeypatch):
    monkeypatch.setattr("metrics.watch.inception", lambda device: Extractor("mean", "", lambda batch: batch.float().mean((2, 3))))
    draws, names = np.random.default_rng(0), ["benign", "gleason3", "unlabelled"] * 40
    patches = draws.integers(0, 256, (120, 1, 1, 3), dtype=np.uint8)
    made = patches.copy()
    made[0::3] = 100 + made[0::3] // 8  # benign
    made[2::3] = 0  # what has no label is one anyway
    for held_out in ({"labels": names}, {"trained_on": lambda: (patches, names)}):
        scores = Watch(patches, 0, "cpu", **held_out)(lambda count, seed: (made, names))
        assert scores["spread_of"] == "benign" and scores["spread"] == pytest.approx(1 / 8, rel=0.2)
        scores = Watch(patches, 0, "cpu", **held_out)(lambda count, seed: (patches, names))
        assert scores["spread"] == pytest.approx(1)
