"""check_data.py as a user runs it: exit codes, what is printed, the report, hostile names, slides with one fault of each kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import check_data
from check_data import check_patches
from common.cli import run
from common.errors import UserError
from data import quality, quality_report
from data.journal import Journal
from data.quality import find_folders, list_folder, scan_folder
from data.shards import pack
from data.workers import WorkerDied
from tests.conftest import draw_mask, draw_slide, write_pyramid
from tests.unit.test_quality import SIDE, judge, make_folder, row, save, tissue, write_manifest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def check(tmp_path, monkeypatch, capsys) -> Callable[..., Outcome]:
    """``check(*arguments)`` runs check_data.py in tmp_path, without worker processes and without drawing histograms."""
    monkeypatch.setattr(quality_report, "_plots", lambda _: [])

    def call(*arguments: str) -> Outcome:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["check_data.py", "--workers", "0", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run(check_data.main)
        return Outcome(leaving.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def report(check, tmp_path) -> Callable[..., tuple[int, dict[str, list[str]]]]:
    """``report(*arguments)`` gives the exit code and, of all folders together, the items by check."""

    def call(*arguments: str) -> tuple[int, dict[str, list[str]]]:
        code = check("--out", "out", *arguments).returncode
        data = json.loads((tmp_path / "out" / "report.json").read_text())
        assert data["broken"] == (code == 1)
        return code, {item["check"]: item["items"] for part in data["folders"] for item in part["findings"]}

    return call


class Page(HTMLParser):
    """Collects tags and text; self-contained means that nothing is fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data):
        self.words.append(data)


# ----------------------------------------------------------------------------------------------------------- the command


def test_without_data_it_says_what_to_run_next(tmp_path, check):
    result = check()
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "extract_patches.py" in result.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("arguments", [["--patches", "nowhere"], ["--slides", "a_file"], ["--out", "a_file", "--patches", "good"]])
def test_folders_that_are_none_get_one_sentence(tmp_path, arguments, check):
    (tmp_path / "a_file").write_text("x")
    make_folder(tmp_path / "good", 2)
    result = check(*arguments)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_sound_data_below_datasets_passes(tmp_path, tiny_slides, check):
    slides = tiny_slides()
    (tmp_path / "datasets").mkdir()
    slides.rename(tmp_path / "datasets" / "panda")
    make_folder(tmp_path / "datasets" / "patches")
    result = check()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 slides, 6 rows in train.csv" in result.stdout
    assert "8 patches of 2 slides, 8 fit for training" in result.stdout
    page = Page((tmp_path / "logs" / "check_data" / "report.html").read_text())
    assert all(source.startswith("data:") for source in page.sources)
    assert page.tags.count("img") == 8
    assert "script" not in page.tags


