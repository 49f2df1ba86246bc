"""Corners, periodic patterns and colour: planted ones are named, tissue is not."""

from dataclasses import replace

import numpy as np
import pytest

from metrics import artefacts
from metrics.artefacts import artefacts_section, dead_corners, periodic_peaks, power_spectrum
from metrics.colour import between_groups, between_images, colours
from metrics.images import image_set
from metrics.section import Section
from tests.drawn_tissue import drawn_tissue


def stained(images, seed):
    """Slides of ten images that differ a little in colour, and the slide of each image."""
    groups = np.arange(len(images)) // 10
    gains = np.random.default_rng(seed).normal(1, 0.03, (groups.max() + 1, 1, 1, 3))
    return np.clip(images * gains[groups], 0, 255).astype(np.uint8), groups


SIDE = 32
TRAIN, GROUPS = stained(drawn_tissue(200, SIDE), 0)
HELD_OUT, _ = stained(drawn_tissue(100, SIDE, 1), 1)
FRESH, _ = stained(drawn_tissue(150, SIDE, 2), 2)


def section_of(images, labels=None, train=TRAIN):
    real = replace(image_set(train), groups=GROUPS)
    return artefacts_section(image_set(images, labels), real, image_set(HELD_OUT))


def named(images):
    return {finding.test for finding in section_of(images).findings}


