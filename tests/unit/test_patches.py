"""Choosing places on one slide: grids, ranking, names."""

from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from data.cutting import Candidate, Scan, file_stem, find_places, rank, relative_path
from data.patches import _why_empty
from tests.conftest import tissue_texture

WHITE = (255, 255, 255)


def overview_of(blocks, height=128, width=160):
    """An overview at 16 level-0 pixels a pixel with tissue in each (x, y, width, height) of ``blocks``."""
    image = np.full((height, width, 3), WHITE, np.uint8)
    for x, y, w, h in blocks:
        image[y : y + h, x : x + w] = tissue_texture(h, w, x)
    return image


def places_on(image, span=256, downsample=1.0, min_tissue=0.5):
    height, width = image.shape[:2]
    return find_places(image, 16.0, span, downsample, (width * 16, height * 16), min_tissue)


def test_a_piece_of_tissue_is_covered_completely_wherever_it_lies():
    found, rejected, cause = places_on(overview_of([(21, 37, 48, 64)]))
    assert len(found) == 3 * 4
    assert all(share > 0.9 for *_, share in found)
    assert (rejected, cause) == ({}, "")


@pytest.mark.parametrize(("span", "downsample"), [(526.53, 1.0), (424.78, 1.0), (263.27, 1.0), (1053.06, 4.0), (2265.49, 4.0)])
def test_patches_of_a_fraction_of_a_pixel_cover_tissue_as_well(span, downsample):
    side = 300
    found, _, _ = places_on(overview_of([(10, 10, side - 20, side - 20)], side, side), span=span, downsample=downsample)
    assert len(found) >= int((side - 20) * 16 / span) ** 2
    for (x0, y0, _), (x1, y1, _) in combinations(found, 2):
        assert max(abs(x0 - x1), abs(y0 - y1)) > span - downsample


def test_whole_patches_of_tissue_are_whole_in_spite_of_rounding():
    image = tissue_texture(256, 256, 0)
    assert all(len(find_places(image, 16.0, span, 1.0, (4096, 4096), 1.0)[0]) == int(4096 / span) ** 2 for span in (263.27, 283.19))


def test_each_piece_gets_its_own_grid():
    found, _, _ = places_on(overview_of([(3, 5, 48, 48), (71, 60, 64, 32)]))
    assert len(found) == 9 + 8


@pytest.mark.parametrize("seed", range(4))
def test_patches_never_overlap_and_lie_inside_the_slide(seed):
    generator = np.random.default_rng(seed)
    blocks = [tuple(generator.integers((0, 0, 10, 10), (120, 90, 40, 38))) for _ in range(6)]
    image = overview_of(blocks)
    found, _, _ = places_on(image, span=200, min_tissue=0.4)
    assert found
    for (x0, y0, _), (x1, y1, _) in combinations(found, 2):
        assert abs(x0 - x1) >= 200 or abs(y0 - y1) >= 200
    assert all(0 <= x <= image.shape[1] * 16 - 200 and 0 <= y <= image.shape[0] * 16 - 200 for x, y, _ in found)
    assert all(share >= 0.4 for *_, share in found)


@pytest.mark.parametrize("downsample", [4.0, 16.0])
def test_places_start_on_whole_pixels_of_their_level(downsample):
    found, _, _ = places_on(overview_of([(21, 37, 70, 64)]), span=64 * downsample, downsample=downsample)
    assert found
    assert all(x % downsample == 0 and y % downsample == 0 for x, y, _ in found)


def test_places_with_pen_are_rejected_and_counted():
    image = overview_of([(20, 20, 64, 64)])
    image[20:84, 50:56] = (30, 60, 170)
    found, rejected, _ = places_on(image)
    assert rejected["pen"] >= 4
    assert found
    assert not any(x < 56 * 16 and x + 256 > 50 * 16 for x, *_ in found)


def test_the_cause_of_no_patch_is_named():
    assert places_on(overview_of([]))[2] == "no tissue found"
    assert "nowhere 90% of a patch" in places_on(overview_of([(20, 20, 9, 60)]), min_tissue=0.9)[2]


def test_a_slide_smaller_than_a_patch_gives_none():
    found, _, cause = find_places(tissue_texture(12, 12, 0), 16.0, 256, 1.0, (192, 192), 0.5)
    assert found == []
    assert cause


def candidates(label, count, tissue=1.0):
    return [Candidate(i * 256, hash(label) % 7 * 256, tissue, label) for i in range(count)]


def test_labels_take_turns_and_unlabelled_come_last():
    ranked = rank(candidates("benign", 20) + candidates("gleason4", 3) + candidates("unlabelled", 30), "s", 0)
    assert {item.label for item in ranked[:2]} == {"benign", "gleason4"}
    assert sum(item.label == "gleason4" for item in ranked[:6]) == 3
    assert all(item.label == "unlabelled" for item in ranked[23:])


def test_where_slides_give_a_few_patches_each_all_labels_are_met_with():
    items = [item for label in ("benign", "gleason3", "gleason4", "gleason5") for item in candidates(label, 5)]
    ranked = [rank(items, f"slide{number}", 0) for number in range(200)]
    first = Counter(order[0].label for order in ranked)
    assert len(first) == 4 and min(first.values()) > 30, first
    assert all(len({item.label for item in order[:4]}) == 4 for order in ranked)


def test_dense_tissue_comes_first_and_order_depends_on_the_seed_alone():
    items = candidates("benign", 30, 0.6) + [Candidate(9000, 0, 0.9, "benign")]
    ranked = rank(items, "s", 0)
    assert ranked[0].tissue == 0.9
    assert rank(items[::-1], "s", 0) == ranked
    assert rank(items, "s", 1) != ranked
    assert [item.x for item in ranked[1:]] != sorted(item.x for item in ranked[1:])


def test_a_slide_whose_share_went_to_another_is_not_called_useless():
    def why(looked_at):
        return _why_empty(
            SimpleNamespace(scan=Scan(candidates("benign", 5)), next_index=looked_at, rejected={"blur": looked_at}), 0
        )

    assert why(1) == "no patch was needed from it" and why(5) == "all 5 places with tissue were rejected (5 blur)"


@pytest.mark.parametrize("slide_id", ["a b", "../x", "ä", "x" * 300, "a/b", ".hidden", "a\nb"])
def test_file_names_are_safe_and_stay_distinct(slide_id):
    stem = file_stem(slide_id)
    assert len(stem) <= 110
    assert not set(stem) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert not stem.startswith(".")
    assert stem != file_stem(slide_id + " ")


def test_names_of_panda_stay_as_they_are():
    slide_id = "0005f7aaab2800f6170c399693a96917"
    assert relative_path(slide_id, "gleason3", 512, 0, "png") == f"gleason3/{slide_id}_512_0.png"
