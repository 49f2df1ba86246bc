"""Extraction from end to end on tiny slides: labels, numbers, balance, continuing, faults."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from torchvision.datasets import ImageFolder

import extract_patches
from common.errors import UserError
from common.files import write_csv
from data import cutting, patches
from data.extract_report import report
from data.journal import NAME as JOURNAL
from data.manifest import read_manifest, write_manifest
from data.patches import ExtractSettings, extract, overlay_folder
from data.quarantine import quarantine_folder, set_aside
from data.slides import slide_files
from tests.conftest import draw_slide, write_panda_folder, write_pyramid

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
SIDE, PATCH = 512, 128  # pixels of a slide and of a patch


def settings_for(data, tmp_path, **changes):
    return replace(ExtractSettings(data, tmp_path / "patches", patch_size=PATCH, workers=0), **changes)


def contents(folder):
    """Every file in the patch folder but the journal, which tells how the run went and not what came of it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != JOURNAL
    }


def command_for(settings):
    folders = ["--data_dir", str(settings.data_dir), "--output_dir", str(settings.output_dir)]
    return [sys.executable, "extract_patches.py", "--patch_size", str(PATCH), "--workers", "1", *folders]


def break_tiles(path, keep):
    """Overwrite the full-resolution tiles of a slide that no patch of ``keep`` touches."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        across = page.imagewidth // page.tilewidth
        corners = [(patch.x + dx, patch.y + dy) for patch in keep for dx in (0, PATCH - 1) for dy in (0, PATCH - 1)]
        whole = {y // page.tilelength * across + x // page.tilewidth for x, y in corners}
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    data = bytearray(path.read_bytes())
    for index in set(range(len(places))) - whole:
        offset, count = places[index]
        data[offset : offset + count] = b"\0" * count
    path.write_bytes(data)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    return write_panda_folder(tmp_path_factory.mktemp("drawn"), SIDE, PATCH)


@pytest.fixture
def settings(drawn, tmp_path):
    return settings_for(shutil.copytree(drawn, tmp_path / "panda"), tmp_path)


def test_everything_is_extracted_labelled_and_listed(settings):
    result = extract(settings)
    patches = read_manifest(settings.output_dir)
    assert result.patches == patches
    assert len(patches) == 6 * 9
    assert {patch.path for patch in patches} == {
        str(path.relative_to(settings.output_dir)) for path in settings.output_dir.rglob("*.png")
    }
    assert {patch.label for patch in patches if patch.slide_id == "aaa2"} <= {"gleason4", "gleason5", "unlabelled"}
    assert {patch.label for patch in patches if patch.slide_id == "bbb1"} == {"benign"}
    assert not any(patch.label.startswith("gleason") for patch in patches if patch.slide_id == "bbb3")
    for patch in patches:
        assert patch.path.startswith(f"{patch.label}/")
        assert patch.mpp == pytest.approx(0.4862 if patch.data_provider == "radboud" else 0.5032, abs=1e-3)
        assert patch.tissue >= 0.5


def test_labels_equal_the_masks_at_their_places(settings):
    from data.panda import label_from_mask

    extract(settings)
    for patch in read_manifest(settings.output_dir):
        mask = tifffile.imread(settings.data_dir / "train_label_masks" / f"{patch.slide_id}_mask.tiff", key=0)
        part = mask[patch.y : patch.y + PATCH, patch.x : patch.x + PATCH, 0]
        assert patch.label == label_from_mask(part, patch.data_provider, patch.gleason_score)


def test_patches_hold_the_pixels_of_their_place(settings):
    extract(settings)
    for patch in read_manifest(settings.output_dir)[::7]:
        slide = tifffile.imread(settings.data_dir / "train_images" / f"{patch.slide_id}.tiff", key=0)
        saved = np.asarray(Image.open(settings.output_dir / patch.path))
        assert np.array_equal(saved, slide[patch.y : patch.y + PATCH, patch.x : patch.x + PATCH])


def test_the_folder_is_an_image_folder_of_labels_alone(settings):
    result = extract(settings)
    dataset = ImageFolder(settings.output_dir)
    assert set(dataset.classes) == {patch.label for patch in result.patches}
    assert len(dataset) == len(result.patches)
    overlays = sorted(path.stem for path in overlay_folder(settings.output_dir).iterdir())
    assert overlays == ["aaa1", "aaa2", "aaa3", "bbb1", "bbb2", "bbb3"]


def test_exactly_as_many_as_wanted_and_balanced(settings):
    result = extract(replace(settings, max_patches=25, max_per_slide=6))
    assert len(result.patches) == 25
    assert set(Counter(patch.slide_id for patch in result.patches).values()) == {4, 5}


def test_no_slide_gives_more_than_it_may(settings):
    result = extract(replace(settings, max_per_slide=2))
    assert set(Counter(patch.slide_id for patch in result.patches).values()) == {2}


def test_no_slide_is_on_both_sides_of_the_split(settings):
    sides = {}
    for patch in extract(settings).patches:
        assert sides.setdefault(patch.slide_id, patch.split) == patch.split
    assert set(sides.values()) == {"train", "test"}


def test_the_same_settings_give_the_same_bytes_in_any_number_of_processes(settings, tmp_path):
    first, second = settings, replace(settings, output_dir=tmp_path / "again", workers=2)
    first, second = replace(first, max_patches=20), replace(second, max_patches=20)
    extract(first)
    extract(second)
    assert contents(first.output_dir) == contents(second.output_dir)


def test_another_seed_chooses_other_places(settings, tmp_path):
    one = extract(replace(settings, max_patches=12))
    two = extract(replace(settings, max_patches=12, seed=1, output_dir=tmp_path / "again"))
    assert {patch.path for patch in one.patches} != {patch.path for patch in two.patches}


def test_the_patch_that_does_not_divide_goes_to_a_slide_that_the_seed_decides(settings, tmp_path):
    def larger(seed):
        chosen = replace(settings, max_patches=7, seed=seed, output_dir=tmp_path / f"seed{seed}")
        return [slide for slide, count in Counter(patch.slide_id for patch in extract(chosen).patches).items() if count == 2]

    chosen = [larger(seed) for seed in range(4)]
    assert all(len(slides) == 1 for slides in chosen)
    assert len({slide for slides in chosen for slide in slides}) > 1


def test_masks_may_leave_out_tiles_of_background(settings, tmp_path):
    for path in (settings.data_dir / "train_label_masks").iterdir():
        with tifffile.TiffFile(path) as tiff:
            levels = [page.asarray() for page in tiff.pages]
        with tifffile.TiffWriter(path) as tiff:
            for mask in levels:
                corners = [(y, x) for y in range(0, mask.shape[0], 16) for x in range(0, mask.shape[1], 16)]
                parts = [mask[y : y + 16, x : x + 16] for y, x in corners]
                tiles = (part if part.any() or not number else None for number, part in enumerate(parts))
                tiff.write(tiles, shape=mask.shape, dtype=np.uint8, tile=(16, 16), photometric="rgb", compression="lzw")
    whole = replace(settings_for(write_panda_folder(tmp_path / "whole", SIDE, PATCH), tmp_path), output_dir=tmp_path / "of_whole")
    assert [row.label for row in extract(settings).patches] == [row.label for row in extract(whole).patches]


def test_changes_of_the_manifest_by_hand_survive_the_next_extraction(settings):
    extract(replace(settings, max_patches=12))
    path = settings.output_dir / "patches.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    moved = next(row["slide_id"] for row in rows if row["split"] == "train")
    own = {row["path"]: f"of {row['slide_id']}" for row in rows}
    changed = [row | {"patient": own[row["path"]]} | ({"split": "test"} if row["slide_id"] == moved else {}) for row in rows]
    write_csv(path, list(changed[0]), (row.values() for row in changed))
    for _ in range(2):
        more = extract(settings)
    assert {row.split for row in more.patches if row.slide_id == moved} == {"test"}
    with open(path, newline="") as file:
        assert {row["path"]: row["patient"] for row in csv.DictReader(file) if row["patient"]} == own
    assert len(more.patches) > len(own)
    changed[[row["slide_id"] for row in changed].index(moved)]["split"] = "train"
    assert sum(row["slide_id"] == moved for row in changed) > 1
    write_csv(path, list(changed[0]), (row.values() for row in changed))
    before = contents(settings.output_dir)
    with pytest.raises(UserError, match=f"puts slide {moved} on both sides of the split"):
        extract(settings)
    assert contents(settings.output_dir) == before


def test_a_damaged_manifest_is_written_anew_and_kept(settings, capsys):
    first = extract(settings)
    (settings.output_dir / "patches.csv").write_text("path;split\na;b\n")  # as a spreadsheet may
    assert extract(settings).patches == first.patches == read_manifest(settings.output_dir)
    assert (settings.output_dir / "patches.csv.damaged").read_text() == "path;split\na;b\n"
    assert "it stays as patches.csv.damaged and is written anew" in capsys.readouterr().out


def test_overlays_that_have_no_place_cost_nothing_else(settings, capsys):
    overlay_folder(settings.output_dir).parent.write_text("a file")
    assert len(extract(settings).patches) == 54
    assert "cannot be written, so there are no pictures of slides" in capsys.readouterr().out


def test_folders_beside_the_slides_that_are_closed_to_us_are_none_of_ours(settings, monkeypatch):
    (settings.data_dir / "lost+found").mkdir()
    allowed = os.access
    monkeypatch.setattr("data.patches.slide_files", lambda folder: slide_files(folder) if "lost" not in folder.name else 1 / 0)
    monkeypatch.setattr(os, "access", lambda path, mode: "lost+found" not in str(path) and allowed(path, mode))
    assert len(extract(settings).patches) == 54


def test_an_overlay_that_cannot_be_drawn_costs_no_patch(settings, monkeypatch, capsys):
    draw = cutting._overlay

    def sometimes(picture, extent, mask, span, cuts):
        if (first.x, first.y) in [(item.x, item.y) for item in cuts]:
            raise ValueError("no picture")
        return draw(picture, extent, mask, span, cuts)

    first = next(patch for patch in extract(settings).patches if patch.slide_id == "aaa2")
    monkeypatch.setattr(cutting, "_overlay", sometimes)
    again = extract(replace(settings, output_dir=settings.output_dir.with_name("again")))
    assert "slide aaa2 keeps its patches and has no overlay: " in "".join(capsys.readouterr())
    assert not again.failed and any(patch.slide_id == "aaa2" for patch in again.patches)


def test_running_again_does_nothing_and_changes_nothing(settings):
    extract(settings)
    before = contents(settings.output_dir)
    assert extract(settings).made == 0
    assert contents(settings.output_dir) == before


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.95])
def test_a_run_that_was_cut_off_continues_to_the_same_files(settings, keep):
    """The journal cut anywhere, in the middle of a line too, with files of the unfinished slide lying about."""
    extract(settings)
    before = contents(settings.output_dir)
    journal = settings.output_dir / JOURNAL
    journal.write_bytes(journal.read_bytes()[: int(journal.stat().st_size * keep)])
    (settings.output_dir / "patches.csv").unlink()
    extract(settings)
    assert contents(settings.output_dir) == before


def test_vanished_and_empty_files_are_made_again(settings):
    extract(settings)
    before = contents(settings.output_dir)
    first, second = sorted(settings.output_dir.rglob("*.png"))[:2]
    first.unlink()
    second.write_bytes(b"")
    extract(settings)
    assert contents(settings.output_dir) == before


def test_files_of_a_killed_run_are_removed_and_foreign_ones_are_not(settings):
    extract(replace(settings, max_patches=12))
    known = json.loads((settings.output_dir / JOURNAL).read_text().splitlines()[0])
    chosen = {path.name for path in settings.output_dir.rglob("*.png")}
    x, y = next((x, y) for x, y, *_ in known["candidates"] if f"{known['scan']}_{x}_{y}.png" not in chosen)
    folder = next(settings.output_dir.rglob("*.png")).parent
    ours = [folder / f"{known['scan']}_{x}_{y}.png", folder / f".{known['scan']}_{x}_{y}.png.123.456.tmp"]
    ours += [settings.output_dir / f".{name}.123.456.tmp" for name in ("patches.csv", "extract.json", "failed_slides.csv")]
    ours += [overlay_folder(settings.output_dir) / f".{known['scan']}.jpg.123.456.tmp"]
    foreign = [folder / "mine.png", folder / f"{known['scan']}_1_1.png", settings.output_dir / "notes.txt"]
    foreign += [settings.output_dir / ".decoded-64.npy.123.456.tmp"]  # of a training, which may be writing it
    for path in ours + foreign:
        path.write_bytes(b"x")
    extract(replace(settings, max_patches=12))
    assert not any(path.exists() for path in ours)
    assert all(path.read_bytes() == b"x" for path in foreign)


def test_more_patches_extend_a_folder_to_what_a_fresh_run_gives(settings, tmp_path):
    extract(replace(settings, max_patches=14))
    extract(replace(settings, max_patches=33))
    fresh = replace(settings, max_patches=33, output_dir=tmp_path / "fresh")
    extract(fresh)
    assert contents(settings.output_dir) == contents(fresh.output_dir)


def test_patches_are_not_removed_because_their_slide_is_absent(settings, tmp_path):
    extract(settings)
    before = contents(settings.output_dir)
    slide = settings.data_dir / "train_images" / "aaa1.tiff"
    slide.rename(tmp_path / "aaa1.tiff")
    with pytest.raises(UserError, match=r"1 slide\(s\) that gave \d+ patches .* no longer among the slides \(the first is aaa1\)"):
        extract(settings)
    assert contents(settings.output_dir) == before
    (tmp_path / "aaa1.tiff").rename(slide)
    extract(settings)
    assert contents(settings.output_dir) == before


def test_patches_that_were_set_aside_stay_away_and_others_take_their_place(settings):
    settings = replace(settings, max_patches=20)
    extract(settings)
    first, second, *_ = sorted(settings.output_dir.rglob("*.png"))
    aside = first.relative_to(settings.output_dir).as_posix()
    set_aside(settings.output_dir, {aside: "a copy"})
    again = extract(settings)
    assert len(again.patches) == 20 and again.made == 1 and again.rejected["set aside by check_data.py"] == 1
    assert not first.exists() and aside not in {patch.path for patch in again.patches}
    for path in settings.output_dir.rglob(f"{second.stem.rsplit('_', 2)[0]}_*.png"):
        path.unlink()  # so that the slide is cut anew, past the place that was set aside
    third = extract(settings)
    assert {patch.path for patch in third.patches} == {patch.path for patch in again.patches} and not first.exists()


def test_a_patch_brought_back_from_quarantine_with_its_row_stays(settings):
    settings = replace(settings, max_patches=20)
    rows = extract(settings).patches
    set_aside(settings.output_dir, {rows[0].path: "a copy"})
    extract(settings)
    (quarantine_folder(settings.output_dir) / rows[0].path).rename(settings.output_dir / rows[0].path)
    write_manifest(settings.output_dir, [*read_manifest(settings.output_dir), rows[0]])
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches.Run, "scan", lambda self: 1 / 0)  # stopped before it is cut anew
        extract(settings)
    assert extract(settings).patches == rows
    again = extract(settings)
    assert again.patches == rows and not again.made and (settings.output_dir / rows[0].path).exists()


def test_slides_that_arrive_later_move_no_other_to_the_other_side(settings, tmp_path):
    later = [settings.data_dir / "train_images" / "bbb1.tiff"]  # by itself it would be held out instead of the one that was
    for path in later:
        path.rename(tmp_path / path.name)
    before = {patch.slide_id: patch.split for patch in extract(replace(settings, max_patches=10)).patches}
    for path in later:
        (tmp_path / path.name).rename(path)
    after = {patch.slide_id: patch.split for patch in extract(replace(settings, max_patches=60)).patches}
    assert before.items() < after.items() and set(before.values()) == set(after.values()) == {"train", "test"}


def test_patches_that_were_given_up_for_later_slides_come_again_once(settings, tmp_path):
    later = sorted((settings.data_dir / "train_images").glob("bbb*.tiff"))
    for path in later:
        path.rename(tmp_path / path.name)
    assert len(extract(replace(settings, max_patches=12)).patches) == 12
    for path in later:
        (tmp_path / path.name).rename(path)
    assert len(extract(replace(settings, max_patches=12)).patches) == 12
    everything = extract(replace(settings, max_patches=60)).patches
    assert len({patch.path for patch in everything}) == len(everything) == 54


def test_a_refused_run_leaves_the_settings_of_the_running_one(settings):
    fcntl = pytest.importorskip("fcntl")
    extract(replace(settings, max_patches=10))
    before = contents(settings.output_dir)
    with open(settings.output_dir / JOURNAL, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another extraction is running"):
            extract(replace(settings, max_patches=20))
    assert contents(settings.output_dir) == before


def test_slides_that_were_moved_as_a_whole_are_gone_on_with(settings, tmp_path):
    before = [patch.path for patch in extract(settings).patches]
    again = replace(settings, data_dir=settings.data_dir.rename(tmp_path / "elsewhere"))
    result = extract(again)
    assert [patch.path for patch in result.patches] == before and result.made == 0
    other = replace(again, data_dir=shutil.copytree(again.data_dir, tmp_path / "copy"))
    with pytest.raises(UserError, match="was made with data_dir .*elsewhere"):
        extract(other)


def test_a_slide_that_changed_is_extracted_anew(settings, tmp_path):
    extract(settings)
    write_pyramid(settings.data_dir / "train_images" / "aaa1.tiff", draw_slide(77, SIDE), 0.4862)
    extract(settings)
    fresh = replace(settings, output_dir=tmp_path / "fresh")
    extract(fresh)
    assert contents(settings.output_dir) == contents(fresh.output_dir)


def change_row(settings, slide_id, **cells):
    table = settings.data_dir / "train.csv"
    with open(table, newline="") as file:
        rows = [row | cells if row["image_id"] == slide_id else row for row in csv.DictReader(file)]
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_labels_follow_a_corrected_train_csv(settings, tmp_path):
    sides = {patch.slide_id: patch.split for patch in extract(settings).patches}
    change_row(settings, "bbb2", isup_grade="1", gleason_score="3+3")
    result = extract(settings)
    fresh = extract(replace(settings, output_dir=tmp_path / "fresh"))
    found = {patch.path for patch in result.patches}
    assert found == {patch.path for patch in fresh.patches} and any(path.startswith("gleason3/bbb2") for path in found)
    assert not list((settings.output_dir / "gleason4").glob("bbb2*")) and result.made < len(result.patches)
    assert {patch.slide_id: patch.split for patch in result.patches} == sides


def test_a_slide_that_breaks_later_takes_no_patches_with_it(settings):
    extract(settings)
    before, slide = contents(settings.output_dir), settings.data_dir / "train_images" / "aaa1.tiff"
    whole = slide.read_bytes()
    slide.write_bytes(whole[:9_000])
    with pytest.raises(UserError, match=r"1 slide\(s\) that gave patches .* can no longer be read"):
        extract(settings)
    assert contents(settings.output_dir) == before
    slide.write_bytes(whole)
    extract(settings)
    assert contents(settings.output_dir) == before


def test_a_region_that_cannot_be_read_costs_no_patch_that_there_was(settings, tmp_path, capsys):
    settings = replace(settings, max_patches=12)
    sound = extract(replace(settings, output_dir=tmp_path / "sound"))
    before = [patch for patch in sound.patches if patch.slide_id == "bbb1"]
    break_tiles(settings.data_dir / "train_images" / "bbb1.tiff", before)
    assert extract(settings).patches == sound.patches
    result = extract(replace(settings, max_patches=30))
    assert [(failure.slide_id, failure.stage) for failure in result.failed] == [("bbb1", "cut")]
    assert [patch for patch in result.patches if patch.slide_id == "bbb1"] == before and len(result.patches) == 30
    assert all((settings.output_dir / patch.path).exists() for patch in result.patches)
    assert "slide bbb1 gives no more than the 2 patches that it gave before" in capsys.readouterr().out
    assert extract(replace(settings, max_patches=30)).patches == result.patches


@pytest.mark.parametrize("lost", ["train_label_masks", "train.csv"])
def test_labels_are_not_lost_with_the_masks_or_the_table(settings, lost, tmp_path):
    extract(settings)
    before = contents(settings.output_dir)
    (settings.data_dir / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"slide\(s\) that gave labelled patches .* no longer have a mask, or a row in train.csv"):
        extract(settings)
    assert contents(settings.output_dir) == before
    (tmp_path / "elsewhere").rename(settings.data_dir / lost)
    extract(settings)
    assert contents(settings.output_dir) == before


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such names")
def test_slides_with_names_of_another_encoding_are_left_out_and_said(settings, capsys):
    slide = settings.data_dir / "train_images" / "aaa1.tiff"
    shutil.copy(slide, os.fsencode(slide.parent) + b"/Pr\344parat.tiff")
    result = extract(settings)
    assert len(result.patches) == 6 * 9 and not result.failed
    assert "1 slide(s) left out whose names are no plain text, rename them: Pr\\udce4parat.tiff" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "train_images", "train_label_masks/patches"])
def test_patches_do_not_go_among_the_slides(settings, below):
    before = set(settings.data_dir.rglob("*"))
    with pytest.raises(UserError, match="where the slides are; name another --output_dir"):
        extract(replace(settings, output_dir=settings.data_dir / below))
    assert {path for path in settings.data_dir.rglob("*") if path.is_file()} == {path for path in before if path.is_file()}


def test_what_was_deleted_by_hand_stays_away_once_that_is_told(settings):
    settings = replace(settings, max_patches=20)
    extract(settings)
    first = min(settings.output_dir.rglob("*.png"))
    first.unlink()
    set_aside(settings.output_dir, {})
    again = extract(settings)
    assert len(again.patches) == 20 and again.made == 1 and not first.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed 0; use the same settings"),
        ({"min_tissue": 0.7}, "min_tissue"),
        ({"max_patches": 5}, "max_patches 10; use at least as many"),
    ],
)
def test_other_settings_in_a_used_folder_are_refused(settings, change, named):
    extract(replace(settings, max_patches=10))
    before = contents(settings.output_dir)
    with pytest.raises(UserError, match=f"{named}.*another --output_dir"):
        extract(
            replace(settings, max_patches=10, **{"seed": 0, **change})
            if "max_patches" not in change
            else replace(settings, **change)
        )
    assert contents(settings.output_dir) == before


def test_a_folder_with_strange_patches_is_refused(settings):
    (settings.output_dir / "benign").mkdir(parents=True)
    with pytest.raises(UserError, match="no extract.json"):
        extract(settings)


def test_two_runs_in_one_folder_are_refused(settings):
    fcntl = pytest.importorskip("fcntl")
    settings.output_dir.mkdir()
    with open(settings.output_dir / JOURNAL, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another extraction is running"):
            extract(settings)


def test_a_bad_slide_is_recorded_and_the_rest_goes_on(settings, tmp_path):
    images, masks = settings.data_dir / "train_images", settings.data_dir / "train_label_masks"
    (images / "aaa1.tiff").write_bytes(b"no slide")
    (images / "aaa2.tiff").write_bytes((images / "aaa3.tiff").read_bytes()[:9_000])
    write_pyramid(masks / "bbb1_mask.tiff", np.zeros((256, 256, 3), np.uint8), compression="lzw")
    write_pyramid(masks / "bbb2_mask.tiff", np.full((SIDE, SIDE, 3), 77, np.uint8), compression="lzw")
    result = extract(settings)
    with open(settings.output_dir / "failed_slides.csv", newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"aaa1", "aaa2", "bbb1", "bbb2"}
    assert "256 x 256" in rows["bbb1"]["reason"]
    assert "77" in rows["bbb2"]["reason"]
    assert rows["bbb2"]["stage"] == "mask"
    assert {patch.slide_id for patch in result.patches} == {"aaa3", "bbb3"}
    assert report(settings, result) == 1


def test_a_slide_that_breaks_while_it_is_cut_gives_nothing_and_others_make_up_for_it(settings):
    break_tiles(settings.data_dir / "train_images" / "bbb1.tiff", keep=())
    result = extract(replace(settings, max_patches=30))
    assert [(failure.slide_id, failure.stage) for failure in result.failed] == [("bbb1", "cut")]
    assert len(result.patches) == 30
    assert not any(patch.slide_id == "bbb1" for patch in result.patches)
    assert not list(settings.output_dir.rglob("bbb1*"))


def test_blurred_slides_are_replaced_by_others_and_named(settings):
    import scipy.ndimage

    blurred = scipy.ndimage.gaussian_filter(draw_slide(1, SIDE), (5, 5, 0))
    write_pyramid(settings.data_dir / "train_images" / "aaa2.tiff", blurred, 0.4862)
    result = extract(replace(settings, max_patches=30))
    assert len(result.patches) == 30
    assert "blur" in result.empty["aaa2"]
    assert result.rejected["blur"] >= 6


def test_a_blank_slide_is_a_warning_with_its_cause(settings, capsys):
    write_pyramid(settings.data_dir / "train_images" / "aaa1.tiff", np.full((SIDE, SIDE, 3), 255, np.uint8), 0.4862)
    result = extract(settings)
    assert result.empty == {"aaa1": "no tissue found"}
    assert report(settings, result) == 0
    assert "aaa1 gives no patch: no tissue found" in capsys.readouterr().out


def test_slides_missing_known_bad_or_named_twice_are_left_out_and_said(settings):
    bad = "3790f55cad63053e956fb73027179707"
    with open(settings.data_dir / "train.csv", "a") as file:
        file.write(f"gone,radboud,0,negative\n{bad},karolinska,0,0+0\naaa1,radboud,5,5+5\n")
    write_pyramid(settings.data_dir / "train_images" / f"{bad}.tiff", draw_slide(9, SIDE), 0.5)
    result = extract(settings)
    assert sum(result.left_out.values()) == 3
    assert any("not on the disk" in reason for reason in result.left_out)
    assert not any(patch.slide_id == bad for patch in result.patches)
    assert {patch.isup_grade for patch in result.patches if patch.slide_id == "aaa1"} == {0}


def test_a_slide_without_mask_or_without_row_stays_unlabelled(settings):
    (settings.data_dir / "train_label_masks" / "aaa1_mask.tiff").unlink()
    (settings.data_dir / "train_images" / "aaa2.tiff").rename(settings.data_dir / "train_images" / "stranger.tiff")
    patches = extract(settings).patches
    by_slide = {patch.slide_id: patch for patch in patches if patch.label == "unlabelled"}
    assert by_slide["aaa1"].data_provider == "radboud"
    assert (by_slide["stranger"].data_provider, by_slide["stranger"].isup_grade) == ("", None)


def test_missing_masks_are_said(settings, capsys):
    (settings.data_dir / "train_label_masks" / "aaa1_mask.tiff").rename(settings.data_dir / "train_label_masks" / "aaa1_mask.tif")
    extract(settings)
    assert "1 slide(s) of train.csv have no train_label_masks/ID_mask.tiff" in capsys.readouterr().out


def test_masks_of_an_unknown_hospital_are_said(settings, capsys):
    change_row(settings, "aaa1", data_provider="uke")
    extract(settings)
    assert "masks of uke are not read" in capsys.readouterr().out


def test_slides_in_sub_folders_are_said(tmp_path, capsys):
    write_pyramid(tmp_path / "slides" / "batch1" / "a.tiff", draw_slide(1, SIDE), None)
    with pytest.raises(UserError, match="1 file.* lie in batch1; name another folder"):
        extract(settings_for(tmp_path / "slides", tmp_path))
    write_pyramid(tmp_path / "slides" / "b.tiff", draw_slide(1, SIDE), None)
    extract(settings_for(tmp_path / "slides", tmp_path))
    assert "1 file(s) named like slides lie in batch1" in capsys.readouterr().out


def test_what_fell_short_and_mixed_magnifications_are_said(tmp_path, capsys):
    for name, mpp in (("a", 0.25), ("b", 0.5)):
        write_pyramid(tmp_path / "slides" / f"{name}.tiff", draw_slide(1, SIDE), mpp)
    settings = settings_for(tmp_path / "slides", tmp_path, max_per_slide=2)
    report(settings, extract(settings))
    said = capsys.readouterr().out
    assert "--max_per_slide 2 allows no more" in said and "no more usable tissue" not in said
    assert "0.25 to 0.5 micrometres a pixel; --mpp 0.5" in said


def test_a_tiff_of_strips_is_called_what_it_is(tmp_path):
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(tmp_path / "slides" / "strips.tiff", draw_slide(1, SIDE), photometric="rgb", compression="deflate")
    write_pyramid(tmp_path / "slides" / "good.tiff", draw_slide(1, SIDE), None)
    (failure,) = extract(settings_for(tmp_path / "slides", tmp_path)).failed
    assert failure.slide_id == "strips" and "a TIFF that OpenSlide does not read" in failure.reason


def test_any_folder_of_slides_works_unlabelled(tmp_path):
    folder = tmp_path / "slides"
    for name in ("a slide.tiff", "ü.tif", "b.tiff", "b.svs"):
        write_pyramid(folder / name, draw_slide(1, SIDE), None)
    (folder / "readme.txt").write_text("not a slide")
    result = extract(settings_for(folder, tmp_path))
    assert {patch.label for patch in result.patches} == {"unlabelled"}
    assert {patch.slide_id for patch in result.patches} == {"a slide", "ü", "b", "b.tiff"}
    assert len({patch.path for patch in result.patches}) == len(result.patches) == 4 * 9
    assert all(patch.path.isascii() and " " not in patch.path for patch in result.patches)


def test_an_empty_or_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        extract(settings_for(tmp_path / "nowhere", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no slides"):
        extract(settings_for(tmp_path / "empty", tmp_path))


def test_level_and_mpp_give_patches_of_that_scale(settings, tmp_path):
    coarse = extract(replace(settings, level=1, patch_size=32))
    assert {patch.level for patch in coarse.patches} == {1}
    assert all(patch.x % 4 == patch.y % 4 == 0 for patch in coarse.patches)
    assert coarse.patches[0].mpp == pytest.approx(4 * 0.4862, abs=0.01) or coarse.patches[0].mpp == pytest.approx(
        4 * 0.5032, abs=0.01
    )
    same = extract(replace(settings, mpp=0.6, patch_size=64, output_dir=tmp_path / "mpp", format="jpg"))
    assert {patch.mpp for patch in same.patches} == {0.6}
    image = Image.open(tmp_path / "mpp" / same.patches[0].path)
    assert (image.size, image.format) == ((64, 64), "JPEG")


def test_a_killed_run_continues_to_the_same_files(settings, tmp_path):
    undisturbed = replace(settings, output_dir=tmp_path / "undisturbed")
    extract(undisturbed)
    command = command_for(settings)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while len(list(settings.output_dir.rglob("*.png"))) < 12 and time.monotonic() < end and process.poll() is None:
        time.sleep(random.uniform(0.005, 0.02))
    process.kill()
    process.wait()
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert contents(settings.output_dir) == contents(undisturbed.output_dir)


def test_a_signal_ends_it_with_its_code_and_without_traceback(settings):
    command = command_for(settings)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not (settings.output_dir / JOURNAL).exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "flags",
    [["--mpp", "0.5", "--level", "0"], ["--min_tissue", "2"], ["--max_patches", "0"], ["--patch_size", "5"], ["--format", "bmp"]],
)
def test_bad_flags_leave_with_two(flags, capsys):
    with pytest.raises(SystemExit) as leaving:
        extract_patches.parse_arguments(flags)
    assert leaving.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_modules_import_without_openslide():
    code = "import sys; sys.modules['openslide'] = None; import data.patches, data.slides"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


@pytest.mark.skipif(not REAL.is_dir(), reason="real slides are not at hand")
def test_tiles_and_openslide_agree_on_real_slides():
    from data.slides import Slide

    first = sorted((REAL / "prostate_slides" / "train_images").glob("*.tiff"))[0]
    for path in (first, *(REAL / "small_slides").glob("*.svs")):
        with Slide(path) as fast, Slide(path, fast=False) as slow:
            for x, y in ((0, 0), (333, 777), (1500, 1200)):
                assert np.array_equal(fast.read(0, x, y, 512, 512), slow.read(0, x, y, 512, 512))
