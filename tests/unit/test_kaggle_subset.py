"""Which slides a subset holds."""

from collections import Counter

import pytest

from common.errors import UserError
from data.panda import KNOWN_BAD, PROVIDERS, SlideRecord
from data.subset import choose, read_ids


def records(per_stratum=20):
    """Slides of both providers and six grades, grade 5 of Radboud rare, and the known bad ones."""
    good = [
        SlideRecord(f"{provider}{grade}_{number}", provider, grade)
        for provider in PROVIDERS
        for grade in range(6)
        for number in range(3 if (provider, grade) == ("radboud", 5) else per_stratum)
    ]
    return good + [SlideRecord(slide_id, "radboud", 0) for slide_id in KNOWN_BAD]


def strata(chosen):
    return Counter((record.data_provider, record.isup_grade) for record in chosen)


def test_balanced_over_grade_and_provider():
    chosen, _ = choose(records(), 24)
    assert set(strata(chosen).values()) == {2} and len(strata(chosen)) == 12


def test_a_rare_stratum_is_taken_whole_and_the_rest_shares_what_is_left():
    chosen, _ = choose(records(), 12 * 5)
    counts = strata(chosen)
    assert counts.pop(("radboud", 5)) == 3
    assert max(counts.values()) - min(counts.values()) <= 1 and sum(counts.values()) == 57


def test_same_seed_same_subset_whatever_the_order_and_a_larger_number_extends_it():
    small, _ = choose(records(), 30, seed=7)
    large, _ = choose(records()[::-1], 90, seed=7)
    assert large[:30] == small
    assert choose(records(), 30, seed=8)[0] != small


def test_bad_slides_are_left_out_with_the_reason():
    chosen, bad = choose(records())
    assert bad == KNOWN_BAD and not {record.slide_id for record in chosen} & set(KNOWN_BAD)
    chosen, bad = choose(records(), include_bad=True)
    assert not bad and {record.slide_id for record in chosen} >= set(KNOWN_BAD)


def test_filters():
    chosen, _ = choose(records(), grades=(0, 5), providers=("karolinska",))
    assert set(strata(chosen)) == {("karolinska", 0), ("karolinska", 5)}
    chosen, _ = choose(records(), ids=["radboud1_0", "radboud2_1"])
    assert {record.slide_id for record in chosen} == {"radboud1_0", "radboud2_1"}
    with pytest.raises(UserError, match="'nobody'"):
        choose(records(), ids=["nobody"])


def test_a_doubled_row_is_one_slide():
    assert len(choose(records() + records())[0]) == len(choose(records())[0])


def test_reads_ids(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("image_id,grade\r\n# mine\r\nabc,3\r\n\r\ndef.tiff  # good\r\n")
    assert read_ids(path) == ["abc", "def"]
    path.write_text("# none\n")
    with pytest.raises(UserError, match="names no slide"):
        read_ids(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_ids(tmp_path / "absent.txt")
