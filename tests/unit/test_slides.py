"""Reading slides: levels, scale, white outside, and the tile reader against OpenSlide."""

import numpy as np
import pytest
import tifffile

from data.slides import Slide, SlideError, aligned, slide_files
from tests.conftest import draw_mask, draw_slide, write_pyramid


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "a.tiff"
    write_pyramid(path, draw_slide(1), mpp=0.5)
    return path


def test_levels_and_scale_come_from_the_file(slide_path):
    with Slide(slide_path) as slide:
        assert [(level.width, level.height, level.downsample) for level in slide.levels] == [
            (1024, 1024, 1.0),
            (256, 256, 4.0),
            (64, 64, 16.0),
        ]
        assert slide.mpp == pytest.approx(0.5)


@pytest.mark.parametrize("mpp", [None, 352.8])
def test_scale_is_unknown_where_the_file_states_none_that_is_plausible(tmp_path, mpp):
    write_pyramid(tmp_path / "a.tiff", draw_slide(1), mpp=mpp)
    with Slide(tmp_path / "a.tiff") as slide:
        assert slide.mpp is None
        with pytest.raises(SlideError, match="micrometres per pixel"):
            slide.reading(mpp=0.5)


@pytest.mark.parametrize("box", [(0, 0, 256, 256), (130, 250, 300, 270), (-40, -30, 100, 90), (1000, 1010, 64, 64)])
@pytest.mark.parametrize("compression", ["jpeg", "lzw", "deflate"])
def test_tile_reader_gives_the_pixels_of_openslide_at_level_0(tmp_path, compression, box):
    path = tmp_path / "a.tiff"
    write_pyramid(path, draw_slide(2), compression=compression)
    with Slide(path) as fast, Slide(path, fast=False) as slow:
        assert 0 in fast._tiles.pages
        assert slow._tiles is None
        assert np.array_equal(fast.read(0, *box), slow.read(0, *box))


@pytest.mark.parametrize("fast", [True, False])
def test_patches_read_together_are_those_read_alone(slide_path, fast):
    places = [(x, y) for y in (-30, 40, 300, 760, 1000) for x in (770, 0, 130, 512, 1000, 2000)]
    with Slide(slide_path, fast=fast) as slide:
        found = dict(slide.patches(slide.reading(), places, 200))
        assert sorted(found) == list(range(len(places)))
        for number, (x, y) in enumerate(places):
            assert np.array_equal(found[number], slide.read(0, x, y, 200, 200))


def test_lossless_pixels_are_read_exactly_at_every_level(tmp_path):
    image = draw_slide(3)
    write_pyramid(tmp_path / "a.tiff", image, compression="lzw")
    for fast in (True, False):
        with Slide(tmp_path / "a.tiff", fast=fast) as slide:
            for level, step in enumerate((1, 4, 16)):
                assert np.array_equal(slide.read(level, 3, 5, 40, 30), image[::step, ::step][5:35, 3:43])


@pytest.mark.parametrize("fast", [True, False])
def test_outside_the_slide_is_white(slide_path, fast):
    with Slide(slide_path, fast=fast) as slide:
        assert (slide.read(0, -300, 0, 256, 256) == 255).all()
        assert (slide.read(1, 200, 250, 100, 100)[10:] == 255).all()


def test_tiles_that_the_file_leaves_out_are_white(tmp_path):
    path = tmp_path / "sparse.tiff"
    tissue = draw_slide(4)[:256, :256]
    tiles = (tissue if i == 0 else None for i in range(16))
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(tiles, shape=(1024, 1024, 3), dtype=np.uint8, tile=(256, 256), photometric="rgb", compression="lzw")
    for fast in (True, False):
        with Slide(path, fast=fast) as slide:
            assert np.array_equal(slide.read(0, 0, 0, 256, 256), tissue)
            assert (slide.read(0, 300, 300, 500, 500) == 255).all()
        with Slide(path, fast=fast, empty=0) as mask:
            assert not mask.read(0, 300, 300, 500, 500).any() and np.array_equal(mask.read(0, 0, 0, 256, 256), tissue)
            assert not mask.read(0, 1000, 1000, 100, 100).any() and not mask.overview(nearest=True)[0][16:].any()
            assert not any(part.any() for _, part in mask.labels([(300, 300), (600, 700)], 200, 200))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"not a slide", "cannot be opened"), (b"II*\0" + b"\0" * 400, "cannot be opened")]
)
def test_what_is_no_slide_is_refused_with_a_reason(tmp_path, content, reason):
    path = tmp_path / "a.tiff"
    path.write_bytes(content)
    with pytest.raises(SlideError, match=reason):
        Slide(path)


def test_a_folder_or_nothing_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.tiff"):
        with pytest.raises(SlideError, match="not a file"):
            Slide(path)


