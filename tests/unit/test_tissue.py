"""Tissue, pen, blank and blur tests, on drawn pictures and on real pen marks where they are at hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from data import tissue
from tests.conftest import tissue_texture

PEN_MARKS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "pen_marks"
INKS = {"blue": (30, 60, 170), "green": (20, 120, 70), "black": (35, 30, 38), "red": (205, 30, 45)}


def overview(glass=(255, 255, 255), colour=(205, 130, 185), seed=0):
    """200 x 300 pixels: tissue from (40, 50) to (160, 130), smooth as an overview is."""
    image = np.empty((200, 300, 3), np.uint8)
    image[:] = glass
    through_glass = ndimage.uniform_filter(tissue_texture(120, 80, seed, colour), (4, 4, 1)) / 255 * glass
    image[40:160, 50:130] = through_glass.astype(np.uint8)
    return image


def drawn_area():
    area = np.zeros((200, 300), bool)
    area[40:160, 50:130] = True
    return area


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("glass", [(255, 255, 255), (243, 243, 243), (222, 210, 226), (238, 236, 224)])
@pytest.mark.parametrize("colour", [(205, 130, 185), (235, 205, 225), (120, 80, 160)])
def test_tissue_is_found_on_any_glass_and_in_any_stain(glass, colour):
    assert overlap(tissue.find_tissue(overview(glass, colour)), drawn_area()) > 0.9


def test_tissue_is_found_as_large_as_it_is():
    assert tissue.find_tissue(overview()).sum() == pytest.approx(drawn_area().sum(), rel=0.05)


def test_dust_is_not_tissue():
    image = overview()
    image[20:25, 200:205] = 205, 130, 185
    assert not tissue.find_tissue(image)[:, 150:].any()


def test_white_padding_beside_grey_glass_is_not_tissue():
    image = overview(glass=(240, 240, 242))
    image[:, 200:] = 255
    assert overlap(tissue.find_tissue(image), drawn_area()) > 0.9


@pytest.mark.parametrize("glass", [(255, 255, 255), (240, 240, 240), (225, 212, 228)])
def test_a_blank_slide_has_no_tissue(glass):
    noise = np.random.default_rng(0).normal(0, 2, (200, 300, 3))
    assert not tissue.find_tissue(np.clip(np.array(glass) + noise, 0, 255).astype(np.uint8)).any()


def test_a_slide_that_is_all_tissue_stays_tissue():
    image = ndimage.uniform_filter(tissue_texture(200, 300, 1), (4, 4, 1))
    assert tissue.find_tissue(image).mean() > 0.97


def test_small_lumina_are_filled_and_large_gaps_are_not():
    image = overview()
    image[60:75, 60:75] = 255
    image[90:150, 60:120] = 255
    found = tissue.find_tissue(image)
    assert found[67, 67]
    assert not found[120, 90]


def test_glass_around_tissue_is_no_hole_however_little_of_it_there_is():
    image = overview()[36:164, 46:134]
    assert not tissue.find_tissue(image)[0].any()


@pytest.mark.parametrize("ink", INKS.values(), ids=INKS)
def test_pen_is_found_and_is_not_tissue(ink):
    image = overview()
    image[90:98, 20:280] = ink
    pen = tissue.find_pen(image)
    assert pen[91:97, 22:278].mean() > 0.95
    assert not pen[:80].any()
    assert not tissue.find_tissue(image)[91:97].any()


def test_pigment_is_no_pen_although_there_is_pen_elsewhere():
    image = overview()
    image[180:186, 20:280] = INKS["blue"]
    image[100:103, 90:93] = INKS["black"]
    pen = tissue.find_pen(image)
    assert pen[183, 100] and not pen[:160].any()


def test_dark_nuclei_are_not_ink():
    image = overview()
    image[100:120, 80:100] = 46, 44, 76  # as dark and nearly as grey as black ink, but bluish
    assert not tissue.find_pen(image).any()


@pytest.mark.parametrize("colour", [(205, 130, 185), (120, 80, 160), (200, 70, 110), (225, 120, 160)])
def test_stain_and_blood_are_not_pen(colour):
    assert not tissue.find_pen(overview(colour=colour)).any()


def test_pen_on_a_patch_is_found_at_full_resolution():
    patch = tissue_texture(256, 256, 2)
    assert tissue.Inspection(patch).pen_share() == 0
    patch[100:150] = INKS["blue"]
    assert tissue.Inspection(patch).pen_share() > tissue.MAX_PEN_SHARE


@pytest.mark.skipif(not PEN_MARKS.is_dir(), reason="real pen marks are not at hand")
def test_real_pen_marks_are_found_and_the_tissue_inside_them_is_not_taken_for_ink():
    """The annotations are the regions that the pen encircles: ink must lie along their edge and not inside them."""
    along, inside = [], []
    for path in sorted(PEN_MARKS.glob("thumbnails/*.jpg"))[::6]:
        pen = tissue.find_pen(np.asarray(Image.open(path).convert("RGB")))
        label = PEN_MARKS / "annotations" / f"labels_rs_{path.stem[-5:]}.png"
        region = np.asarray(Image.open(label).convert("RGB"))[..., 1] < 128
        width = max(region.shape) // 60
        near = ndimage.distance_transform_edt(~pen) <= width
        edge = region & ~ndimage.binary_erosion(region)
        along.append(near[edge].mean())
        inside.append(pen[ndimage.distance_transform_edt(region) > width].mean())
    assert np.mean(along) > 0.7
    assert np.max(inside) < 0.01


def test_blank_patches_are_recognised():
    white = np.full((256, 256, 3), 255, np.uint8)
    grey_glass = np.clip(np.random.default_rng(0).normal(240, 3, (256, 256, 3)), 0, 255).astype(np.uint8)
    speck = white.copy()
    speck[:40, :40] = tissue_texture(40, 40, 0)
    assert tissue.Inspection(white).is_blank()
    assert tissue.Inspection(grey_glass).is_blank()
    assert tissue.Inspection(speck).is_blank()
    assert not tissue.Inspection(tissue_texture(256, 256, 0)).is_blank()


def test_blur_is_recognised_whatever_the_contrast():
    patch = Image.fromarray(tissue_texture(256, 256, 3))
    pale = Image.fromarray((255 - (255 - np.asarray(patch)) * 0.4).astype(np.uint8))
    for image in (patch, pale):
        assert not tissue.Inspection(np.asarray(image), 0.5).is_blurred()
        assert tissue.Inspection(np.asarray(image.filter(ImageFilter.GaussianBlur(3))), 0.5).is_blurred()


def test_a_patch_that_is_half_blurred_is_blurred_and_one_corner_is_forgiven():
    sharp = tissue_texture(256, 256, 6)
    blurred = np.asarray(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(4)))
    half, corner = sharp.copy(), sharp.copy()
    half[:, :128] = blurred[:, :128]
    corner[:100, :100] = blurred[:100, :100]
    assert tissue.Inspection(half).is_blurred()
    assert not tissue.Inspection(corner).is_blurred()


def test_glass_beside_sharp_tissue_is_not_taken_for_blurred():
    patch = tissue_texture(256, 256, 6)
    patch[:, 128:] = 245
    assert not tissue.Inspection(patch).is_blurred()


@pytest.mark.parametrize("side", [16, 33, 64, 100])
def test_small_patches_can_be_judged_too(side):
    sharp = tissue_texture(side, side, 7)
    assert not tissue.Inspection(sharp).is_blurred()
    assert tissue.Inspection(np.asarray(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(4)))).is_blurred()


@pytest.mark.parametrize("times", [2, 4])
def test_a_slide_scanned_finer_is_not_taken_for_blurred(times):
    finer = Image.fromarray(tissue_texture(256, 256, 4)).resize((256 * times, 256 * times), Image.Resampling.BICUBIC)
    assert not tissue.Inspection(np.asarray(finer), 0.5 / times).is_blurred()
    assert tissue.Inspection(np.asarray(finer), 0.5).is_blurred() == (times == 4), "four times larger, detail is rough"


def test_sharpness_is_the_variance_of_the_laplacian():
    patch = tissue_texture(64, 64, 5)
    grey = np.asarray(Image.fromarray(patch).convert("L"), float)
    assert tissue.Inspection(patch).sharpness() == pytest.approx(ndimage.laplace(grey)[1:-1, 1:-1].var(), rel=1e-4)


def test_optical_density_is_beer_lambert():
    assert tissue.optical_density(np.array([[[255, 25, 0]]], np.uint8))[0, 0] == pytest.approx([0, 1.0086, 2.4065], abs=1e-3)


def test_shares_equal_counting():
    mask = np.random.default_rng(1).random((30, 40)) > 0.5
    shares = tissue.Shares(mask)
    assert shares(3, 4, 10, 8) == pytest.approx(mask[4:12, 3:13].mean())
    assert shares(-5, 0, 10, 10) == pytest.approx(mask[:10, :5].sum() / 100)
    fine = mask.repeat(10, 0).repeat(10, 1)
    assert shares(2.5, 3.1, 6.4, 7.2) == pytest.approx(fine[31:103, 25:89].mean())
    assert np.allclose(shares(np.array([0, 10]), np.array([0, 5]), 5, 5), [mask[:5, :5].mean(), mask[5:10, 10:15].mean()])