def test_folders_are_found_by_what_they_hold(tmp_path):
    for name in ("a/train.csv", "b/train_images/x.tiff", "c/deep/patches.csv", "d/gleason3/x.png", "e/other/x.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "d_quarantine" / "gleason3").mkdir(parents=True)
    slides, patches = find_folders(tmp_path)
    assert {path.name for path in slides} == {"a", "b"}
    assert {path.name for path in patches} == {"deep", "d"}


def test_folders_are_found_behind_links_below_slides_and_with_their_split(tmp_path):
    for name in (
        "root/own/train/benign/x.png",
        "root/own/test/benign/y.png",
        "root/slides/x.svs",
        "root/slides/patches/benign/x.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("slides/streaming/train_images", "slides/train_images/benign"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "elsewhere" / "gleason3").mkdir(parents=True)
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "round").symlink_to(tmp_path / "root")
    slides, patches = find_folders(tmp_path / "root")
    assert find_folders(tmp_path / "root" / "own") == ([], [tmp_path / "root" / "own"])
    assert [path.name for path in slides] == ["slides"]
    assert [path.relative_to(tmp_path / "root").as_posix() for path in patches] == ["linked", "own", "slides/patches"]


def test_a_split_of_patches_beside_slides_does_not_swallow_them(tmp_path, check):
    for name in ("panda/train.csv", "train/benign/x.png", "test/benign/y.png"):
        (tmp_path / "datasets" / name).parent.mkdir(parents=True)
        (tmp_path / "datasets" / name).touch()
    slides, patches = find_folders(tmp_path / "datasets")
    assert [path.name for path in slides] == ["panda"] and [path.name for path in patches] == ["test", "train"]
    outcome = check("--patches", "datasets", "--quarantine")
    assert outcome.returncode == 1 and (tmp_path / "datasets" / "panda" / "train.csv").exists()


# --------------------------------------------------------------------------------------------------------------- patches


def test_one_planted_fault_of_each_kind_is_named(tmp_path, report):
    folder = tmp_path / "patches"
    rows = make_folder(folder, 14)
    paths = [patch.path for patch in rows]
    (folder / paths[0]).write_bytes((folder / paths[0]).read_bytes()[:500])
    save(folder / paths[1], tissue(1).convert("L"))
    save(folder / paths[2], Image.new("RGB", (SIDE, SIDE), "white"))
    save(folder / paths[3], tissue(3, 64))
    save(folder / paths[4], tissue(6))
    (folder / paths[5]).unlink()
    (folder / paths[5]).mkdir()
    (folder / paths[7]).unlink()
    (folder / paths[7]).symlink_to("/nowhere")
    (folder / paths[8]).unlink()
    save(folder / "gleason4/stray_0_0.png", tissue(99))
    save(folder / paths[9], tissue(9).convert("RGBA"))
    (folder / "gleason4" / "line\nbreak.png").write_bytes(b"x")
    (folder / "gleason4" / "notes.txt").write_text("x")
    code, found = report("--patches", "patches")
    assert code == 1
    expected = {"damaged": 0, "no_colour": 1, "blank": 2, "odd_size": 3, "missing_files": 8, "mode": 9}
    assert all(found[name][0].startswith(paths[index]) for name, index in expected.items())
    assert found["duplicate"] == [f"{paths[6]}: same pixels as {paths[4]}"]
    assert {item.split(":")[0] for item in found["not_a_file"]} == {paths[5], paths[7]}
    assert found["stray_files"] == ["gleason4/line\\nbreak.png", "gleason4/stray_0_0.png"]
    assert found["name"] == ["gleason4/line\\nbreak.png"]
    assert found["other_files"] == ["gleason4/notes.txt"]


def test_quarantine_moves_nothing_from_behind_a_link(tmp_path, report, capsys):
    rows = make_folder(tmp_path / "patches", 10)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a_0_0.png").write_bytes(b"x")
    (tmp_path / "patches" / "gleason3").symlink_to(tmp_path / "disk")
    (tmp_path / "patches" / "patches.csv").unlink()
    (tmp_path / "patches" / rows[0].path).write_bytes(b"x")
    with pytest.raises(UserError, match="gleason3/a_0_0.png lies behind a link, where --quarantine moves nothing"):
        check_patches(tmp_path / "patches", 0, True)
    assert (tmp_path / "disk" / "a_0_0.png").exists() and (tmp_path / "patches" / rows[0].path).exists()
    (tmp_path / "disk" / "a_0_0.png").unlink()
    assert rows[0].path not in check_patches(tmp_path / "patches", 0, True).scans


def test_quarantine_then_nothing_is_broken(tmp_path, report):
    folder = tmp_path / "patches"
    rows = make_folder(folder, 10)
    (folder / rows[0].path).write_bytes(b"x")
    (folder / rows[1].path).unlink()
    assert report("--patches", "patches")[0] == 1
    assert not (tmp_path / "patches_quarantine").exists()
    code, found = report("--patches", "patches", "--quarantine")
    assert code == 0
    assert "damaged" not in found
    assert (tmp_path / "patches_quarantine" / rows[0].path).read_bytes() == b"x"
    assert report("--patches", "patches")[0] == 0


def test_quarantine_during_an_extraction_is_refused_before_the_long_look(tmp_path, check, monkeypatch):
    folder = tmp_path / "patches"
    (folder / make_folder(folder)[0].path).write_bytes(b"x")
    before = (folder / "patches.csv").read_bytes()
    monkeypatch.setattr(check_data, "scan_patch_folder", lambda *_: pytest.fail("it looked at every patch first"))
    with Journal(folder):
        result = check("--patches", "patches", "--quarantine")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: an extraction into patches ")
    assert (folder / "patches.csv").read_bytes() == before and not (tmp_path / "patches_quarantine").exists()


def test_the_report_of_shards_shows_their_patches(tmp_path, check):
    pytest.importorskip("pyarrow")
    make_folder(tmp_path / "patches")
    pack(tmp_path / "patches", tmp_path / "shards")
    assert check("--patches", "shards").returncode == 0
    page = Page((tmp_path / "logs" / "check_data" / "report.html").read_text())
    assert page.tags.count("img") == 8 and all(source.startswith("data:image/jpeg") for source in page.sources)


def test_hostile_names_reach_neither_terminal_nor_page(tmp_path, check):
    folder = tmp_path / "patches"
    make_folder(folder)
    hostile = "<img src=x onerror=alert(1)>"
    save(folder / "gleason4" / f"{hostile}.png", tissue(50))
    save(folder / "<script>alert(1)<" / "script>.png", tissue(51))
    (folder / "gleason4" / "\x1b[31mred.png").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(folder) + b"/gleason4/\xff.png")).write_bytes(b"x")
    result = check("--patches", "patches")
    assert result.returncode == 1
    assert "\x1b" not in result.stdout
    page = Page((tmp_path / "logs" / "check_data" / "report.html").read_text())
    assert "script" not in page.tags
    assert all(source.startswith("data:") for source in page.sources)
    assert any(hostile in words for words in page.words)