def test_a_damaged_tile_raises_instead_of_giving_other_pixels(slide_path, tmp_path):
    data = bytearray(slide_path.read_bytes())
    with tifffile.TiffFile(slide_path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    data[offset : offset + count] = b"\0" * count
    (tmp_path / "a.tiff").write_bytes(data)
    with Slide(tmp_path / "a.tiff") as slide:
        assert slide.read(0, 0, 0, 200, 200).shape == (200, 200, 3)
        with pytest.raises(SlideError, match="cannot be decoded"):
            slide.read(0, 256, 256, 256, 256)
    with Slide(tmp_path / "a.tiff") as slide, pytest.raises(SlideError, match="cannot be decoded"):
        list(slide.patches(slide.reading(), [(0, 0), (200, 200), (700, 700)], 200))


def test_level_is_checked(slide_path):
    with Slide(slide_path) as slide:
        reading = slide.reading(level=1)
        assert (reading.level, reading.factor, reading.mpp) == (1, 1.0, pytest.approx(2.0))
        with pytest.raises(SlideError, match="level 3 does not exist"):
            slide.reading(level=3)


@pytest.mark.parametrize(("mpp", "level", "factor"), [(0.5, 0, 1), (0.75, 0, 1.5), (2.0, 1, 1), (3.0, 1, 1.5), (0.45, 0, 0.9)])
def test_mpp_is_read_from_the_coarsest_level_that_is_fine_enough(slide_path, mpp, level, factor):
    with Slide(slide_path) as slide:
        reading = slide.reading(mpp=mpp)
        assert (reading.level, reading.factor, reading.mpp) == (level, pytest.approx(factor), mpp)
        with pytest.raises(SlideError, match="too coarse"):
            slide.reading(mpp=0.2)


def test_resampling_keeps_sizes_true(tmp_path):
    """Stripes of 30 um at 0.5 um/pixel are 60 pixels wide; at 0.75 um/pixel they must be 40."""
    image = np.full((1024, 1024, 3), 255, np.uint8)
    image[:, (np.arange(1024) // 60) % 2 == 1] = 0
    write_pyramid(tmp_path / "a.tiff", image, mpp=0.5, compression="lzw")
    with Slide(tmp_path / "a.tiff") as slide:
        ((_, patch),) = slide.patches(slide.reading(mpp=0.75), [(0, 0)], 256)
    expected = np.where((np.arange(256) // 40) % 2 == 1, 0, 255)
    inner = np.abs((np.arange(256) % 40) - 20) < 17
    assert patch.shape == (256, 256, 3)
    assert np.abs(patch[128, inner, 0].astype(int) - expected[inner]).max() <= 25


def test_overview_states_its_scale_and_averages_what_is_left(tmp_path):
    image = draw_slide(5)
    path = tmp_path / "flat.tiff"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, tile=(256, 256), photometric="rgb", compression="lzw")
    with Slide(path) as slide:
        small, scale = slide.overview(16)
        assert (small.shape, scale) == ((64, 64, 3), 16)
        expected = image.reshape(64, 16, 64, 16, 3).mean(axis=(1, 3))
        assert np.abs(small - expected).max() <= 1


def test_overview_of_a_mask_picks_pixels_instead_of_mixing_them(tmp_path):
    path = tmp_path / "mask.tiff"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(draw_mask((2, 5, 3, 4)), tile=(256, 256), photometric="rgb", compression="lzw")
    with Slide(path) as mask:
        assert set(np.unique(mask.overview(16, nearest=True)[0])) == {0, 2, 3, 4, 5}


def test_mask_labels_are_exact(tmp_path):
    mask = draw_mask((2, 5, 3, 4))
    write_pyramid(tmp_path / "mask.tiff", mask, compression="lzw")
    with Slide(tmp_path / "mask.tiff") as slide:
        assert np.array_equal(dict(slide.labels([(0, 0), (400, 410)], 256, 256))[1], mask[410:666, 400:656, 0])
        assert np.array_equal(dict(slide.labels([(128, 128)], 768, 256))[0], mask[128:896:3, 128:896:3, 0])


@pytest.mark.parametrize("downsample", [1.0, 4.0, 4.000605, 16.0093])
def test_aligned_positions_fall_on_whole_pixels_of_the_level(downsample):
    for value in (0.0, 3.3, 1001.7, 30_000.4):
        position = aligned(value, downsample)
        assert abs(position - round(position / downsample) * downsample) <= 0.5
        assert aligned(position, downsample) == position


def test_slide_files_are_found_by_ending(tmp_path):
    for name in ("b.TIFF", "a.svs", "notes.txt", ".hidden.tiff", "c.ndpi"):
        (tmp_path / name).touch()
    assert [path.name for path in slide_files(tmp_path)] == ["a.svs", "b.TIFF", "c.ndpi"]
    assert slide_files(tmp_path / "missing") == []
