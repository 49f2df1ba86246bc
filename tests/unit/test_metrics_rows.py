"""Each number of the report is of the sets that its row names: three sets that differ in every respect."""

import numpy as np
import pytest

from metrics.distances import fid, kid
from metrics.diversity import diversity_section
from metrics.images import ImageSet
from metrics.quality import FeatureSets, quality_section
from metrics.utility import Labelled, grades_section

LABELS = np.repeat(["benign", "gleason3", "gleason4"], 40)
CENTRES = np.random.default_rng(9).normal(0, 3, (3, 6))[np.arange(120) // 40]


def features(seed, spread=1.0, shift=0.0):
    return (CENTRES + np.random.default_rng(seed).normal(0, spread, (120, 6)) + shift).astype(np.float32)


def images_of(slides):
    groups = np.array([f"slide {index % slides}" for index in range(120)])
    return ImageSet(np.zeros((120, 4, 4, 3), np.uint8), np.arange(120), LABELS, np.array([""] * 120), groups)


TRAIN, HELD_OUT, FAKE = features(0), features(1, 0.7, 0.6), features(2, 0.3, 0.1)  # the last: true and of little variety
SETS = images_of(4), images_of(6), images_of(120)


def test_each_row_of_the_distances_is_of_the_sets_that_it_names():
    rows = quality_section(*SETS, [FeatureSets("net", TRAIN, HELD_OUT, FAKE)], 0).numbers["net"]
    train, held_out, fake = zip((TRAIN, HELD_OUT, FAKE), (part.groups for part in SETS), strict=True)
    pairs = {
        "generated against held-out": (held_out, fake),
        "floor: training against held-out": (held_out, train),
        "generated against training": (train, fake),
    }
    for at, found in ((slice(None), rows["all"]), (LABELS == "gleason3", rows["label"]["gleason3"])):
        assert found.keys() == pairs.keys()
        for name, sides in pairs.items():
            (real, slides), (made, others) = ([values[at] for values in side] for side in sides)
            row = found[name]
            assert (row["kid"], row["kid_se"]) == kid(real, made, slides, others) != kid(real, made), name  # errors count slides
            assert row["fid"] == fid(real, made), name
        assert len({row["kid"] for row in found.values()}) == 3
    against = rows["all"]["generated against training"]
    assert against["precision"] > 0.9 and against["recall"] < 0.3  # among real ones, and few real ones among them


def test_the_floor_is_what_training_patches_in_place_of_the_images_would_have():
    sets = SETS[0], SETS[1], SETS[0]
    rows = quality_section(*sets, [FeatureSets("net", TRAIN, HELD_OUT, TRAIN)], 0).numbers["net"]
    for found in (rows["all"], *rows["label"].values()):
        assert found["generated against held-out"] == found["floor: training against held-out"]
        assert found["generated against training"]["kid"] < 0  # and is no better than real tissue for it


def test_an_error_that_cannot_know_how_slides_differ_says_so():
    one = ImageSet(*(getattr(SETS[1], name) for name in ("images", "names", "labels", "providers")), np.array(["slide"] * 120))
    section = quality_section(SETS[0], one, SETS[2], [FeatureSets("net", TRAIN, HELD_OUT, FAKE)], 0)
    told = {row[0]: row[2].endswith("(one slide)") for row in section.tables[0].rows}
    assert told == {
        "generated against held-out": True,
        "floor: training against held-out": True,
        "generated against training": False,
    }


def test_variety_is_relative_to_training_patches():
    parts = {"train": TRAIN, "held_out": features(3) * 0.7, "fake": features(4) * 1.4}
    numbers = diversity_section(*SETS, parts, 0).numbers["all images"]
    assert numbers["generated"]["spread"] == pytest.approx(1.4, rel=0.05)
    assert numbers["held_out"]["spread"] == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(("scale", "accused"), [(0.72, True), (0.8, False)])
def test_variety_is_objected_to_below_three_quarters(scale, accused):
    parts = {"train": TRAIN, "held_out": HELD_OUT, "fake": TRAIN * scale}
    assert bool(diversity_section(*SETS, parts, 0).findings) == accused


def test_grades_are_learned_from_training_patches_alone():
    other = np.roll(LABELS, 40)  # what held-out patches call benign training patches call something else
    train, held_out, fake = (
        Labelled(part, labels, images.groups)
        for part, labels, images in zip((TRAIN, features(3), features(4)), (LABELS, other, LABELS), SETS, strict=True)
    )
    numbers = grades_section(train, held_out, fake).numbers
    assert numbers["held-out real"]["balanced_accuracy"] < 0.1 and numbers["generated"]["balanced_accuracy"] > 0.9
