"""Each kind of copy is found with its source; tissue of other slides is not accused."""

import numpy as np
import pytest
import torch
from torch.nn.functional import affine_grid, grid_sample

from common.pictures import grid
from metrics import turned_search
from metrics.copies import Gallery, Suspicion, copies_section, pixel_suspicions, turned_suspicion
from metrics.features import Extractor
from metrics.pixel_search import Matches, half_matches, sketches, symmetries, undo, whole_matches
from tests.drawn_tissue import drawn_tissue

TRAIN, HELD_OUT, FRESH = drawn_tissue(150, 64, 0, 2.5), drawn_tissue(60, 64, 1, 2.5), drawn_tissue(95, 64, 2, 2.5)
THUMBNAILS = TRAIN.reshape(150, 32, 2, 32, 2, 3).mean((2, 4)).astype(np.uint8)
GALLERY = Gallery(THUMBNAILS, np.array([f"patch {index}" for index in range(150)]), lambda index: TRAIN[index])


def sorted_greys(batch):
    """Features that no turn changes."""
    return batch.float().mean(1).flatten(1).sort(1).values[:, ::64]


GREYS = Extractor("sorted", "", sorted_greys)


def recolour(images):
    return np.clip(images * [0.8, 1.1, 0.9] + 12, 0, 255).astype(np.uint8)


def moved(down, across, mode):
    def move(images):
        margins = ((0, 0), (16, 16), (16, 16), (0, 0))
        return np.pad(images, margins, mode=mode)[:, 16 + down :, 16 + across :][:, :64, :64]

    return move


def halves(images):
    mixed = images.copy()
    mixed[:, :, 32:] = np.roll(images, 7, 0)[:, :, 32:]
    return mixed


KINDS = {
    "copy": lambda images: images,
    "turned": lambda images: np.rot90(images, 1, (1, 2)),
    "mirrored and turned": lambda images: np.rot90(images, 3, (1, 2))[:, :, ::-1],
    "recoloured": recolour,
    "halves of two": halves,
    "blend of two": lambda images: ((images.astype(float) + np.roll(images, 7, 0)) / 2).astype(np.uint8),
    "moved both ways, wrapped": moved(3, 5, "wrap"),
    "moved both ways, reflected": moved(-3, 5, "reflect"),
    "moved by a fifth": moved(12, 10, "reflect"),
    "moved, turned and recoloured": lambda images: np.rot90(recolour(moved(6, -7, "reflect")(images)), 1, (1, 2)),
    "noisy": lambda images: np.clip(images + np.random.default_rng(0).normal(0, 15, images.shape), 0, 255).astype(np.uint8),
}


def section(images):
    names = np.array([f"image {index}" for index in range(len(images))])
    return copies_section(images, names, pixel_suspicions(images, HELD_OUT, THUMBNAILS), GALLERY)


