"""PANDA's conventions: scores, grades, masks, train.csv, split."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.panda import (
    SlideRecord,
    gleason_patterns,
    isup_from_gleason,
    label_from_mask,
    normal_score,
    read_train_csv,
    split_by_slide,
)

HEADER = "image_id,data_provider,isup_grade,gleason_score\n"


def mask(**shares):
    """100 x 100 mask; ``v3=0.2`` puts value 3 on 20 % of it, the rest is 0."""
    values = np.zeros(10_000, np.uint8)
    position = 0
    for name, share in shares.items():
        values[position : position + round(share * 10_000)] = int(name[1:])
        position += round(share * 10_000)
    return values.reshape(100, 100)


@pytest.mark.parametrize(
    ("score", "grade"),
    [("0+0", 0), ("negative", 0), ("3+3", 1), ("3+4", 2), ("4+3", 3), ("4+4", 4), ("3+5", 4), ("5+3", 4), ("4+5", 5), ("5+5", 5)],
)
def test_isup_grade_follows_from_the_score(score, grade):
    assert isup_from_gleason(score) == grade


@pytest.mark.parametrize("score", ["", "3", "3+", "2+3", "0+3", "3+3+3", "three+four", "3-4"])
def test_what_is_no_score_gives_none(score):
    assert gleason_patterns(score) is None
    assert isup_from_gleason(score) is None


def test_both_spellings_of_no_cancer_become_one():
    assert normal_score(" Negative ") == normal_score("0+0") == "0+0"
    assert normal_score("4 + 4 ") == "4+4"


@pytest.mark.parametrize(
    ("shares", "label"),
    [
        ({"v2": 0.3, "v1": 0.5}, "benign"),
        ({"v2": 0.05, "v1": 0.9}, "unlabelled"),
        ({"v1": 1.0}, "unlabelled"),
        ({"v3": 0.2}, "gleason3"),
        ({"v4": 0.2, "v2": 0.5}, "unlabelled"),
        ({"v4": 0.5, "v2": 0.2}, "gleason4"),
        ({"v5": 0.09}, "unlabelled"),
        ({"v3": 0.2, "v4": 0.2}, "unlabelled"),
        ({"v3": 0.1, "v4": 0.3}, "gleason4"),
        ({"v2": 0.5, "v3": 0.005}, "benign"),
        ({"v2": 0.5, "v3": 0.05}, "unlabelled"),
    ],
)
def test_labels_of_radboud_masks(shares, label):
    assert label_from_mask(mask(**shares), "radboud", "3+4") == label


@pytest.mark.parametrize(
    ("shares", "score", "label"),
    [
        ({"v1": 0.8}, "3+4", "benign"),
        ({"v2": 0.5}, "4+4", "gleason4"),
        ({"v2": 0.5}, "3+4", "unlabelled"),
        ({"v2": 0.5}, "0+0", "unlabelled"),
        ({"v2": 0.05, "v1": 0.8}, "3+3", "unlabelled"),
        ({"v2": 0.5}, "", "unlabelled"),
    ],
)
def test_labels_of_karolinska_masks(shares, score, label):
    assert label_from_mask(mask(**shares), "karolinska", score) == label


def test_an_unknown_provider_has_no_labels():
    assert label_from_mask(mask(v2=1.0), "", "") == "unlabelled"


def test_train_csv_is_read_with_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(("\ufeff" + HEADER + "ab,Radboud,0,negative\n").replace("\n", "\r\n").encode())
    assert read_train_csv(path) == [SlideRecord("ab", "radboud", 0, "0+0")]
    path.write_text(HEADER + "ab,radboud,4.0,4+4\n")  # as pandas writes a column with gaps
    assert read_train_csv(path) == [SlideRecord("ab", "radboud", 4, "4+4")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "image_id,isup_grade\na,1\n",
        HEADER + "../a,radboud,0,0+0\n",
        HEADER + "a\\b,radboud,0,0+0\n",
        HEADER + ".a,radboud,0,0+0\n",
        HEADER + ",radboud,0,0+0\n",
        HEADER + "a,radboud,six,0+0\n",
        HEADER + "a,radboud,6,0+0\n",
        HEADER + '"a\nb",radboud,0,0+0\n',
    ],
)
def test_a_bad_train_csv_is_named(tmp_path, text):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match="train.csv"):
        read_train_csv(tmp_path / "train.csv")


def test_a_missing_train_csv_is_named(tmp_path):
    with pytest.raises(UserError, match="train.csv"):
        read_train_csv(tmp_path / "train.csv")


def records(count, provider="radboud", grade=1):
    return [SlideRecord(f"{provider}{grade}{i:04}", provider, grade) for i in range(count)]


def test_split_is_stratified_and_depends_on_nothing_but_the_ids():
    slides = records(100) + records(40, "karolinska", 4) + records(3, "karolinska", 5)
    split = split_by_slide(slides)
    assert split == split_by_slide(slides[::-1] + slides)
    held_out = [record for record in slides if split[record.slide_id] == "test"]
    assert sum(record.data_provider == "radboud" for record in held_out) == 15
    assert sum(record.isup_grade == 4 for record in held_out) == 6
    assert sum(record.isup_grade == 5 for record in held_out) == 0


def test_names_that_count_up_do_not_decide_who_is_held_out():
    split = split_by_slide(records(100))
    held_out = [rank for rank, name in enumerate(sorted(split)) if split[name] == "test"]
    assert len(held_out) == 15 and 30 < np.mean(held_out) < 70 and max(np.diff(held_out)) > 1


def test_four_slides_are_enough_to_hold_one_out_however_small_the_share():
    for count, expected in ((3, 0), (4, 1)):
        assert list(split_by_slide(records(count), 0.1).values()).count("test") == expected


def test_what_rounding_takes_from_a_grade_of_both_providers_is_given_back_to_it():
    slides = records(3, "karolinska", 5) + records(3, "radboud", 5) + records(10, "radboud", 1)
    split = split_by_slide(slides)
    held_out = sorted(record.isup_grade for record in slides if split[record.slide_id] == "test")
    assert held_out == [1, 5]


def test_slides_keep_their_side_when_more_arrive():
    few, many = records(24), records(200)
    before = split_by_slide(few)
    after = split_by_slide(many, known=before)
    assert {name: after[name] for name in before} == before
    assert sum(side == "test" for side in after.values()) == pytest.approx(30, abs=2)
    half = dict(list(before.items())[::2])
    assert split_by_slide(few, known=half) == before  # of a run that was stopped


def test_more_slides_move_few():
    before, after = split_by_slide(records(100)), split_by_slide(records(110))
    assert sum(before[name] != after[name] for name in before) <= 5


@given(st.lists(st.text(max_size=30), max_size=6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_train_csv_is_read_or_refused_in_a_sentence(lines, with_header):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.csv"
        path.write_text((HEADER if with_header else "") + "\n".join(lines), encoding="utf-8", errors="surrogatepass")
        try:
            records = read_train_csv(path)
        except UserError as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert all("/" not in record.slide_id for record in records)
