"""Something in the same place of every image is found and located; tissue, turned or not, is not accused."""

import numpy as np
import pytest

from metrics.stationarity import LIMIT, fields, position_maps, stationarity_section, where
from tests.drawn_tissue import drawn_tissue

TRAIN, HELD_OUT, FRESH = drawn_tissue(400), drawn_tissue(150, seed=1), drawn_tissue(250, seed=2)


def found(images, train=TRAIN):
    return [finding.text for finding in stationarity_section(images, train, HELD_OUT).findings]


def add(images, place, amount):
    changed = images.astype(float)
    changed[place] += amount
    return np.clip(changed, 0, 255).astype(np.uint8)


def test_other_tissue_is_not_accused():
    assert found(FRESH) == []


def test_a_ring_in_a_corner_is_named_with_its_corner():
    rows, columns = np.mgrid[:32, :32]
    ring = np.abs(np.hypot(rows - 29, columns - 2) - 2) < 0.8
    faults = found(add(FRESH, np.s_[:, ring], -15))
    assert faults and any("bottom left corner" in text for text in faults)


@pytest.mark.parametrize("amount", [12, -12])
def test_a_seam_along_the_borders_is_named(amount):
    seam = np.ones((32, 32), bool)
    seam[1:-1, 1:-1] = False
    faults = found(add(FRESH, np.s_[:, seam], amount))
    assert any("border" in text or "corner" in text for text in faults)


def test_what_real_patches_share_is_no_fault_elsewhere_it_is():
    # Patches cut beside the edge of the tissue are lighter on one side, always the same.
    light = np.linspace(0, 60, 32)[None, None, :, None]
    shaded, shaded_fresh = add(TRAIN, np.s_[:], light), add(FRESH, np.s_[:], light)
    section = stationarity_section(shaded_fresh, shaded, add(HELD_OUT, np.s_[:], light))
    assert section.findings == []
    from_the_top = add(FRESH, np.s_[:], np.swapaxes(light, 1, 2))
    assert stationarity_section(from_the_top, shaded, add(HELD_OUT, np.s_[:], light)).findings != []


def test_a_generator_that_learnt_turned_patches_is_not_accused():
    light = np.linspace(0, 60, 32)[None, None, :, None]
    shaded = add(TRAIN, np.s_[:], light)
    turned = add(FRESH, np.s_[:], light)
    for index in range(len(turned)):
        turned[index] = np.rot90(turned[index], index % 4)[:, :: 1 if index % 8 < 4 else -1]
    assert stationarity_section(turned, shaded, add(HELD_OUT, np.s_[:], light)).findings == []


def test_fields_are_relative_to_their_image():
    dark = (FRESH[:5] * 0.5).astype(np.uint8)
    assert fields(dark).mean((2, 3)) == pytest.approx(0, abs=1e-3)


def test_large_images_are_reduced():
    assert position_maps(np.full((3, 300, 300, 3), 200, np.uint8)).mean.shape == (2, 5, 100, 100)


def test_blank_images_give_finite_maps():
    maps = position_maps(np.full((4, 16, 16, 3), 255, np.uint8))
    assert np.isfinite(maps.mean).all() and (maps.error > 0).all()


@pytest.mark.parametrize(
    ("place", "words"),
    [((0, 0), "top left corner"), ((31, 16), "bottom border"), ((16, 31), "right border"), ((16, 15), "row 16, column 15")],
)
def test_where(place, words):
    z = np.zeros((32, 32))
    z[place] = -LIMIT
    assert words in where(z)
