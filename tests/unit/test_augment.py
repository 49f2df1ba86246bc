"""Augmentation: seeded, in range, without borders, and doing what its name says."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from common.errors import UserError
from data.augment import Augmentation
from data.stain import NORMALIZERS, StainNormalizer, jitter_stain, rgb_to_od, separate

OFF = {"flips": 0.0, "quarter_turns": 0.0}


def tissue(size: int, seed: int = 0) -> torch.Tensor:
    """Pink noise-like picture without black or white, (3, size, size) uint8."""
    return torch.randint(90, 220, (3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_off_is_the_identity():
    pixels = tissue(32)
    assert torch.equal(Augmentation(**OFF)(pixels, 0), pixels.float() / 127.5 - 1)


def test_the_same_seed_gives_the_same_image_whatever_came_before():
    augmentation = Augmentation(rotation=20, elastic=1, color_jitter=0.2, stain_jitter=0.2, noise=5)
    pixels = tissue(32)
    first = augmentation(pixels, 7)
    torch.rand(10)
    before = torch.get_rng_state()
    assert torch.equal(augmentation(pixels, 7), first)
    assert torch.equal(torch.get_rng_state(), before)  # training's own random numbers are left alone
    assert not torch.equal(augmentation(pixels, 8), first)


def test_flips_and_quarter_turns_reach_all_eight_symmetries_and_no_other():
    pixels = tissue(8)
    turned = {tuple(Augmentation()(pixels, seed).flatten().tolist()) for seed in range(300)}
    square = pixels.float() / 127.5 - 1
    symmetries = {tuple(view.rot90(turn, (-2, -1)).flatten().tolist()) for view in (square, square.flip(-1)) for turn in range(4)}
    assert turned == symmetries


@pytest.mark.parametrize("strength", [{"rotation": 45.0}, {"rotation": 10.0}, {"elastic": 3.0}, {"rotation": 45.0, "elastic": 4.0}])
def test_no_border_enters_the_picture(strength):
    augmentation = Augmentation(**OFF, **strength)
    size = 48
    assert augmentation.margin(size) > 0
    light = torch.full((3, size, size), 200, dtype=torch.uint8)
    for seed in range(60):
        image = augmentation(light, seed)
        assert image.shape == (3, size, size)
        assert image.min() > 200 / 127.5 - 1 - 0.02, f"a border shows for seed {seed}"


def test_the_margin_holds_the_turned_square():
    assert 100 + 2 * Augmentation(rotation=45).margin(100) == pytest.approx(100 * math.sqrt(2), abs=2)


@pytest.mark.parametrize("strength", [{"rotation": 45.0}, {"elastic": 2.0}])
def test_turning_and_bending_leave_the_magnification(strength):
    disc = ((torch.arange(96) - 47.5).square()[:, None] + (torch.arange(96) - 47.5).square() < 20.0**2).to(torch.uint8) * 200
    pixels = disc.expand(3, -1, -1).contiguous()
    areas = [(Augmentation(**OFF, **strength)(pixels, seed)[0] > 100 / 127.5 - 1).sum().item() for seed in range(30)]
    assert sum(areas) / len(areas) == pytest.approx((disc > 0).sum().item(), rel=0.05)


@pytest.mark.parametrize(
    "name, strength", [("color_jitter", 0.5), ("noise", 20.0), ("stain_jitter", 0.5), ("elastic", 2.0), ("rotation", 30.0)]
)
def test_each_kind_changes_the_picture_and_stays_in_range(name, strength):
    augmentation = Augmentation(**OFF, **{name: strength})
    pixels = tissue(32)
    images = torch.stack([augmentation(pixels, seed) for seed in range(5)])
    assert images.min() >= -1 and images.max() <= 1
    assert images.std(dim=0).mean() > 0.01


def test_bending_is_torchvisions():
    torch.manual_seed(0)
    field = Augmentation(elastic=3.0)._displacements(96, 5.0)
    torch.manual_seed(0)
    alpha = 2 * 3.0 * math.sqrt(3) * 2 * math.sqrt(math.pi) * 5.0
    theirs = v2.ElasticTransform(alpha, 5.0).make_params([torch.zeros(3, 96, 96)])["displacement"]
    assert torch.allclose(field, theirs, atol=1e-6)
    assert 48 * field.square().mean().sqrt() == pytest.approx(3.0, rel=0.25)


def test_bending_has_a_limit():
    Augmentation(elastic=16.0, rotation=45.0).check(128)
    Augmentation(elastic=16.0, rotation=45.0)(tissue(128), 0)
    with pytest.raises(UserError, match="--elastic 16.5: patches of 128 pixels are bent by 16 at most"):
        Augmentation(elastic=16.5).check(128)


def test_noise_has_the_strength_it_says():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    image = Augmentation(**OFF, noise=10.0)(grey, 0)
    assert image.std().item() * 127.5 == pytest.approx(10.0, rel=0.1)


def test_stain_jitter_keeps_white_white_and_zero_changes_nothing():
    white = torch.ones(3, 4, 4)
    assert jitter_stain(white, 0.5) == pytest.approx(white, abs=0.005)
    image = torch.rand(3, 8, 8)
    assert jitter_stain(image, 0.0) == pytest.approx(image, abs=1e-5)


def test_stain_jitter_makes_paler_as_often_as_darker():
    torch.manual_seed(0)
    image = torch.rand(3, 8, 8) * 0.5 + 0.3
    density = torch.stack([-torch.log10(jitter_stain(image, 0.4)).mean() for _ in range(200)])
    assert density.mean().item() == pytest.approx(-torch.log10(image).mean().item(), rel=0.03)
    assert 60 < (density < -torch.log10(image).mean()).sum() < 140


def test_separation_finds_the_stain_that_was_laid_on():
    amount = 0.6
    hematoxylin = np.array([0.650, 0.704, 0.286])
    rgb = np.round(256 * 10 ** -(amount * hematoxylin / np.linalg.norm(hematoxylin)) - 1).astype(np.uint8)
    found = separate(rgb_to_od(rgb[None, None]))[0, 0]
    assert found == pytest.approx([amount, 0, 0], abs=0.02)


def stained(amounts, factors):
    """(H, W, 2) amounts of hematoxylin and eosin -> uint8 RGB, on glass of 240."""
    basis = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], dtype=np.float32)
    return (240 * 10 ** -(amounts * np.array(factors) @ basis) - 1).clip(0, 255).round().astype(np.uint8)


@pytest.fixture
def amounts():
    return np.random.default_rng(0).gamma(2.0, 0.15, (64, 64, 2)).astype(np.float32)


@pytest.mark.parametrize("method", NORMALIZERS)
def test_normalization_brings_two_stains_together(method, amounts):
    target, other = stained(amounts, [1.0, 1.0]), stained(amounts, [0.6, 1.5])
    normalizer = StainNormalizer(method, [target])
    normalized = normalizer.normalize(other, normalizer.measure([other]))
    before = np.abs(rgb_to_od(other).mean((0, 1)) - rgb_to_od(target).mean((0, 1))).max()
    after = np.abs(rgb_to_od(normalized).mean((0, 1)) - rgb_to_od(target).mean((0, 1))).max()
    assert after < before / 3


@pytest.mark.parametrize("method", NORMALIZERS)
def test_a_slide_that_has_the_common_stain_keeps_its_pale_patches(method, amounts):
    normalizer = StainNormalizer(method, [stained(amounts, [1.0, 1.0])])
    stain = normalizer.measure([stained(amounts, [1.0, 1.0])])
    pale = stained(0.3 * amounts, [0.1, 1.0])
    assert np.abs(normalizer.normalize(pale, stain).astype(int) - pale).max() <= 3


@pytest.mark.parametrize("method", NORMALIZERS)
@pytest.mark.parametrize("own", [(0.5, 0.5), (3.0, 0.5), (0.5, 3.0)])
@pytest.mark.parametrize("glass", [(255, 255, 255), (240, 240, 240), (244, 240, 246)])
def test_normalization_leaves_glass_as_it_is(method, own, glass, amounts):
    normalizer = StainNormalizer(method, [stained(amounts, [1.5, 1.5])])
    stain = normalizer.measure([stained(amounts, own)])
    patch = np.full((32, 32, 3), glass, np.uint8)
    assert np.array_equal(normalizer.normalize(patch, stain), patch)


@pytest.mark.parametrize("method", NORMALIZERS)
@pytest.mark.parametrize("value", [255, 120, 0])
def test_no_stain_is_found_where_there_is_none(method, value, amounts):
    normalizer = StainNormalizer(method, [stained(amounts, [1.0, 1.0])])
    assert normalizer.measure([np.full((32, 32, 3), value, np.uint8)]) is None


def test_a_target_without_stain_is_refused():
    with pytest.raises(UserError, match="no stain .* leave it out"):
        StainNormalizer("macenko", [np.full((32, 32, 3), 255, np.uint8)])