def test_a_provider_named_like_a_formula_is_drawn_all_the_same(tmp_path):
    rows = make_folder(tmp_path / "patches", 2)
    write_manifest(tmp_path / "patches", [row(patch.path, data_provider=r"$\frac") for patch in rows])
    quality_report.write_report(tmp_path, [judge(tmp_path / "patches")], "made here")
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/svg+xml;base64,") == 5
    assert "rows with an unknown provider" in text


def test_a_plain_folder_of_images_is_checked_too(tmp_path, report):
    for k in range(3):
        save(tmp_path / "images" / f"{k}.jpg", tissue(k))
    code, found = report("--patches", "images")
    assert code == 0
    assert set(found) == {"no_manifest", "amount"}


def test_an_empty_folder_is_broken(tmp_path, report):
    (tmp_path / "patches").mkdir()
    assert "empty" in report("--patches", "patches")[1]


# ---------------------------------------------------------------------------------------------------------------- slides


def test_one_planted_fault_of_each_kind_in_slides_is_named(tmp_path, tiny_slides, report):
    folder = tiny_slides()
    images, masks = folder / "train_images", folder / "train_label_masks"
    (images / "aaa1.tiff").write_bytes((images / "aaa1.tiff").read_bytes()[:-2000])
    write_pyramid(masks / "aaa2_mask.tiff", draw_mask((7, 7, 7, 7)), 0.5, "lzw")
    (masks / "aaa3_mask.tiff").unlink()
    write_pyramid(masks / "bbb1_mask.tiff", draw_mask((1, 1, 1, 1), 512), 0.5, "lzw")
    write_pyramid(masks / "bbb2_mask.tiff", draw_mask((0, 0, 0, 0)), 0.5, "lzw")
    write_pyramid(masks / "gone_mask.tiff", draw_mask((0, 0, 0, 0), 512), 0.5, "lzw")
    write_pyramid(images / "bbb3.tiff", draw_slide(9), 4.0)
    write_pyramid(images / "odd.tiff", draw_slide(10), None)
    write_pyramid(images / "3790f55cad63053e956fb73027179707.tiff", np.full((1024, 1024, 3), 255, np.uint8), 0.5)
    (images / "text.tiff").write_text("not a slide")
    (images / "folder.tiff").mkdir()
    with open(folder / "train.csv", "a") as file:
        file.write("bbb3,karolinska,3,3+4\nccc1,radboud,0,0+0\nccc2,elsewhere,1,3+3\nccc3,radboud,1,seven\nbbb2,karolinska,4,4+4\n")
    code, found = report("--slides", "panda")
    assert code == 1
    unreadable = {item.split(":")[0]: item for item in found["unreadable"]}
    assert set(unreadable) == {"aaa1", "text", "folder"}
    assert "aaa2 (radboud): values 7" in found["mask_values"][0]
    assert "aaa3" in found["no_mask"]
    assert found["mask_size"] == ["bbb1: mask 512 x 512, slide 1024 x 1024"]
    assert found["blank_mask"] == ["bbb2"]
    assert found["stray_masks"] == ["gone_mask.tiff"]
    assert found["odd_mpp"] == ["bbb3: 4"]
    assert "odd" in found["no_mpp"]
    assert found["no_tissue"] == ["3790f55cad63053e956fb73027179707: 0.00% stained"]
    assert found["known_bad"] == ["3790f55cad63053e956fb73027179707: blank slide, no tissue"]
    assert found["contradictory_rows"] == ["bbb3"]
    assert found["repeated_rows"] == ["bbb2"]
    assert found["grade_mismatch"] == ["bbb3: score 3+4 means grade 2, the row says 3"]
    assert found["spelling"] == ["ccc1: '0+0' by radboud"]
    assert found["unknown_provider"] == ["ccc2: 'elsewhere'"]
    assert found["no_score"] == ["ccc3: 'seven'"]
    assert found["not_fetched"] == ["ccc1", "ccc2", "ccc3"]
    assert "odd" in found["no_row"]