def checkerboard(images, period, amount):
    rows, columns = np.mgrid[: images.shape[1], : images.shape[2]]
    sign = np.where((rows // (period // 2) + columns // (period // 2)) % 2, amount, -amount)
    return np.clip(images + sign[None, :, :, None], 0, 255).astype(np.uint8)


def test_other_tissue_is_not_accused():
    assert named(FRESH) == set()


@pytest.mark.parametrize("period", [2, 4])
def test_a_faint_checkerboard_is_named(period):
    assert "checkerboard" in named(checkerboard(FRESH, period, 3))


@pytest.mark.parametrize("period", [2, 4, 8])
def test_stripes_and_boards_stand_out_at_their_own_period(period):
    images = drawn_tissue(60, 128)
    powers = {p: periodic_peaks(power_spectrum(checkerboard(images, period, 6)), p)[0].max() for p in (2, 4, 8)}
    assert max(powers, key=powers.get) == period
    assert powers[period] > 1
    stripes = images.copy()
    stripes[:, ::period] = np.clip(stripes[:, ::period].astype(int) - 12, 0, 255)
    assert periodic_peaks(power_spectrum(stripes), period)[0].max() > 0.5


@pytest.mark.parametrize(("period", "wave", "expected"), [(2, [3, -3], 3.0), (8, 4 * np.cos(np.arange(8) * np.pi / 4), 8**0.5)])
def test_a_pattern_has_its_grey_levels(period, wave, expected):
    images = 150.0 + np.random.default_rng(0).normal(0, 0.5, (8, 64, 64, 1)) + np.resize(wave, 64)[:, None]
    decades, squares = periodic_peaks(power_spectrum(images.repeat(3, axis=3)), period)
    assert np.sqrt(squares[decades > 1].sum()) == pytest.approx(expected, rel=0.02)


def test_the_spectrum_of_many_images_is_the_mean_over_all(monkeypatch):
    at_once = power_spectrum(FRESH[:20])
    monkeypatch.setattr(artefacts, "_CHUNK", 8)
    assert power_spectrum(FRESH[:20]) == pytest.approx(at_once, rel=1e-4)


def periods_of(images):
    """The section on periodic patterns alone, of images of 128 pixels."""
    section = Section("patterns", "", "")
    artefacts._periods(section, images, *LARGE[:2])
    return section


LARGE = [drawn_tissue(40, 128, seed) for seed in (5, 6, 7)]


def test_dots_are_named_though_each_of_their_frequencies_is_faint():
    assert not periods_of(LARGE[2].astype(float)).findings
    images = LARGE[2].astype(float)
    images[:, ::8, ::8] += 4
    section = periods_of(images)
    assert "8 pixels" in section.findings[0].text and section.numbers["period 8"]["grey_levels"] > 3 * artefacts.VISIBLE
    decades, squares = periodic_peaks(power_spectrum(images), 8)
    assert np.sqrt(2 * squares[decades.argmax()]) < artefacts.VISIBLE


def test_a_fainter_pattern_does_not_hide_another():
    rows, columns = np.indices((128, 128))
    striped = LARGE[2] + 0.3 * (1.0 - 2 * (columns % 2))[..., None]
    board = 0.09 * (1.0 - 2 * ((rows + columns) % 2))[..., None]
    alone, both = (periods_of(images).numbers["period 2"]["grey_levels"] for images in (striped, striped + board))
    assert both == pytest.approx(np.hypot(alone, 0.09), rel=0.2) and alone > artefacts.VISIBLE


def test_a_pattern_that_no_eye_sees_is_reported_and_not_objected_to(monkeypatch):
    images = checkerboard(FRESH, 2, 3)
    monkeypatch.setattr(artefacts, "VISIBLE", 4.0)
    section = section_of(images)
    assert not section.findings
    found = section.numbers["period 2"]
    assert found["generated"] > found["limit"] and found["grey_levels"] == pytest.approx(3.0, rel=0.1)


def test_a_period_too_long_for_the_image_is_shown_as_not_measured():
    assert periodic_peaks(np.ones((16, 16)), 16) is None
    section = section_of(FRESH)  # of 32 pixels
    assert "period 4" in section.numbers and "period 8" not in section.numbers
    patterns = next(table for table in section.tables if table.columns[0] == "period")
    assert [row[1] == "-" for row in patterns.rows] == [False, False, True, True]


def test_the_spectrum_of_few_images_is_given_more_room():
    for count, room in ((25, 0.4), (100, 0.2), (150, 0.2)):
        found = section_of(FRESH[:count]).numbers["period 2"]
        assert found["limit"] - max(found["training"], found["held_out"]) == pytest.approx(room)
    assert "checkerboard" in named(checkerboard(FRESH[:20], 2, 6))


@pytest.mark.parametrize(("colour", "name"), [(0, "black corners"), (255, "white corners")])
def test_cut_corners_are_named(colour, name):
    cut = FRESH.copy()
    rows, columns = np.mgrid[:SIDE, :SIDE]
    cut[:30, (rows + (SIDE - 1 - columns)) < 6] = colour  # top right, a fifth of the images
    assert named(cut) == {name} or {name, "colour"} == named(cut)
    assert dead_corners(cut, black=colour == 0)[:30].all()
    assert not dead_corners(cut, black=colour == 0)[30:].any()


@pytest.mark.parametrize("place", ["training", "held_out", None])
def test_what_real_patches_of_either_side_have_is_no_fault(place):
    def spoilt(images):
        images = checkerboard(images, 2, 3)
        images[: len(images) // 5, :6, :6] = 0
        return images

    real = {"training": TRAIN, "held_out": HELD_OUT}
    real |= {place: spoilt(real[place])} if place else {}
    section = artefacts_section(image_set(spoilt(FRESH)), *(image_set(images) for images in real.values()))
    faults = {finding.test for finding in section.findings} & {"black corners", "checkerboard"}
    assert faults == (set() if place else {"black corners", "checkerboard"})


def test_dark_nuclei_in_a_corner_are_no_dead_corner():
    image = np.full((1, SIDE, SIDE, 3), 60, np.uint8)
    assert not dead_corners(image, black=True).any() and not dead_corners(image, black=False).any()


@pytest.mark.parametrize("gains", [(0.85, 1, 1), (1, 1, 0.85), (1, 1.12, 1)])
def test_a_colour_cast_is_named(gains):
    assert named(np.clip(FRESH * np.array(gains), 0, 255).astype(np.uint8)) == {"colour"}


def test_spread_between_slides_is_that_of_their_means():
    values = np.array([[0.0], [2], [10], [12]])
    assert between_groups(values, np.array(["a", "a", "b", "b"])) == pytest.approx(np.std([1, 11], ddof=1))
    assert between_groups(values, np.array(["a"] * 4)) == pytest.approx(values.std())


def test_a_handful_of_images_is_not_tested_and_it_says_so():
    section = section_of(np.full((19, SIDE, SIDE, 3), 255, np.uint8))
    assert section.findings == [] and section.numbers == {} and "were not tested" in section.untested[0]


def test_colour_is_counted_in_deviations_between_slides_not_patches():
    drawn = stained(drawn_tissue(200, SIDE), 0)[0]
    cast = np.clip(FRESH * np.array([1, 1, 0.9]), 0, 255).astype(np.uint8)
    numbers = section_of(cast, train=drawn).numbers["blue density"]
    reference, values = colours(drawn)[:, 2], colours(cast)[:, 2]
    slides = np.array([reference[slide == GROUPS].mean() for slide in range(20)])
    assert numbers["generated"] == pytest.approx((values.mean() - reference.mean()) / slides.std(ddof=1), rel=0.01)


def one_stain(images):
    """Every image brought to the mean density of all in each channel."""
    density = -np.log10(np.maximum(images, 1) / 255)
    density *= density.mean((0, 1, 2)) / np.maximum(density.mean((1, 2), keepdims=True), 1e-3)
    return np.clip(255 * 10**-density, 0, 255).astype(np.uint8)


def test_one_stain_for_all_images_is_named():
    section = section_of(one_stain(FRESH))
    assert {finding.test for finding in section.findings} == {"stain variety"}
    assert section.numbers["variety of red density"]["generated"] < 0.3
    assert section.numbers["variety of red density"]["held_out"] == pytest.approx(1, abs=0.3)


def test_a_stain_for_each_label_has_no_variety_either():
    labels = np.array(["benign", "gleason3"])[np.arange(len(FRESH)) % 2]
    faded = np.clip(one_stain(FRESH) + np.where(labels == "benign", 20, -20)[:, None, None, None], 0, 255).astype(np.uint8)
    real = replace(image_set(TRAIN, np.array(["benign", "gleason3"])[np.arange(len(TRAIN)) % 2]), groups=GROUPS)
    control = image_set(HELD_OUT, ["benign"] * len(HELD_OUT))
    told, untold = (artefacts_section(image_set(faded, names), real, control) for names in (labels, None))
    assert "stain variety" in {finding.test for finding in told.findings}
    found = "variety of green density"
    assert told.numbers[found]["generated"] < told.numbers[found]["limit"] < 0.6 < untold.numbers[found]["generated"]


def labelled(images, **parts):
    return replace(image_set(images, np.array(["benign", "gleason3"])[np.arange(len(images)) % 2]), **parts)


def test_one_label_with_one_stain_is_named_though_all_images_together_vary():
    faded = FRESH.copy()
    faded[::2] = one_stain(FRESH[::2])
    section = artefacts_section(labelled(faded), labelled(TRAIN, groups=GROUPS), labelled(HELD_OUT))
    (finding,) = section.findings
    assert finding.test == "stain variety" and "benign (" in finding.text and "gleason3" not in finding.text
    assert finding.value == section.numbers["variety within benign"]["generated"] < finding.limit < 0.5
    assert section.numbers["variety within gleason3"]["generated"] > 0.6
    table = section.tables[-1]
    assert [row[0] for row in table.rows] == ["benign", "gleason3"] and table.rows[0][2] == f"{finding.value:.2f}"


def test_a_label_of_a_handful_is_not_asked_for_variety():
    few = labelled(np.concatenate([one_stain(FRESH)[:38:2], FRESH[1::2]]))
    few = replace(few, labels=np.array(["benign"] * 19 + ["gleason3"] * (len(few) - 19)))
    section = artefacts_section(few, labelled(TRAIN, groups=GROUPS), labelled(HELD_OUT))
    assert section.findings == [] and "variety within benign" not in section.numbers


def test_variety_is_counted_within_labels():
    values = np.array([[0.0], [2], [10], [12]])
    assert between_images(values, np.array(["a", "a", "b", "b"])) == pytest.approx(np.sqrt(2))
    assert between_images(values, np.zeros(4)) == pytest.approx(values.std(ddof=1))
