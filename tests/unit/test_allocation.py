"""Spreading the wanted number of patches over grades, providers and slides."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from data.allocation import Supply, allocate, water_fill

bounds = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), max_size=12)
supplies = st.lists(
    st.builds(
        lambda cell, labelled, unlabelled, taken: Supply(cell, labelled, unlabelled, min(taken, labelled + unlabelled)),
        st.sampled_from("abcd"),
        st.integers(0, 30),
        st.integers(0, 30),
        st.integers(0, 5),
    ),
    max_size=15,
)


@settings(deadline=None)
@given(st.integers(0, 500), bounds)
def test_water_fill_keeps_its_bounds_and_is_as_even_as_they_allow(total, pairs):
    floors, caps = [low for low, _ in pairs], [high for _, high in pairs]
    shares = water_fill(total, caps, floors)
    assert sum(shares) == max(min(total, sum(caps)), sum(floors))
    assert all(low <= share <= high for low, share, high in zip(floors, shares, caps, strict=True))
    growing = [share for low, share, high in zip(floors, shares, caps, strict=True) if low < share]
    open_ended = [share for share, high in zip(shares, caps, strict=True) if share < high]
    if growing and open_ended:
        assert max(growing) <= min(open_ended) + 1


def test_water_fill_by_hand():
    assert water_fill(10, [2, 9, 9]) == [2, 4, 4]
    assert water_fill(11, [2, 9, 9]) == [2, 5, 4]
    assert water_fill(10, [2, 9, 9], [0, 0, 7]) == [2, 1, 7]
    assert water_fill(5, []) == []


@settings(deadline=None)
@given(st.integers(0, 400), supplies)
def test_allocation_is_exact_and_never_takes_back(total, slides):
    shares = allocate(total, slides)
    taken, available = sum(slide.taken for slide in slides), sum(slide.total for slide in slides)
    assert sum(shares) == max(min(total, available), taken)
    assert all(slide.taken <= share <= slide.total for slide, share in zip(slides, shares, strict=True))


@settings(deadline=None)
@given(st.integers(0, 400), supplies)
def test_cells_are_even_as_far_as_their_supply_goes(total, slides):
    fresh = [Supply(slide.cell, slide.labelled, slide.unlabelled) for slide in slides]
    given_by, available = Counter(), Counter()
    for slide, share in zip(fresh, allocate(total, fresh), strict=True):
        given_by[slide.cell] += share
        available[slide.cell] += slide.total
    partial = [given_by[cell] for cell in available if given_by[cell] < available[cell]]
    if partial:
        assert max(given_by.values()) <= min(partial) + 1


def test_labelled_patches_go_first_within_a_cell():
    poor, rich = Supply("a", 2, 50), Supply("a", 40, 0)
    assert allocate(30, [poor, rich]) == [2, 28]
    assert allocate(60, [poor, rich]) == [20, 40]


def test_providers_and_grades_get_the_same_though_one_has_far_more():
    slides = [Supply(("radboud", 0), 500, 0)] * 5 + [Supply(("karolinska", 5), 60, 0)] * 2
    shares = allocate(200, slides)
    assert sum(shares[:5]) == sum(shares[5:]) == 100
