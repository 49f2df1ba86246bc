"""Which images are of one slide, and which are held out: patches by their rows or names, generated images stand for themselves."""

import pytest

from common.errors import UserError
from data.dataset import list_patches
from data.holdout import MIN_PATCHES, groups_of, train_and_held_out
from data.manifest import Patch, write_manifest

NAMES = ("sample_3_0001.png", "sample_3_0002.png", "SLIDE_64_128.png")


def test_numbered_images_are_no_slides_unless_a_manifest_makes_them_patches(tmp_path):
    for name in NAMES:
        (tmp_path / "benign").mkdir(exist_ok=True)
        (tmp_path / "benign" / name).touch()
    files = list_patches(tmp_path)
    assert sorted(groups_of(tmp_path, files)) == sorted(f"benign/{name}" for name in NAMES)
    assert {file.slide_id for file in files} == {"sample", "SLIDE"}
    rows = [Patch(f"benign/{name}", "", "", None, "", "benign", 0, 0, 0, None, 1.0, 1.0, "test") for name in NAMES]
    write_manifest(tmp_path, rows)
    assert sorted(groups_of(tmp_path, list_patches(tmp_path))) == ["SLIDE", "sample", "sample"]


def test_the_column_slide_id_says_what_names_do_not(tmp_path):
    row = "patch_{0}_{0}.png,CASE{1},{2}"
    rows = [row.format(number, number % 4, "test" if number % 4 == 3 else "train") for number in range(4 * MIN_PATCHES)]
    (tmp_path / "patches.csv").write_text("\n".join(["path,slide_id,split", *rows]))
    train, held_out = train_and_held_out(tmp_path)
    assert {file.slide_id for file in train} == {"CASE0", "CASE1", "CASE2"} and {file.slide_id for file in held_out} == {"CASE3"}


def test_held_out_is_what_training_leaves_out_even_of_a_slide_on_both_sides(tmp_path):
    for number in range(3 * MIN_PATCHES):
        path = tmp_path / ("test" if number % 3 == 0 else "train") / "benign" / f"patch_1_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    train, held_out = train_and_held_out(tmp_path)
    assert (len(train), len(held_out)) == (2 * MIN_PATCHES, MIN_PATCHES)
    assert {file.split for file in train} == {"train"} and {file.split for file in held_out} == {"test"}


def test_without_a_split_a_fifth_of_the_slides_is_held_out(tmp_path):
    for number in range(10 * MIN_PATCHES):
        (tmp_path / f"SLIDE{number % 10}_{number}_0.png").touch()
    train, held_out = train_and_held_out(tmp_path)
    assert len({file.slide_id for file in held_out}) == 2 and not {file.slide_id for file in held_out} & {f.slide_id for f in train}
    for file in [*train, *held_out[1:]]:
        (tmp_path / file.path).unlink()
    with pytest.raises(UserError, match="held-out"):
        train_and_held_out(tmp_path)
