"""Something in the same place of every image is found and located; tissue, turned or not, is not accused."""

from dataclasses import replace

import numpy as np
import pytest

from metrics.images import image_set
from metrics.stationarity import FIELDS, LIMIT, SCALES, fields, position_maps, stationarity_section, where
from tests.drawn_tissue import drawn_tissue

TRAIN, HELD_OUT, FRESH = drawn_tissue(400), drawn_tissue(150, seed=1), drawn_tissue(250, seed=2)


def section(images, train=TRAIN, held_out=HELD_OUT):
    return stationarity_section(image_set(images), image_set(train), image_set(held_out))


def found(images):
    return [finding.text for finding in section(images).findings]


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
    assert section(shaded_fresh, shaded, add(HELD_OUT, np.s_[:], light)).findings == []
    from_the_top = add(FRESH, np.s_[:], np.swapaxes(light, 1, 2))
    assert section(from_the_top, shaded, add(HELD_OUT, np.s_[:], light)).findings != []


def test_a_generator_that_learnt_turned_patches_is_not_accused():
    light = np.linspace(0, 60, 32)[None, None, :, None]
    shaded = add(TRAIN, np.s_[:], light)
    turned = add(FRESH, np.s_[:], light)
    for index in range(len(turned)):
        turned[index] = np.rot90(turned[index], index % 4)[:, :: 1 if index % 8 < 4 else -1]
    assert section(turned, shaded, add(HELD_OUT, np.s_[:], light)).findings == []


def test_a_generator_without_a_notion_of_place_is_not_accused_of_being_evener_than_its_patches():
    light = np.linspace(0, 60, 32)[None, None, :, None]
    assert section(FRESH, add(TRAIN, np.s_[:], light), add(HELD_OUT, np.s_[:], light)).findings == []


def test_fields_are_relative_to_their_image():
    dark = (FRESH[:5] * 0.5).astype(np.uint8)
    assert fields(dark).mean((2, 3)) == pytest.approx(0, abs=1e-3)


def test_the_fields_of_turned_images_are_the_turned_fields():
    turned = fields(np.ascontiguousarray(np.rot90(FRESH[:3], 1, (1, 2))))
    assert turned == pytest.approx(np.rot90(fields(FRESH[:3]), 1, (2, 3)), abs=1e-4)


def test_what_held_out_patches_show_as_well_is_no_fault(monkeypatch):
    """A deviation of 12 standard errors in every field, beside 10 and beside 8 of held-out patches."""
    for control, accused in ((10.0, False), (8.0, True)):
        found = iter([12.0, control])
        monkeypatch.setattr(
            "metrics.stationarity.deviations", lambda *_, found=found: dict.fromkeys(FIELDS, np.full((4, 4), next(found)))
        )
        result = section(FRESH[:20], TRAIN[:20], HELD_OUT[:20])
        assert bool(result.findings) == accused and result.numbers["contrast"]["limit"] == pytest.approx(1.3 * control)


def test_large_images_are_reduced():
    assert position_maps(np.full((3, 300, 300, 3), 200, np.uint8)).means["fine"].shape == (5, 100, 100)


def test_blank_images_give_finite_maps():
    maps = position_maps(np.full((4, 16, 16, 3), 255, np.uint8))
    assert all(np.isfinite(mean).all() for mean in maps.means.values())
    assert all((error > 0).all() for error in maps.errors.values())


def test_errors_are_those_of_independent_draws():
    maps = [position_maps(drawn_tissue(100, seed=seed)) for seed in range(3, 11)]
    for scale in SCALES:
        spread = np.stack([part.means[scale] for part in maps]).std(0, ddof=1).mean()
        assert np.mean([part.errors[scale].mean() for part in maps]) == pytest.approx(spread, rel=0.2)


def test_errors_count_slides_where_patches_of_a_slide_are_alike():
    slides = np.repeat(np.arange(20), 6)
    repeated = drawn_tissue(20)[slides]
    shuffled = np.random.default_rng(0).permutation(120)
    grouped = position_maps(repeated[shuffled], slides[shuffled]).errors["fine"].mean()
    assert grouped == pytest.approx(np.sqrt(6) * position_maps(repeated).errors["fine"].mean(), rel=0.05)


@pytest.mark.parametrize(
    ("place", "words"),
    [((0, 0), "top left corner"), ((31, 16), "bottom border"), ((16, 31), "right border"), ((16, 15), "row 16, column 15")],
)
def test_where(place, words):
    z = np.zeros((32, 32))
    z[place] = -LIMIT
    assert words in where(z)


def of_slides(images, slides):
    return replace(image_set(images), groups=np.asarray(slides))


def test_the_section_counts_slides_not_patches():
    slides = np.repeat(np.arange(30), 6)
    repeated = drawn_tissue(30, seed=5)[slides]
    train, held_out = image_set(TRAIN), image_set(HELD_OUT)
    known, unknown = (stationarity_section(part, train, held_out) for part in (of_slides(repeated, slides), image_set(repeated)))
    ratios = [unknown.numbers[field]["generated"] / known.numbers[field]["generated"] for field in FIELDS]
    assert np.median(ratios) > 1.5
    control = stationarity_section(image_set(FRESH), train, of_slides(repeated, slides))
    assert control.numbers["contrast"]["held_out"] == pytest.approx(known.numbers["contrast"]["generated"])
    reference = [
        stationarity_section(image_set(FRESH), part, held_out) for part in (of_slides(repeated, slides), image_set(repeated))
    ]
    assert reference[0].numbers["contrast"]["generated"] < reference[1].numbers["contrast"]["generated"]


@pytest.mark.parametrize(("count", "slides"), [(1, 1), (19, 19), (40, 1)])
def test_too_few_images_or_slides_are_not_tested_and_it_says_so(count, slides):
    few = of_slides(FRESH[:count], np.arange(count) % slides)
    result = stationarity_section(few, image_set(TRAIN), image_set(HELD_OUT))
    assert result.findings == [] and result.numbers == {} and "was not tested" in result.untested[0]
    uncontrolled = stationarity_section(image_set(FRESH), image_set(TRAIN), few)
    assert uncontrolled.numbers["contrast"]["held_out"] is None and uncontrolled.numbers["contrast"]["limit"] == LIMIT
