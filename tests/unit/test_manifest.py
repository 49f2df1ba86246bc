"""patches.csv: what is written is read again, and damage is named."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.manifest import COLUMNS, NAME, Patch, read_manifest, write_manifest

PATCH = Patch("benign/a_0_256.png", "a", "radboud", 0, "0+0", "benign", 0, 256, 0, 0.4862, 0.75, 123.45, "train")


def test_rows_come_back_sorted_by_path(tmp_path):
    bare = replace(PATCH, path="a.png", data_provider="", isup_grade=None, gleason_score="", label="unlabelled", mpp=None)
    write_manifest(tmp_path, [PATCH, bare])
    assert read_manifest(tmp_path) == [bare, PATCH]


text = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r\n"), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(text, st.integers(0, 10**6), st.floats(0, 1))
def test_any_slide_id_survives(tmp_path_factory, slide_id, x, share):
    folder = tmp_path_factory.mktemp("manifest")
    patch = replace(PATCH, slide_id=slide_id, x=x, tissue=float(f"{share:.6g}"))
    write_manifest(folder, [patch])
    assert read_manifest(folder) == [patch]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("path", "../a.png"),
        ("path", "/etc/passwd"),
        ("path", ""),
        ("label", "cancer"),
        ("split", ""),
        ("isup_grade", "7"),
        ("x", "1.5"),
        ("tissue", "nan"),
        ("sharpness", "inf"),
        ("mpp", "x"),
    ],
)
def test_a_bad_value_is_named_with_its_line(tmp_path, column, value):
    write_manifest(tmp_path, [PATCH, replace(PATCH, path="benign/b.png")])
    lines = (tmp_path / NAME).read_text().splitlines()
    cells = lines[2].split(",")
    cells[COLUMNS.index(column)] = value
    (tmp_path / NAME).write_text("\n".join([*lines[:2], ",".join(cells)]) + "\n")
    with pytest.raises(UserError, match="line 3"):
        read_manifest(tmp_path)


def test_a_missing_manifest_or_column_is_named(tmp_path):
    with pytest.raises(UserError, match=NAME):
        read_manifest(tmp_path)
    (tmp_path / NAME).write_text("path,label\n")
    with pytest.raises(UserError, match="lacks the column.*split"):
        read_manifest(tmp_path)


def test_writing_replaces_whole_files_only(tmp_path):
    write_manifest(tmp_path, [PATCH])
    before = (tmp_path / NAME).read_bytes()

    def failing():
        yield PATCH
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_manifest(tmp_path, failing())
    assert (tmp_path / NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_whole_numbers_may_be_written_as_fractions(tmp_path):
    (tmp_path / NAME).write_text("path,split,isup_grade,x,y,level\na/b.png,test,4.0,7.0,1024.0,0.0\na/c.png,test,,7,1,0\n")
    first, second = read_manifest(tmp_path)
    assert (first.isup_grade, first.x, first.y, first.level, second.isup_grade) == (4, 7, 1024, 0, None)
    for grade in ("4.5", "nan", "inf"):
        (tmp_path / NAME).write_text(f"path,split,isup_grade\na/b.png,test,{grade}\n")
        with pytest.raises(UserError, match=f"isup_grade '{grade}' is not a number"):
            read_manifest(tmp_path)


def test_path_and_split_are_enough(tmp_path):
    (tmp_path / NAME).write_text("path,split\ntumour/CASE7_10_20.png,test\nrest/a.png,train\n")
    first, second = read_manifest(tmp_path)
    assert (first.label, first.slide_id, first.x, first.y, first.split) == ("tumour", "CASE7", 10, 20, "test")
    assert (second.label, second.slide_id, second.isup_grade, second.mpp) == ("rest", "rest/a.png", None, None)
    write_manifest(tmp_path, [first, second])
    assert read_manifest(tmp_path) == [second, first]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("tumour/a_0_0.png,train,other,", "label 'other' is neither .* nor the folder of the patch"),
        ("tumour/a_0_0.png,later,,", "split 'later'"),
        ("tumour/a_0_0.png,train,,much", "mpp 'much' is not a number"),
    ],
)
def test_peoples_own_rows_are_checked_as_well(tmp_path, line, what):
    (tmp_path / NAME).write_text(f"path,split,label,mpp\n{line}\n")
    with pytest.raises(UserError, match=what):
        read_manifest(tmp_path)
