"""Which images are of one slide: patches by their names, generated images by none."""

from data.dataset import list_patches, slide_of
from data.holdout import groups_of
from data.manifest import Patch, write_manifest

NAMES = ("sample_3_0001.png", "sample_3_0002.png", "SLIDE_64_128.png")


def test_numbered_images_are_no_slides_unless_a_manifest_makes_them_patches(tmp_path):
    for name in NAMES:
        (tmp_path / "benign").mkdir(exist_ok=True)
        (tmp_path / "benign" / name).touch()
    files = list_patches(tmp_path)
    assert sorted(groups_of(tmp_path, files)) == sorted(f"benign/{name}" for name in NAMES)
    assert {slide_of(file) for file in files} == {"sample", "SLIDE"}
    rows = [Patch(f"benign/{name}", name, "", None, "", "benign", 0, 0, 0, None, 1.0, 1.0, "test") for name in NAMES]
    write_manifest(tmp_path, rows)
    assert sorted(groups_of(tmp_path, list_patches(tmp_path))) == ["SLIDE", "sample", "sample"]