def test_slides_without_any_mask_are_named_where_the_table_promises_them(tmp_path, tiny_slides, report):
    folder = tiny_slides()
    (folder / "train_label_masks").rename(tmp_path / "elsewhere")
    code, found = report("--slides", "panda")
    assert code == 0 and found["no_mask"] == ["aaa1", "aaa2", "aaa3", "bbb1", "bbb2", "bbb3"]


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such names")
def test_a_slide_named_in_another_encoding_is_named(tmp_path, tiny_slides, report):
    images = tiny_slides() / "train_images"
    os.rename(images / "aaa1.tiff", os.fsencode(images) + b"/Pr\344parat.tiff")
    code, found = report("--slides", "panda")
    assert code == 1 and found["name"] == ["Pr\\udce4parat.tiff"]


def test_sound_slides_have_no_finding(tmp_path, tiny_slides, report):
    tiny_slides()
    assert report("--slides", "panda") == (0, {})


@pytest.mark.parametrize("tenth", range(1, 10))
def test_a_slide_cut_anywhere_is_found(tiny_slides, tenth):
    from data.quality_slides import scan_slide

    path = tiny_slides() / "train_images" / "aaa1.tiff"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenth // 10])
    scan = scan_slide((path, None))
    assert scan.error or scan.truncated


def test_masks_saved_with_loss_are_found(tmp_path, tiny_slides, report):
    folder = tiny_slides()
    write_pyramid(folder / "train_label_masks" / "aaa2_mask.tiff", draw_mask((4, 5, 4, 5)) * 40, 0.5, "jpeg")
    assert "aaa2" in report("--slides", "panda")[1]["mask_values"][0]


def test_a_damaged_train_csv_is_one_finding(tmp_path, tiny_slides, report):
    (tiny_slides() / "train.csv").write_text("image_id,data_provider,isup_grade,gleason_score\n../../etc/passwd,radboud,1,3+3\n")
    code, found = report("--slides", "panda")
    assert code == 1
    assert "line 2" in found["csv_damaged"][0]


def test_without_openslide_slides_are_reported_as_not_checked(tmp_path, tiny_slides, monkeypatch):
    tiny_slides()
    (tmp_path / "shadow" / "openslide").mkdir(parents=True)
    (tmp_path / "shadow" / "openslide" / "__init__.py").write_text("raise ModuleNotFoundError('No module named openslide')")
    command = [sys.executable, str(ROOT / "check_data.py"), "--slides", "panda", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'shadow'}"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "6  slides were not opened" in result.stdout


def test_worker_processes_give_the_same_scans(tmp_path):
    make_folder(tmp_path, 8)
    (tmp_path / "gleason4" / "s0_0_0.png").write_bytes(b"x")
    paths = list_folder(tmp_path).images
    assert scan_folder(tmp_path, paths, workers=1) == scan_folder(tmp_path, paths, workers=0)


def test_a_patch_that_kills_its_worker_is_a_fault(tmp_path, monkeypatch):
    make_folder(tmp_path, 3)
    paths = list_folder(tmp_path).images

    def deadly(function, tasks, workers):
        for task in tasks:
            yield task, WorkerDied() if paths[1] in task else function(task)

    monkeypatch.setattr(quality, "run_jobs", deadly)
    scans = scan_folder(tmp_path, paths, workers=1)
    assert [scan.fault for scan in scans.values()] == ["", "damaged", ""]