def test_other_tissue_is_not_accused():
    result = section(FRESH)
    assert result.findings == [] and result.numbers["share"] == 0 and result.numbers["held_out_share"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_five_copies_in_a_hundred_are_all_found(kind):
    planted = KINDS[kind](TRAIN[:40])[:5]
    result = section(np.concatenate([FRESH, planted]))
    assert [finding.test for finding in result.findings] == ["copies"]
    assert result.numbers["share"] == pytest.approx(0.05)
    assert {pair[0] for pair in result.numbers["most_suspicious"][:5]} == {f"image {95 + index}" for index in range(5)}


def test_a_single_copy_beyond_doubt_is_a_finding_and_names_its_image():
    many = np.concatenate([FRESH] * 3 + [TRAIN[8:9, :, ::-1]])  # 0.35 % of the images
    result = section(many)
    assert [finding.text for finding in result.findings] == [
        "training patches are repeated almost pixel by pixel in 1 of 286 images: image 285"
    ]
    assert result.numbers["most_suspicious"][0][:3] == ["image 285", "patch 8", "whole image"]


@pytest.mark.parametrize(("planted", "accused"), [(1, False), (3, True)])
def test_likely_copies_are_a_finding_from_half_a_percent_on(planted, accused):
    blends = KINDS["blend of two"](TRAIN[:40])[:planted]  # alike, though not beyond doubt
    result = section(np.concatenate([*[FRESH] * 3, blends])[-250:])
    assert result.numbers["share"] == planted / 250 and result.numbers["certain"] == 0
    assert bool(result.findings) == accused


def test_the_search_by_shifts_is_the_largest_correlation_of_any_shift():
    images, gallery = sketches(FRESH[:3]), sketches(TRAIN[:70])  # more than one chunk of patches
    found = whole_matches(images, gallery, "search")
    patches = gallery.reshape(70, -1) - gallery.mean((1, 2))[:, None]
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    direct = np.zeros((8, 3, 70))
    for symmetry, turned in enumerate(symmetries(images)):
        for y, x in np.ndindex(32, 32):
            moved = np.roll(turned, (y, x), (1, 2)).reshape(3, -1)
            moved = moved - moved.mean(1, keepdims=True)
            moved /= np.linalg.norm(moved, axis=1, keepdims=True)
            direct[symmetry] = np.maximum(direct[symmetry], moved @ patches.T)
    assert found.score == pytest.approx(direct.max((0, 2)), abs=1e-5)
    assert (direct[found.symmetry, np.arange(3), found.index] == direct.max((0, 2))).all()


def test_the_text_says_what_was_compared():
    fresh, names = FRESH[:3], np.arange(3)
    pixels = pixel_suspicions(fresh, HELD_OUT[:2], THUMBNAILS)
    turned = turned_suspicion(fresh, HELD_OUT[:2], THUMBNAILS[:2], GREYS)
    text = copies_section(fresh, names, [*pixels, turned], GALLERY).explanation
    assert "all 150 training patches" in text and "turned by any angle" in text
    assert "any angle" not in copies_section(fresh, names, pixels, GALLERY).explanation


def suspicion(kind, excess, held_out):
    """Four images, whose best matches are patches 2, 3, 4, 5, turned by 0, 1, 2, 3 quarters."""
    return Suspicion(kind, 0.5, np.array(excess), np.array(held_out), Matches(np.array(excess), np.arange(2, 6), np.arange(4)))


def test_images_are_not_accused_of_what_held_out_patches_do_as_often():
    excess = [0.5, 1.5, 0.5, 0.5]
    for held_out, accused in (([0.5, 0.5, 1.5, 0.5], False), ([0.5] * 4, True)):
        found = copies_section(FRESH[:4], np.arange(4), [suspicion("whole image", excess, held_out)], GALLERY)
        assert bool(found.findings) == accused


def test_each_suspicious_image_is_shown_beside_its_patch_in_its_turn(monkeypatch):
    shown = []
    monkeypatch.setattr("metrics.copies.grid", lambda cells, columns: shown.append(cells) or grid(cells, columns))
    kinds = suspicion("whole image", [0.1, 0.9, 0.2, 0.8], [0.5] * 4), suspicion("half image", [0.3, 0.2, 0.7, 0.1], [0.5] * 4)
    pairs = copies_section(FRESH[:4], np.arange(4), list(kinds), GALLERY).numbers["most_suspicious"]
    assert [pair[:3] for pair in pairs] == [
        ["1", "patch 3", "whole image"],
        ["3", "patch 5", "whole image"],
        ["2", "patch 4", "half image"],
        ["0", "patch 2", "half image"],
    ]
    patches = undo(TRAIN[3], 1), undo(TRAIN[5], 3), undo(TRAIN[4], 2), TRAIN[2]
    assert (shown[0][1::2, ::2, ::2] == np.stack(patches)).all() and (shown[0][::2, ::2, ::2] == FRESH[[1, 3, 2, 0]]).all()


def test_the_match_names_the_patch_and_its_turn():
    for symmetry, turned in enumerate(symmetries(TRAIN[3:4])):
        whole = whole_matches(sketches(np.ascontiguousarray(turned)), sketches(THUMBNAILS), "search")
        assert whole.index[0] == 3 and whole.score[0] > 0.99
        assert (undo(TRAIN[3], int(whole.symmetry[0])) == turned[0]).all(), symmetry


def test_the_eight_symmetries_differ():
    pictures = symmetries(np.arange(9).reshape(1, 3, 3))
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_blank_images_match_nothing():
    blank = np.full((2, 64, 64, 3), 240, np.uint8)
    gallery = sketches(np.concatenate([THUMBNAILS, blank[:, :32, :32]]))
    for matches in (whole_matches(sketches(blank), gallery, "search"), half_matches(sketches(blank), gallery)):
        assert (matches.score <= 0).all()


def test_leaked_held_out_patches_do_not_blind_the_search():
    leaked = np.concatenate([HELD_OUT[:40], TRAIN[50:70]])
    suspicions = pixel_suspicions(TRAIN[:5], leaked, THUMBNAILS)
    assert all((suspicion.excess > 1).all() for suspicion in suspicions)


def turned(images, angle, size):
    turn = torch.tensor([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]) / size
    places = affine_grid(turn.expand(len(images), 2, 3), [len(images), 3, 64, 64], align_corners=False)
    whole = torch.from_numpy(images).permute(0, 3, 1, 2).to(places.dtype)
    return grid_sample(whole, places, padding_mode="reflection", align_corners=False).byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("angle", "size"), [(20, 1.0), (45, 1.0), (0, 1.25), (0, 0.85), (-33, 1.15)])
def test_copies_in_other_turns_and_sizes_are_found_with_their_source(angle, size):
    planted = turned(np.rot90(recolour(TRAIN[20:23]), 1, (1, 2))[:, :, ::-1].copy(), np.radians(angle), size)
    suspicion = turned_suspicion(planted, HELD_OUT[:6], THUMBNAILS[16:28], GREYS)
    assert (suspicion.excess > 1).all() and suspicion.matches.index.tolist() == [4, 5, 6]
    assert (suspicion.held_out_excess < 1).all()


def test_only_patches_of_like_features_are_turned(monkeypatch):
    monkeypatch.setattr(turned_search, "LIKELIEST", 2)
    likeness = {0: 5.0, 1: 3.0, 2: 9.0, 3: 5.5}  # of the patches to the image, whose own copy is 2
    training = np.array(list(likeness.values()))[:, None]
    five = Extractor("five", "", lambda batch: torch.full((len(batch), 1), 5.0))
    found = turned_search.turned_matches(TRAIN[2:3], training, THUMBNAILS[:4], five, "search")
    assert found.index[0] in (0, 3) and found.score[0] < 0.9
