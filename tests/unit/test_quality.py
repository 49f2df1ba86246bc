"""Scanning patches, judging them, setting them aside: one planted fault of each kind, and copies of tissue that must be found."""

from __future__ import annotations

import csv
import errno
import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from common.errors import UserError
from data import quality, quality_patches, quality_rows, quarantine
from data.dataset import list_patches
from data.findings import Assessment, printable
from data.journal import Journal
from data.manifest import Patch, read_manifest, write_manifest
from data.quality import list_folder, scan_patch
from data.quality_patches import assess, near_groups, scan_patch_folder

SIDE = 96


def tissue(seed: int, side: int = SIDE) -> Image.Image:
    """Something with the colours and the spatial structure of stained tissue, different for each seed."""
    generator = np.random.default_rng(seed)
    field = Image.fromarray((generator.random((side, side)) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    nuclei = np.asarray(field, float)
    nuclei = ((nuclei - nuclei.mean()) / nuclei.std()).clip(-2, 2)[..., None]
    noise = generator.normal(0, 4, (side, side, 3))
    return Image.fromarray((np.array([190, 120, 180]) + nuclei * [40, 35, 20] + noise).clip(0, 255).astype(np.uint8))


def row(path: str, split: str = "train", **changes) -> Patch:
    label, name = path.split("/")
    slide, x, y = Path(name).stem.rsplit("_", 2)
    patch = Patch(path, slide, "radboud", 5, "4+5", label, int(x), int(y), 0, 0.4862, 0.9, 100.0, split)
    return replace(patch, **changes)


def make_folder(folder: Path, count: int = 8) -> list[Patch]:
    """``count`` good patches of two slides, one for training and one held out, with their manifest."""
    rows = [row(f"gleason{4 + k % 2}/s{k % 2}_{k}_0.png", "test" if k % 2 else "train") for k in range(count)]
    for k, patch in enumerate(rows):
        save(folder / patch.path, tissue(k))
    write_manifest(folder, rows)
    return rows


def save(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def judge(folder: Path) -> Assessment:
    return assess(folder, *scan_patch_folder(folder, workers=0))


def checks(assessment: Assessment) -> dict[str, tuple[str, ...]]:
    return {finding.check: finding.items for finding in assessment.findings}


def png_that_declares(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- one patch


def test_a_sound_patch_is_measured(tmp_path):
    save(tmp_path / "a.png", tissue(0))
    scan = scan_patch(tmp_path, "a.png")
    assert (scan.fault, scan.size, scan.mode, len(scan.phash)) == ("", (SIDE, SIDE), "RGB", 32)
    assert scan.stained > 0.9
    density = -np.log10(np.asarray(tissue(0), float).clip(1) / 255)
    assert np.allclose(scan.od, density[density.mean(axis=2) > quality.STAINED_OD].mean(axis=0), atol=0.01)


def test_sharpness_is_that_of_the_manifest(tmp_path):
    from data.tissue import Inspection

    save(tmp_path / "a.png", tissue(0))
    assert scan_patch(tmp_path, "a.png").sharpness == Inspection(np.asarray(tissue(0))).sharpness()


@pytest.mark.parametrize(
    ("fault", "content"),
    [
        ("damaged", b""),
        ("damaged", b"not a picture"),
        ("damaged", png_bytes(tissue(0))[:3000]),
        ("damaged", png_bytes(tissue(0))[:-30]),
        ("damaged", png_bytes(tissue(0)).replace(b"IDAT", b"IDAX", 1)),
        ("too_large", png_that_declares(100_000, 100_000)),
        ("too_large", png_that_declares(9_000, 9_000)),
        ("no_colour", png_bytes(tissue(0).convert("L"))),
        ("no_colour", png_bytes(tissue(0).convert("1"))),
        ("no_colour", png_bytes(Image.new("I;16", (SIDE, SIDE), 9_000))),
        ("blank", png_bytes(Image.new("RGB", (SIDE, SIDE), "white"))),
        ("blank", png_bytes(Image.new("RGB", (SIDE, SIDE), (150, 60, 140)))),
        ("blank", png_bytes(Image.new("RGB", (SIDE, SIDE)))),
    ],
)
def test_faults_of_one_patch_are_named(tmp_path, fault, content):
    (tmp_path / "a.png").write_bytes(content)
    scan = scan_patch(tmp_path, "a.png")
    assert scan.fault == fault
    assert scan.detail


def test_any_flipped_bit_of_a_png_is_found(tmp_path):
    content = bytearray(png_bytes(tissue(0)))
    for position in np.random.default_rng(0).integers(0, len(content), 40):
        content[position] ^= 1
        (tmp_path / "a.png").write_bytes(content)
        assert scan_patch(tmp_path, "a.png").fault in {"damaged", "too_large"}, position
        content[position] ^= 1


def test_huge_files_are_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(quality.MAX_BYTES + 1)
    assert scan_patch(tmp_path, "a.png").fault == "too_large"


def test_folders_pipes_and_links_to_nothing_are_not_opened(tmp_path):
    save(tmp_path / "real.png", tissue(0))
    (tmp_path / "link.png").symlink_to("real.png")
    assert not scan_patch(tmp_path, "link.png").fault
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("gone", "loop", "folder", "pipe"):
        assert scan_patch(tmp_path, f"{name}.png").fault == "not_a_file"


def test_formats_are_those_that_training_reads():
    from data import dataset

    assert set(quality.SUFFIXES) == set(dataset.SUFFIXES)


def test_listing_leaves_out_hidden_files_and_names_others(tmp_path):
    for name in ("a/x.PNG", "a/.hidden.png", "a/notes.txt", "patches.csv", "extract.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listing = list_folder(tmp_path)
    assert listing.images == ["a/x.PNG"]
    assert listing.others == ["a/notes.txt"]


def test_what_links_lead_to_is_trained_on_and_checked_but_not_round_and_round(tmp_path):
    for name in ("disk/a_0_0.png", "set/benign/b_0_0.png", "set/gleason4/c_0_0.png"):
        save(tmp_path / name, tissue(0))
    (tmp_path / "set" / "gleason3").symlink_to("../disk")
    (tmp_path / "set" / "gleason4" / "d_0_0.png").symlink_to("../../disk/a_0_0.png")
    (tmp_path / "set" / "gleason4" / "round").symlink_to("..")  # and others to what is there already
    for name in ("loop.png", "loop", "nowhere"):
        (tmp_path / "set" / name).symlink_to(name)
    (tmp_path / "set" / "above").symlink_to("../../" + tmp_path.name)
    (tmp_path / "set" / "another").symlink_to("benign")
    (tmp_path / "set" / "benign" / "e_0_0.png").symlink_to("b_0_0.png")
    paths = ["benign/b_0_0.png", "gleason3/a_0_0.png", "gleason4/c_0_0.png", "gleason4/d_0_0.png"]
    assert list_folder(tmp_path / "set").images == [*paths, "loop.png"]
    assert [(file.path, file.label) for file in list_patches(tmp_path / "set")] == [(path, path.split("/")[0]) for path in paths]


def test_checking_and_training_take_the_same_folders_for_labels(tmp_path):
    for seed, name in enumerate(("valid/a_0_0.png", "invalid/b_0_0.png")):
        save(tmp_path / name, tissue(seed))
    facts = judge(tmp_path).facts
    assert {path: fact.label for path, fact in facts.items()} == {file.path: file.label for file in list_patches(tmp_path)}


# ------------------------------------------------------------------------------------------------------- near duplicates


def test_near_groups_equal_those_of_a_plain_comparison():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (300, 32), dtype=np.uint8)
    for k in range(60):  # copies that differ in k % 20 bits
        bits = np.unpackbits(hashes[k])
        bits[generator.choice(256, k % 20, replace=False)] ^= 1
        hashes[200 + k] = np.packbits(bits)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2) <= quality_patches.NEAR_BITS
    groups = near_groups(hashes)
    assert np.array_equal(groups[:, None] == groups, near)
    assert near.sum() == 300 + 2 * 48


def test_thousands_of_near_copies_are_one_group_in_little_time():
    generator = np.random.default_rng(0)
    bits = np.tile(generator.integers(0, 2, 256, dtype=np.uint8), (2000, 1))
    bits[np.arange(2000), generator.integers(0, 256, 2000)] ^= 1
    assert len(set(near_groups(np.packbits(bits, axis=1)))) == 1
    assert len(near_groups(np.empty((0, 32), np.uint8))) == 0


@pytest.mark.parametrize("seed", range(3))
def test_saved_again_is_found_and_other_tissue_is_not(tmp_path, seed):
    image = tissue(seed, 256)
    save(tmp_path / "a.png", image)
    save(tmp_path / "jpeg.jpg", image, quality=75)
    save(tmp_path / "bright.png", ImageEnhance.Brightness(image).enhance(1.05))
    for other in range(100, 120):
        save(tmp_path / f"{other}.png", tissue(other, 256))
    findings = checks(judge(tmp_path))
    assert findings["near_duplicates"] == ("a.png = bright.png = jpeg.jpg",)


REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "prostate_slides" / "train_images"


@pytest.mark.skipif(not REAL.is_dir(), reason="no real slides here")
def test_neighbours_in_real_tissue_are_not_accused_and_their_copies_are(tmp_path):
    from data.slides import Slide

    places = 0
    for path in sorted(REAL.iterdir())[:2]:
        with Slide(path) as slide:
            for x, y in np.ndindex(6, 6):
                image = slide.read(0, 256 + 128 * x, 256 + 128 * y, 256, 256)
                if image.mean() < 205:
                    save(tmp_path / f"{path.stem}_{x}_{y}.png", Image.fromarray(image))
                    places += 1
    assert places > 25
    assert not {"near_duplicates", "stain_outliers", "blur"} & checks(judge(tmp_path)).keys()
    first = sorted(tmp_path.glob("*.png"))[0]
    save(tmp_path / "copy.jpg", ImageEnhance.Brightness(Image.open(first)).enhance(1.05), quality=75)
    (group,) = checks(judge(tmp_path))["near_duplicates"]
    assert set(group.split(" = ")) == {"copy.jpg", first.name}


# --------------------------------------------------------------------------------------------------------- one folder


def test_a_sound_folder_has_nothing_broken(tmp_path):
    make_folder(tmp_path)
    assessment = judge(tmp_path)
    assert not assessment.broken
    assert len(assessment.scans) == 8
    assert set(checks(assessment)) == {"amount", "few_of_label", "no_test_patches"}


def test_odd_size_is_told_by_the_majority(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "gleason4/s0_0_0.png", tissue(0, 64))
    assert checks(judge(tmp_path))["odd_size"] == ("gleason4/s0_0_0.png: 64 x 64, most are 96 x 96",)


def test_of_exact_copies_the_listed_one_is_kept(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "gleason4/a_0_0.png", tissue(0), compress_level=1)  # other bytes, same pixels, sorts first, no row
    assessment = judge(tmp_path)
    assert checks(assessment)["duplicate"] == ("gleason4/a_0_0.png: same pixels as gleason4/s0_0_0.png",)
    assert "gleason4/s0_0_0.png" in assessment.scans


def test_copies_under_two_labels_are_all_doubted(tmp_path):
    rows = make_folder(tmp_path)
    save(tmp_path / "gleason5/s0_0_0.png", tissue(0))
    write_manifest(tmp_path, [*rows, row("gleason5/s0_0_0.png")])
    assessment = judge(tmp_path)
    assert set(assessment.faults) == {"gleason4/s0_0_0.png", "gleason5/s0_0_0.png"}
    assert "contradictory" in checks(assessment)


def test_near_copies_across_the_split_are_broken(tmp_path):
    rows = make_folder(tmp_path)
    save(tmp_path / "gleason5/s1_99_0.png", ImageEnhance.Brightness(tissue(0)).enhance(1.03))
    write_manifest(tmp_path, [*rows, row("gleason5/s1_99_0.png", "test")])
    assessment = judge(tmp_path)
    assert checks(assessment)["near_leak"] == ("gleason4/s0_0_0.png = gleason5/s1_99_0.png",)
    assert assessment.broken


def test_blur_and_odd_stain_stand_out(tmp_path):
    for k in range(30):
        save(tmp_path / f"s_{k}_0.png", tissue(k))
    save(tmp_path / "s_90_0.png", tissue(90).filter(ImageFilter.GaussianBlur(2)))
    save(tmp_path / "s_91_0.png", Image.fromarray(np.asarray(tissue(91))[..., [2, 0, 1]]))
    findings = checks(judge(tmp_path))
    assert [item.split(":")[0] for item in findings["blur"]] == ["s_90_0.png"]
    assert findings["stain_outliers"][0].startswith("s_91_0.png")  # blur mixes colours, so that the blurred one is odd too


@pytest.mark.parametrize(
    ("check", "severity", "changes"),
    [
        ("misplaced", "warning", {"label": "gleason3"}),
        ("misplaced", "warning", {"x": 7}),
        ("misplaced", "warning", {"slide_id": "other"}),
        ("unknown_provider", "warning", {"data_provider": "elsewhere"}),
        ("grade_mismatch", "warning", {"isup_grade": 2}),
        ("grade_mismatch", "warning", {"gleason_score": "7"}),
        ("label_mismatch", "warning", {"gleason_score": "negative", "isup_grade": 0}),
        ("known_bad", "warning", {"slide_id": "3790f55cad63053e956fb73027179707"}),
        ("split_leak", "broken", {"split": "test"}),
        ("several_isup_grade", "broken", {"isup_grade": 4}),
        ("several_data_provider", "broken", {"data_provider": "karolinska"}),
    ],
)
def test_inconsistent_rows_are_named(tmp_path, check, severity, changes):
    rows = make_folder(tmp_path)
    write_manifest(tmp_path, [replace(rows[0], **changes), *rows[1:]])
    assert check in {finding.check for finding in judge(tmp_path).findings if finding.severity == severity}


def test_files_and_rows_are_compared(tmp_path):
    rows = make_folder(tmp_path)
    save(tmp_path / "gleason4/s0_77_0.png", tissue(77))
    (tmp_path / rows[2].path).unlink()
    write_manifest(tmp_path, [*rows, rows[1]])
    findings = checks(judge(tmp_path))
    assert findings["stray_files"] == ("gleason4/s0_77_0.png",)
    assert findings["missing_files"] == (rows[2].path,)
    assert findings["repeated_rows"] == (f"{rows[1].path}: 2 rows",)


def test_slide_ids_that_no_file_name_can_hold_are_not_held_against_the_path(tmp_path):
    rows = make_folder(tmp_path)
    write_manifest(tmp_path, [replace(patch, slide_id="a b/c") if patch.slide_id == "s0" else patch for patch in rows])
    assert "misplaced" not in checks(judge(tmp_path))


def test_a_damaged_manifest_is_one_finding(tmp_path):
    make_folder(tmp_path)
    with open(tmp_path / "patches.csv", "a") as file:
        file.write("../outside.png,s,radboud,1,3+3,gleason3,0,0,0,0.5,1,1,train\n")
    assessment = judge(tmp_path)
    assert "line 10" in checks(assessment)["manifest_damaged"][0]
    assert len(assessment.scans) == 8


def test_cramers_v_of_known_tables():
    assert quality_rows.cramers_v(np.array([[10, 0], [0, 10]])) == pytest.approx(1)
    assert quality_rows.cramers_v(np.array([[10, 20], [20, 40], [0, 0]])) == pytest.approx(0)
    assert quality_rows.cramers_v(np.array([[8, 2], [2, 8]])) == pytest.approx(0.6)
    assert quality_rows.cramers_v(np.zeros((6, 2), int)) == 0


def test_grades_of_one_provider_each_are_confounded(tmp_path):
    rows = make_folder(tmp_path)
    changed = [replace(patch, data_provider="karolinska", isup_grade=4) if patch.slide_id == "s1" else patch for patch in rows]
    write_manifest(tmp_path, changed)
    assert checks(judge(tmp_path))["confounded"] == ("ISUP 4 only from karolinska", "ISUP 5 only from radboud")


def test_amount_says_how_many_slides_are_missing(tmp_path):
    known = {f"{k}": quality_patches.Facts("benign", f"slide{k % 10}") for k in range(1000)}
    (finding,) = quality_rows.amount(tmp_path, known)
    assert "4,000 more, about 40 more slides at 100.0 patches a slide" in finding.advice
    assert not list(quality_rows.amount(tmp_path, {f"{k}": quality_patches.Facts("benign", "s") for k in range(5000)}))


def test_amount_asks_for_more_patches_where_those_wanted_were_found(tmp_path):
    known = {f"{k}": quality_patches.Facts("benign", f"slide{k % 10}") for k in range(1000)}
    (tmp_path / "extract.json").write_text('{"settings": {"max_patches": 1000}}')
    (finding,) = quality_rows.amount(tmp_path, known)
    assert "a larger --max_patches of extract_patches.py than 1,000" in finding.advice and "slides at" not in finding.advice


def test_mixed_magnifications_are_a_warning(tmp_path):
    rows = make_folder(tmp_path)
    write_manifest(tmp_path, [replace(rows[0], mpp=0.25), *rows[1:]])
    assert checks(judge(tmp_path))["mixed_mpp"] == ("0.25 to 0.49 micrometres a pixel",)


def test_a_label_that_is_not_karolinskas_score_is_a_warning(tmp_path):
    rows = make_folder(tmp_path)
    changed = [replace(patch, data_provider="karolinska", gleason_score="4+4", isup_grade=4) for patch in rows]
    write_manifest(tmp_path, changed)
    items = checks(judge(tmp_path))["label_mismatch"]
    assert len(items) == 4 and all(item.startswith("gleason5/") for item in items)


def test_an_unlisted_copy_does_not_take_the_listed_patch_with_it(tmp_path):
    rows = make_folder(tmp_path)
    save(tmp_path / "benign" / "copy_0_0.png", tissue(0))
    assert list(judge(tmp_path).faults) == ["benign/copy_0_0.png"] and rows[0].label == "gleason4"


def near_copy(seed: int) -> Image.Image:
    return ImageEnhance.Brightness(tissue(seed)).enhance(1.03)


@pytest.mark.parametrize("place", ["gleason4", "test/gleason4"])
def test_copies_without_a_row_are_on_no_side_of_the_split(tmp_path, place):
    make_folder(tmp_path)
    save(tmp_path / place / "t_0_0.png", tissue(0))
    save(tmp_path / place / "t_2_0.png", near_copy(2))
    findings = checks(judge(tmp_path))
    assert findings["duplicate"] == (f"{place}/t_0_0.png: same pixels as gleason4/s0_0_0.png",)
    assert findings["near_duplicates"] == (f"gleason4/s0_2_0.png = {place}/t_2_0.png",) and "near_leak" not in findings
    assert findings["stray_files"] == (f"{place}/t_0_0.png", f"{place}/t_2_0.png")


def test_listed_copies_across_the_split_are_told_as_such(tmp_path):
    rows = make_folder(tmp_path)
    save(tmp_path / "gleason4/s1_98_0.png", tissue(0))
    write_manifest(tmp_path, [*rows, row("gleason4/s1_98_0.png", "test")])
    (item,) = checks(judge(tmp_path))["duplicate"]
    assert item == "gleason4/s1_98_0.png: same pixels as gleason4/s0_0_0.png (on the other side of the split)"


def test_without_a_manifest_a_copy_outside_the_held_out_folder_is_a_leak(tmp_path):
    for path, picture in (("test/a/0.png", tissue(0)), ("train/a/1.png", tissue(1)), ("a/2.png", near_copy(0))):
        save(tmp_path / path, picture)
    assert checks(judge(tmp_path))["near_leak"] == ("a/2.png = test/a/0.png",)  # training takes it for one of its own


def test_pictures_without_a_row_do_not_decide_which_size_is_usual(tmp_path):
    rows = make_folder(tmp_path)
    for k in range(12):
        save(tmp_path / "gleason4" / f"small_{k}_0.png", tissue(100 + k, 48))
    assessment = judge(tmp_path)
    assert not {patch.path for patch in rows} & assessment.faults.keys() and len(assessment.faults) == 12
    assert checks(assessment)["odd_size"][0] == "gleason4/small_0_0.png: 48 x 48, most are 96 x 96"
    assert assessment.scans.keys() == {patch.path for patch in rows}


def test_where_no_listed_picture_is_sound_the_others_decide_which_size_is_usual(tmp_path):
    for patch in make_folder(tmp_path, 2):
        (tmp_path / patch.path).write_bytes(b"damaged")
    for k in range(3):
        save(tmp_path / "gleason4" / f"t_{k}_0.png", tissue(k))
    assert "odd_size" not in checks(judge(tmp_path))


def test_pictures_without_a_row_count_for_nothing(tmp_path):
    make_folder(tmp_path)
    before = judge(tmp_path)
    for k in range(100):
        save(tmp_path / "benign" / f"other_{k}_0.png", tissue(100 + k % 30, SIDE))
    after = judge(tmp_path)
    assert after.summary == before.summary == "8 patches of 2 slides, 8 fit for training"
    assert after.tables == before.tables
    same = ("amount", "few_of_label", "no_test_patches")
    assert {name: checks(after).get(name) for name in same} == {name: checks(before).get(name) for name in same}
    assert len(checks(after)["stray_files"]) == 100


def test_a_manifest_without_rows_lists_no_patch(tmp_path):
    make_folder(tmp_path)
    write_manifest(tmp_path, [])
    assessment = judge(tmp_path)
    assert assessment.summary == "0 patches of 0 slides, 0 fit for training" and not assessment.faults
    assert len(checks(assessment)["stray_files"]) == 8


def test_slides_below_a_folder_are_never_quarantined(tmp_path):
    (tmp_path / "panda" / "train_images").mkdir(parents=True)
    (tmp_path / "panda" / "train_images" / "a.tiff").touch()
    with pytest.raises(UserError, match="panda holds slides"):
        quarantine.set_aside(tmp_path, {"panda/train_images/a.tiff": "odd"})
    assert (tmp_path / "panda" / "train_images" / "a.tiff").exists()


def test_folders_of_slides_are_never_quarantined(tmp_path):
    save(tmp_path / "train_images" / "a.png", tissue(0))
    with pytest.raises(UserError, match="holds slides"):
        quarantine.set_aside(tmp_path, {"train_images/a.png": "odd"})
    assert (tmp_path / "train_images" / "a.png").exists()


def test_patches_laid_out_by_split_are_read_as_training_reads_them(tmp_path):
    for number, path in enumerate(("train/a/s1_0_0.png", "val/b/s2_0_0.png")):
        save(tmp_path / path, tissue(number))
    facts = judge(tmp_path).facts
    assert [(fact.label, fact.split) for fact in facts.values()] == [("a", "train"), ("b", "test")]


def test_names_are_printed_without_control_characters():
    assert printable("a\x1b[2J\nb\udcff") == "a\\x1b[2J\\nb\\udcff"
    assert printable("Gewebe ü.png") == "Gewebe ü.png"


# --------------------------------------------------------------------------------------------------------- quarantine


def plant(folder: Path) -> None:
    """Six faults that can be set aside: damaged, blank, another size, an exact copy, a missing file, a repeated row."""
    rows = make_folder(folder)
    (folder / rows[0].path).write_bytes(b"damaged")
    save(folder / rows[1].path, Image.new("RGB", (SIDE, SIDE), "white"))
    save(folder / rows[2].path, tissue(2, 64))
    save(folder / "gleason5/s1_99_0.png", tissue(3))
    (folder / rows[4].path).unlink()
    write_manifest(folder, [*rows, row("gleason5/s1_99_0.png", "test"), rows[5]])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def assert_rows_and_files_agree(folder: Path) -> None:
    """No row without a file. (Files without a row are what an interrupted run may leave.)"""
    assert all((folder / patch.path).is_file() for patch in read_manifest(folder))


def test_quarantine_moves_mends_and_says_why(tmp_path):
    folder = tmp_path / "patches"
    plant(folder)
    before = everything(folder)
    assert quarantine.set_aside(folder, judge(folder).faults) == 6
    assessment = judge(folder)
    assert not assessment.broken
    assert set(assessment.scans) == {patch.path for patch in read_manifest(folder)}
    aside = tmp_path / "patches_quarantine"
    assert everything(folder) | everything(aside) == before
    with open(aside / "reasons.csv", newline="") as file:
        reasons = {row["path"]: row for row in csv.DictReader(file)}
    assert reasons["gleason4/s0_0_0.png"]["reason"].startswith("damaged pictures")
    assert reasons["gleason4/s0_0_0.png"]["slide_id"] == "s0"
    assert reasons["gleason4/s0_4_0.png"]["reason"] == "row without a file"
    assert quarantine.set_aside(folder, assessment.faults) == 0


def test_quarantine_keeps_columns_of_peoples_own(tmp_path):
    rows = [f"{row.path},{row.split},P{number}" for number, row in enumerate(make_folder(tmp_path))]
    (tmp_path / "patches.csv").write_text("\n".join(["path,split,patient", *rows]) + "\n")
    assert quarantine.set_aside(tmp_path, {rows[2].split(",")[0]: "blank"}) == 1
    assert (tmp_path / "patches.csv").read_text().split() == ["path,split,patient", *rows[:2], *rows[3:]]


def test_rows_of_a_folder_that_may_not_be_read_stay(tmp_path, monkeypatch):
    rows, lstat = make_folder(tmp_path), Path.lstat

    def refused(path):
        if "gleason4" in path.parts:
            raise PermissionError(13, "Permission denied")
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", refused)
    (tmp_path / rows[1].path).unlink()
    assert quarantine.set_aside(tmp_path, {}) == 1
    assert {row.path for row in read_manifest(tmp_path)} == {row.path for row in rows} - {rows[1].path}


def test_quarantine_never_overwrites(tmp_path):
    folder = tmp_path / "patches"
    for k in range(3):
        make_folder(folder)
        (folder / "gleason4/s0_0_0.png").write_bytes(f"damaged {k}".encode())
        quarantine.set_aside(folder, judge(folder).faults)
    aside = everything(tmp_path / "patches_quarantine")
    assert sorted(aside.values()) == [b"damaged 0", b"damaged 1", b"damaged 2"]
    assert len((tmp_path / "patches_quarantine" / "reasons.csv").read_text().splitlines()) == 4


class Killed(BaseException):
    """Stands for a kill: no handler of the program catches it."""


@pytest.mark.parametrize("step", range(9))
def test_a_kill_at_any_step_loses_nothing_and_a_rerun_finishes(tmp_path, monkeypatch, step):
    folder = tmp_path / "patches"
    plant(folder)
    before = everything(folder)
    plan = judge(folder).faults
    calls = iter(range(100))

    def dying(function):
        def call(*args, **options):
            if next(calls) == step:
                raise Killed
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        died = False
        try:
            quarantine.set_aside(folder, plan)
        except Killed:
            died = True
    aside = tmp_path / "patches_quarantine"
    moved = everything(aside) if aside.exists() else {}
    assert everything(folder) | moved == before
    mended = len(read_manifest(folder)) < 10
    if mended:
        assert_rows_and_files_agree(folder)
    quarantine.finish(folder)
    quarantine.set_aside(folder, judge(folder).faults)
    assert not quarantine.is_pending(folder)
    assert not judge(folder).broken
    assert everything(folder) | everything(aside) == before
    assert len((aside / "reasons.csv").read_text().splitlines()) == 7
    assert died == (step < 8)


def test_what_was_set_aside_before_is_looked_up_and_not_searched(tmp_path, monkeypatch):
    folder, compared = tmp_path / "patches", []

    def equal(one, other):
        compared.append(one)
        return (one.path, one.moved_to, one.reason, one.row) == (other.path, other.moved_to, other.reason, other.row)

    monkeypatch.setattr(quarantine.Entry, "__eq__", equal)
    for start in (0, 40):
        faults = {f"benign/s_{k}_0.png": "blank" for k in range(start, start + 40)}
        for path in faults:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        assert quarantine.set_aside(folder, faults) == 40
    assert len((tmp_path / "patches_quarantine" / "reasons.csv").read_text().splitlines()) == 81
    assert len(compared) <= 80


def test_quarantine_does_not_touch_a_folder_that_is_extracted_into(tmp_path):
    folder = tmp_path / "patches"
    plant(folder)
    faults, before, rows = judge(folder).faults, everything(folder), (folder / "patches.csv").read_bytes()
    with Journal(folder):
        for attempt in (lambda: quarantine.set_aside(folder, faults), lambda: quarantine.finish(folder)):
            with pytest.raises(UserError, match=f"an extraction into {folder} .* is running; wait for its end"):
                attempt()
    assert everything(folder) == before and (folder / "patches.csv").read_bytes() == rows
    assert not (tmp_path / "patches_quarantine").exists()
    assert quarantine.finish(folder) == 0 and quarantine.set_aside(folder, faults) == 6


@pytest.mark.parametrize("extracted", [False, True])
def test_two_quarantines_of_one_folder_do_not_work_at_once(tmp_path, monkeypatch, extracted):
    folder = tmp_path / "patches"
    plant(folder)
    if extracted:
        Journal(folder).__exit__()
    refused, move = [], quarantine._move

    def meanwhile(*args):
        for attempt in (lambda: quarantine.set_aside(folder, {}), lambda: quarantine.finish(folder)):
            with pytest.raises(UserError, match="another --quarantine of it is running"):
                attempt()
        refused.append(args)
        return move(*args)

    monkeypatch.setattr(quarantine, "_move", meanwhile)
    assert quarantine.set_aside(folder, judge(folder).faults) == 6 and len(refused) == 6
    assert not judge(folder).broken


def test_patches_that_another_quarantine_took_meanwhile_are_not_recorded_again(tmp_path):
    folder = tmp_path / "patches"
    plant(folder)
    faults = judge(folder).faults
    assert quarantine.set_aside(folder, faults) == 6
    reasons = (tmp_path / "patches_quarantine" / "reasons.csv").read_bytes()
    assert quarantine.set_aside(folder, faults) == 0
    assert (tmp_path / "patches_quarantine" / "reasons.csv").read_bytes() == reasons


def test_no_extraction_begins_while_patches_are_set_aside(tmp_path, monkeypatch):
    folder, refused, move = tmp_path / "patches", [], quarantine._move
    plant(folder)
    Journal(folder).__exit__()

    def meanwhile(*args):
        with pytest.raises(UserError):
            Journal(folder)
        refused.append(args)
        return move(*args)

    monkeypatch.setattr(quarantine, "_move", meanwhile)
    assert quarantine.set_aside(folder, judge(folder).faults) == len(refused) == 6


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such lock")
def test_a_file_system_without_locks_stops_no_quarantine(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    folder = tmp_path / "patches"
    plant(folder)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert quarantine.set_aside(folder, judge(folder).faults) == 6


def test_quarantine_leaves_a_damaged_manifest_alone(tmp_path):
    folder = tmp_path / "patches"
    plant(folder)
    (folder / "patches.csv").write_text("nonsense\n")
    before = everything(folder)
    with pytest.raises(UserError, match="lacks the column"):
        quarantine.set_aside(folder, judge(folder).faults)
    assert everything(folder) == before


def test_quarantine_folder_that_is_a_file_is_refused(tmp_path):
    folder = tmp_path / "patches"
    plant(folder)
    (tmp_path / "patches_quarantine").write_text("in the way")
    with pytest.raises(UserError, match="cannot set patches aside"):
        quarantine.set_aside(folder, judge(folder).faults)
    assert (tmp_path / "patches_quarantine").read_text() == "in the way"
