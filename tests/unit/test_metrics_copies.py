"""Each kind of copy is found with its source; tissue of other slides is not accused."""

import numpy as np
import pytest

from metrics.copies import (
    Gallery,
    copies_section,
    feature_suspicion,
    pixel_matches,
    pixel_suspicions,
    sketches,
    symmetries,
    undo,
)
from metrics.features import Extractor
from tests.drawn_tissue import drawn_tissue

TRAIN, HELD_OUT, FRESH = drawn_tissue(150, 64, 0, 2.5), drawn_tissue(60, 64, 1, 2.5), drawn_tissue(95, 64, 2, 2.5)
THUMBNAILS = TRAIN.reshape(150, 32, 2, 32, 2, 3).mean((2, 4)).astype(np.uint8)
GALLERY = Gallery(THUMBNAILS, np.array([f"patch {index}" for index in range(150)]), lambda index: TRAIN[index])


def recolour(images):
    return np.clip(images * [0.8, 1.1, 0.9] + 12, 0, 255).astype(np.uint8)


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
    "noisy": lambda images: np.clip(images + np.random.default_rng(0).normal(0, 15, images.shape), 0, 255).astype(np.uint8),
}


def section(images):
    names = np.array([f"image {index}" for index in range(len(images))])
    return copies_section(images, names, pixel_suspicions(images, HELD_OUT, THUMBNAILS), GALLERY, GALLERY)


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


def test_the_match_names_the_patch_and_its_turn():
    for symmetry, turned in enumerate(symmetries(TRAIN[3:4])):
        whole, _ = pixel_matches(sketches(np.ascontiguousarray(turned)), sketches(THUMBNAILS))
        assert whole.index[0] == 3 and whole.score[0] > 0.99
        assert (undo(TRAIN[3], int(whole.symmetry[0])) == turned[0]).all(), symmetry


def test_the_eight_symmetries_differ():
    pictures = symmetries(np.arange(9).reshape(1, 3, 3))
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_blank_images_match_nothing():
    blank = np.full((2, 64, 64, 3), 240, np.uint8)
    whole, half = pixel_matches(sketches(blank), sketches(np.concatenate([THUMBNAILS, blank[:, :32, :32]])))
    assert (whole.score <= 0).all() and (half.score <= 0).all()


def test_leaked_held_out_patches_do_not_blind_the_search():
    leaked = np.concatenate([HELD_OUT[:40], TRAIN[50:70]])
    suspicions = pixel_suspicions(TRAIN[:5], leaked, THUMBNAILS)
    assert all((suspicion.excess > 1).all() for suspicion in suspicions)


def test_a_shifted_copy_is_near_in_features():
    def run(batch):  # where nothing depends on the place: sorted grey values
        return batch.float().mean(1).flatten(1).sort(1).values[:, ::64]

    extractor = Extractor("sorted", "", run)
    training = run_all(TRAIN, run)
    suspicion = feature_suspicion(np.roll(TRAIN[:5], 9, 2), HELD_OUT, training, extractor)
    assert (suspicion.excess > 1).all() and (suspicion.matches.index == np.arange(5)).all()
    assert (suspicion.held_out_excess < 1).all()


def run_all(images, run):
    import torch

    return run(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
