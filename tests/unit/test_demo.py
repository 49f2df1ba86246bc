"""Demo slides: PANDA's layout as OpenSlide reads it, masks that agree with the score, same seed same bytes, nothing overwritten."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
from scipy import ndimage

from common.errors import UserError
from data import demo, demo_texture
from data.demo import plan_slide, write_demo_slides
from data.demo_slide import SlidePlan, paint_slide
from data.demo_tissue import Palette, paint_core
from data.panda import MASK_VALUES, gleason_patterns, label_from_mask, read_train_csv

SCRIPT = Path(__file__).resolve().parents[2] / "make_demo_slides.py"
SIZE = 768


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Three slides: Radboud 3+4, Karolinska 5+5, Radboud negative."""
    out = tmp_path_factory.mktemp("demo") / "new" / "slides"
    return out, write_demo_slides(out, 3, SIZE, seed=0, workers=1)


@pytest.fixture(scope="module")
def cores():
    """One core of each pattern, painted with the same palette."""
    palette = Palette.draw(np.random.default_rng(1), 0.4862)
    return {p: paint_core(np.random.default_rng(2), palette, (800, 800), 700, [(1.0, p)]) for p in (0, 3, 4, 5)}


def read(out: Path, record, level: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """RGB image and RGB mask of a whole level."""
    pair = []
    for path in (out / "train_images" / f"{record.slide_id}.tiff", out / "train_label_masks" / f"{record.slide_id}_mask.tiff"):
        with openslide.OpenSlide(path) as slide:
            pair.append(np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB")))
    return tuple(pair)


def test_twelve_plans_cover_every_grade_provider_and_label():
    plans = [plan_slide(0, index) for index in range(12)]
    scores = Counter((plan.provider, plan.score) for plan in plans)
    assert {record[0] for record in scores} == {"karolinska", "radboud"}
    assert {demo.isup_from_gleason(plan.score) for plan in plans} == {0, 1, 2, 3, 4, 5}
    for pattern in (3, 4, 5):
        assert scores["karolinska", f"{pattern}+{pattern}"] == 1  # the only way to a label from a Karolinska mask
    assert sum(plan.blank for plan in plans) == 1
    assert len({plan_slide(seed, index).slide_id for seed in (0, 1) for index in range(24)}) == 48


def test_train_csv_spells_scores_as_the_providers_do(slides):
    out, records = slides
    assert read_train_csv(out / "train.csv") == records
    lines = (out / "train.csv").read_text().splitlines()
    assert lines[3].endswith("radboud,0,negative")
    assert demo._train_csv([plan_slide(0, 7)]).endswith("karolinska,0,0+0\n")


def test_openslide_sees_pandas_pyramids(slides):
    out, records = slides
    for index, record in enumerate(records):
        for path in (out / "train_images" / f"{record.slide_id}.tiff", out / "train_label_masks" / f"{record.slide_id}_mask.tiff"):
            with openslide.OpenSlide(path) as slide:
                assert slide.level_dimensions == ((SIZE, SIZE), (SIZE // 4, SIZE // 4), (SIZE // 16, SIZE // 16))
                assert slide.properties["openslide.level[0].tile-width"] == "512"
                assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(plan_slide(0, index).mpp, rel=1e-4)


def test_masks_hold_the_providers_values_and_are_never_interpolated(slides):
    out, records = slides
    for record in records:
        mask = read(out, record)[1]
        assert not mask[..., 1:].any()
        assert set(np.unique(mask)) <= set(MASK_VALUES[record.data_provider])
        for level, step in ((1, 4), (2, 16)):
            assert np.array_equal(read(out, record, level)[1], mask[step // 2 :: step, step // 2 :: step])


def test_smaller_levels_are_area_means(slides):
    out, records = slides
    image = read(out, records[0])[0].astype(float)
    blocks = image.reshape(SIZE // 16, 16, SIZE // 16, 16, 3).mean((1, 3))
    level = read(out, records[0], 2)[0]
    assert abs(blocks.mean() - level.mean()) < 1  # both went through JPEG, so single pixels differ more
    assert np.corrcoef(blocks.ravel(), level.ravel())[0, 1] > 0.97
    assert np.corrcoef(blocks[:, 1:].ravel(), level[:, :-1].ravel())[0, 1] < 0.9  # a shift by one pixel would be seen


def test_mask_agrees_with_the_score(slides):
    out, records = slides
    for record in records:
        counts = np.bincount(read(out, record)[1][..., 0].ravel(), minlength=6)
        primary, secondary = gleason_patterns(record.gleason_score)
        if record.data_provider == "karolinska":
            assert counts[2] > counts[1] > 0
        elif not primary:
            assert counts[2] > 0
            assert not counts[3:].any()
        else:
            assert counts[primary] > counts[secondary] > 0
            assert set(np.nonzero(counts[3:])[0] + 3) == {primary, secondary}


def test_patches_get_the_labels_that_were_painted(slides):
    out, records = slides
    labels = Counter()
    for record in records:
        mask = read(out, record)[1][..., 0]
        tiles = mask.reshape(SIZE // 256, 256, SIZE // 256, 256).transpose(0, 2, 1, 3).reshape(-1, 256, 256)
        labels.update(label_from_mask(tile, record.data_provider, record.gleason_score) for tile in tiles)
    assert min(labels[name] for name in ("benign", "gleason3", "gleason5")) >= 2


def test_tissue_is_stained_and_the_rest_is_white(slides):
    out, records = slides
    for record in records:
        image, mask = (part.astype(float) for part in read(out, record))
        tissue = ndimage.binary_erosion(mask[..., 0] > 0, iterations=3)
        outside = ~ndimage.binary_dilation(ndimage.binary_fill_holes(mask[..., 0] > 0), iterations=40)
        assert 0.25 < tissue.mean() < 0.8
        red, green, blue = (-np.log((image[tissue][:, channel] + 1) / 250).mean() for channel in range(3))
        assert green > 1.5 * red > 0
        assert green > 1.5 * blue > 0
        if record.isup_grade:  # the other one has pen marks
            assert (image[outside] < 225).mean() < 0.01


def test_epithelium_holds_more_hematoxylin_than_stroma(cores):
    for pattern in (3, 4, 5):
        core = cores[pattern].core
        solid = (core.lumen < 10) & (cores[pattern].tissue > 0.99)
        inside, outside = solid & (core.gland > 0), solid & (core.gland == 0)
        assert cores[pattern].hematoxylin[inside].mean() > 1.5 * cores[pattern].hematoxylin[outside].mean()
        assert cores[pattern].eosin[outside].mean() > 1.5 * cores[pattern].eosin[inside].mean()


def test_architecture_follows_the_pattern(cores):
    lumina, glands, kinds = {}, {}, {}
    for pattern, painted in cores.items():
        core = painted.core
        tissue = painted.tissue > 0.5
        lumina[pattern] = (core.lumen[tissue] > 128).mean()
        sizes = np.bincount(core.gland[tissue])[1:]
        glands[pattern] = np.median(sizes[sizes > 200]) / core.um**2
        kinds[pattern] = max(core.cells, key=lambda kind: sum(map(len, core.cells[kind])) if kind != "spindle" else 0)
    assert lumina[0] > lumina[3] > lumina[5] == 0
    assert lumina[4] > 0.02
    assert glands[0] > 3 * glands[3]
    assert kinds == {0: "luminal", 3: "acinar", 4: "fused", 5: "anaplastic"}
    basal = {pattern: sum(map(len, painted.core.cells["basal"])) for pattern, painted in cores.items()}
    assert basal[0] > 50
    assert not basal[3] + basal[4] + basal[5]


def test_cells_have_the_same_size_in_micrometres_at_every_resolution():
    kind = demo_texture.CELL_KINDS["acinar"]
    areas = [
        demo_texture.cell_sprites(np.random.default_rng(0), kind, 1 / mpp)[:, 2].sum((1, 2)).mean() * mpp**2
        for mpp in (0.452, 0.5032)
    ]
    assert areas[0] == pytest.approx(areas[1], rel=0.05)
    assert 30 < areas[0] < 70


def test_blank_slide_has_no_tissue_and_pen_marks_are_not_tissue():
    blank = SlidePlan("id", "karolinska", "0+0", 0.5032, blank=True)
    image, mask = paint_slide(np.random.default_rng(0), blank, 512)
    assert image.min() > 230
    assert not mask.any()
    marked = SlidePlan("id", "karolinska", "0+0", 0.5032, blank=True, pen=True)
    image, mask = paint_slide(np.random.default_rng(0), marked, 512)
    assert 0.01 < (image.min(2) < 150).mean() < 0.5
    assert not mask.any()


def test_same_bytes_whatever_the_number_of_slides_and_processes(slides, tmp_path):
    out, records = slides
    write_demo_slides(tmp_path, 2, SIZE, seed=0, workers=2)
    for record in records[:2]:
        for name in (f"train_images/{record.slide_id}.tiff", f"train_label_masks/{record.slide_id}_mask.tiff"):
            assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_second_run_keeps_what_is_there_and_draws_what_is_missing(slides):
    out, records = slides
    image = out / "train_images" / f"{records[1].slide_id}.tiff"
    content = image.read_bytes()
    image.unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    assert write_demo_slides(out, 3, SIZE) == records
    assert image.read_bytes() == content
    redrawn = {path for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert redrawn <= {out / "train_label_masks" / f"{records[1].slide_id}_mask.tiff"}
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("settings", [(3, SIZE, 1), (3, 2 * SIZE, 0), (2, SIZE, 0)])
def test_other_settings_are_refused_and_nothing_changes(slides, settings):
    out, _ = slides
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UserError, match="choose another --out"):
        write_demo_slides(out, *settings)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_fewer_slides_than_a_stopped_run_drew_are_refused(slides, tmp_path):
    stopped = shutil.copytree(slides[0], tmp_path / "stopped")
    (stopped / "train.csv").unlink()  # written last
    with pytest.raises(UserError, match="holds more or other slides than asked for"):
        write_demo_slides(stopped, 1, SIZE)


def test_memory_that_is_not_enough_is_one_sentence(tmp_path, monkeypatch):
    def draw(*_):
        raise MemoryError

    monkeypatch.setattr("data.demo.paint_slide", draw)
    with pytest.raises(UserError, match="do not fit the memory"):
        write_demo_slides(tmp_path / "demo", 1, SIZE)


def test_other_peoples_folders_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("image_id,data_provider,isup_grade,gleason_score\n")
    with pytest.raises(UserError, match="not demo slides"):
        write_demo_slides(tmp_path, 1, 512)
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]
    with pytest.raises(UserError, match="cannot be used"):
        write_demo_slides(tmp_path / "train.csv", 1, 512)


@pytest.mark.parametrize("size", ["1000", "256", "x"])
def test_bad_size_is_one_sentence_and_exit_code_2(tmp_path, size):
    command = [sys.executable, str(SCRIPT), "--slide_size", size, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--slide_size" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
