"""PatchDataset: three kinds of folders, labels, the decoded cache, damaged files."""

import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.pictures import UNDECODABLE
from data.augment import Augmentation
from data.dataset import CONDITIONS, PatchDataset, PatchFile, class_of, condition_of, decode, list_patches
from data.manifest import Patch, write_manifest
from data.order import Draw
from data.quality import scan_patch

SIZE = 32


def draw_patch(path, seed=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(80, 220, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Twelve patches of two labels, two providers, three of them held out, with a manifest."""
    rows = []
    for number in range(12):
        label = ("benign", "gleason4")[number % 2]
        path = f"{label}/slide{number // 3}_{number}_0.png"
        draw_patch(tmp_path / path, number)
        provider = ("radboud", "karolinska")[number // 6]
        split = "test" if number < 3 else "train"
        rows.append(Patch(path, f"slide{number // 3}", provider, 4, "4+4", label, number, 0, 0, 0.5, 0.9, 50.0, split))
    write_manifest(tmp_path, rows)
    return tmp_path


def test_manifest_folder_gives_tensors_labels_and_splits(folder):
    dataset = PatchDataset(folder, SIZE, "label")
    image, label = dataset[0]
    assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.float32
    assert -1 <= image.min() < image.max() <= 1
    assert dataset.classes == ["benign", "gleason4"] and label in {0, 1}
    assert len(dataset) == 9 and len(PatchDataset(folder, SIZE, "label", split="test")) == 3
    assert sum(dataset.class_counts()) == 9
    assert {group[1] for group in dataset.groups()} == {"radboud", "karolinska"}


def test_pixels_are_those_of_the_file(folder):
    dataset = PatchDataset(folder, SIZE)
    for index, file in enumerate(dataset.files):
        assert np.array_equal(dataset.pixels(index), np.asarray(Image.open(folder / file.path)))


def test_isup_and_unknown_classes(folder):
    with pytest.raises(UserError, match="at least two classes"):
        PatchDataset(folder, SIZE, "isup")


def test_the_provider_may_be_a_second_condition(folder):
    dataset = PatchDataset(folder, SIZE, "label+provider")
    assert dataset.classes == [f"{label}-{name}" for label in ("benign", "gleason4") for name in ("karolinska", "radboud")]
    assert all(file.data_provider in dataset.classes[dataset.label(index)] for index, file in enumerate(dataset.files))
    assert PatchDataset(folder, SIZE, "isup+provider").classes == ["isup4-karolinska", "isup4-radboud"]
    for condition in CONDITIONS[1:]:
        files = dataset.files
        assert condition_of(class_of(file, condition) for file in files) == condition
    for names in (["isup0", "stroma"], ["isup_low", "isup_high"], ["gleason-3", "gleason-4"], ["unknown"], []):
        assert condition_of(names) == "label"
    alone = PatchFile("a.png", "a", "benign", "", None, "train")
    assert class_of(alone, "label+provider") == "benign" and class_of(alone, "isup+provider") == "unknown"


def test_label_folders_and_plain_folders_need_no_manifest(tmp_path):
    for label in ("benign", "cats"):
        for number in range(3):
            draw_patch(tmp_path / "labelled" / label / f"{number}.jpg", number)
    assert PatchDataset(tmp_path / "labelled", SIZE, "label").classes == ["benign", "cats"]
    for number in range(3):
        draw_patch(tmp_path / "plain" / f"{number}.png", number)
    plain = PatchDataset(tmp_path / "plain", SIZE)
    assert len(plain) == 3 and plain[0][1] == 0
    assert {file.label for file in list_patches(tmp_path / "plain")} == {"unlabelled"}


def test_empty_and_missing_folders_say_what_to_do(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="extract_patches.py"):
            PatchDataset(path, SIZE)


def test_reduction_averages_areas_and_takes_the_middle(tmp_path):
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(np.repeat(checker[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "checker.png")
    assert abs(decode(tmp_path / "checker.png", 32).astype(int) - 127).max() <= 1
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (decode(tmp_path / "wide.png", 32) == 200).all()


def test_cache_is_used_and_built_anew_when_a_file_changes(folder):
    PatchDataset(folder, SIZE)
    cache = next(folder.glob(".decoded*.u8"))
    stamp = cache.stat().st_mtime_ns
    again = PatchDataset(folder, SIZE)
    assert cache.stat().st_mtime_ns == stamp
    path = folder / again.files[0].path
    changed = draw_patch(path, seed=999)
    os.utime(path, ns=(1, 1))
    assert np.array_equal(PatchDataset(folder, SIZE).pixels(0), changed)


def test_the_cache_is_built_anew_when_a_file_of_the_same_size_replaces_another(tmp_path):
    draw_patch(tmp_path / "a.bmp", 0)
    first, size = PatchDataset(tmp_path, SIZE).pixels(0), (tmp_path / "a.bmp").stat().st_size
    changed = draw_patch(tmp_path / "a.bmp", 1)
    os.utime(tmp_path / "a.bmp", ns=(1, 1))
    assert (tmp_path / "a.bmp").stat().st_size == size and not np.array_equal(first, changed)
    assert np.array_equal(PatchDataset(tmp_path, SIZE).pixels(0), changed)


def test_the_same_patches_in_another_stain_are_not_those_of_the_cache(folder):
    first = [PatchDataset(folder, SIZE, stain_normalize=method).pixels(0) for method in ("none", "macenko", "reinhard")]
    assert not any(np.array_equal(first[k], first[k - 1]) for k in range(3))


def test_what_killed_runs_left_of_the_cache_is_removed(folder):
    PatchDataset(folder, SIZE)
    cache = next(path for path in folder.glob(".decoded_*") if path.suffix != ".json")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone, running = (folder / f".{cache.name}.{pid}.1.tmp" for pid in (process.pid, os.getppid()))
    for path in (gone, running):
        path.touch()
        os.utime(path, (0, 0))
    cache.unlink()
    PatchDataset(folder, SIZE)
    assert cache.exists() and running.exists() and not gone.exists()


def test_a_leftover_that_may_not_be_removed_stops_nothing(folder, monkeypatch):
    cache = PatchDataset(folder, SIZE)._cache
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    leftover = folder / f".{cache.name}.{process.pid}.1.tmp"
    leftover.touch()
    os.utime(leftover, (0, 0))

    def refused(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    assert len(PatchDataset(folder, SIZE)) == 9 and leftover.exists()


def test_a_damaged_cache_note_is_not_believed(folder):
    first = PatchDataset(folder, SIZE).pixels(0)
    next(folder.glob(".decoded*.json")).write_text("{")
    assert np.array_equal(PatchDataset(folder, SIZE).pixels(0), first)


def test_a_read_only_folder_is_served_from_memory(folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("Read-only file system")

    monkeypatch.setattr("data.dataset.replacing", refuse)
    dataset = PatchDataset(folder, SIZE)
    assert dataset[0][0].shape == (3, SIZE, SIZE)
    assert "stay in memory" in capsys.readouterr().out


def test_a_damaged_patch_is_left_out_and_named(tmp_path, capsys):
    for number in range(30):
        draw_patch(tmp_path / f"{number:02d}.png", number)
    (tmp_path / "07.png").write_bytes((tmp_path / "07.png").read_bytes()[:100])
    dataset = PatchDataset(tmp_path, SIZE)
    assert len(dataset) == 29 and "07.png" in capsys.readouterr().out
    again = PatchDataset(tmp_path, SIZE)  # from the cache
    assert [file.path for file in again.files] == [file.path for file in dataset.files]
    assert np.array_equal(again.pixels(28), dataset.pixels(28))


def test_many_damaged_patches_stop_it(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.png").write_text("not an image")
    with pytest.raises(UserError, match="check_data.py --quarantine"):
        PatchDataset(tmp_path, SIZE)


def test_a_decompression_bomb_is_left_out(tmp_path):
    Image.fromarray(np.zeros((1, 20000), np.uint8)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="declares"):
        decode(tmp_path / "bomb.png", 32)


def test_a_patch_that_goes_bad_is_replaced_by_one_of_its_class(folder, monkeypatch):
    monkeypatch.setattr("data.dataset.MAX_CACHE_BYTES", 0)
    monkeypatch.setattr("data.dataset.MAX_BAD_SHARE", 0.2)
    dataset, said = PatchDataset(folder, SIZE, "label"), []
    dataset.report = said.append
    labels = [dataset.label(index) for index in range(len(dataset))]
    bad = labels.index(1) - 1  # the next file is of the other class
    (folder / dataset.files[bad].path).write_bytes(b"damaged")
    assert labels[bad] == labels[0] == 0 and np.array_equal(dataset.pixels(bad), dataset.pixels(0))
    assert len(said) == 1 and dataset.files[bad].path in said[0]


def test_a_patch_that_can_be_read_again_is_back_and_until_then_it_is_said(folder, capsys, monkeypatch):
    monkeypatch.setattr("data.dataset.MAX_BAD_SHARE", 0.2)
    path = next(file.path for file in list_patches(folder) if file.split == "train")
    broken, whole = b"x" * (folder / path).stat().st_size, (folder / path).read_bytes()
    status = (folder / path).stat()

    def put(content):  # as a network disk that refused to read for a while: neither size nor time change
        (folder / path).write_bytes(content)
        os.utime(folder / path, ns=(status.st_atime_ns, status.st_mtime_ns))

    put(broken)
    for _ in range(2):
        assert len(PatchDataset(folder, SIZE, "label")) == 8
        assert f"patch left out, it cannot be read: {path}" in capsys.readouterr().out
    put(whole)
    assert len(PatchDataset(folder, SIZE, "label")) == 9 and "left out" not in capsys.readouterr().out


def test_rows_that_spell_their_path_otherwise_are_no_strays(folder, capsys):
    (folder / "patches.csv").write_text((folder / "patches.csv").read_text().replace("\nbenign/", "\n./benign/"))
    assert len(PatchDataset(folder, SIZE, "label")) == 9
    assert "have no row" not in capsys.readouterr().out


def test_drawn_patches_come_with_their_labels_and_others_for_another_seed(folder):
    dataset = PatchDataset(folder, SIZE, "label", augmentation=Augmentation(noise=20.0))
    known = {dataset.pixels(index).tobytes(): dataset.label(index) for index in range(len(dataset))}
    drawn = [dataset.drawn(4, seed) for seed in (0, 0, 1, 2)]
    for images, labels in drawn:
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert [known[patch.tobytes()] for patch in pixels] == labels.tolist()
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[2][0])
    assert len(dataset.drawn(99, 0)[1]) == len(dataset)


@pytest.mark.parametrize(
    ("condition", "expected"), [("none", 4), ("label", "benign"), ("label+provider", "benign"), ("isup", "isup4")]
)
def test_what_the_order_balances_over_is_what_the_label_says_and_the_provider(folder, condition, expected):
    dataset = PatchDataset(folder, SIZE, condition, classes=[])
    index = [file.label for file in dataset.files].index("benign")
    assert dataset.groups()[index] == (expected, dataset.files[index].data_provider)


def test_it_travels_to_worker_processes_without_its_pixels(folder):
    dataset = PatchDataset(folder, SIZE, augmentation=Augmentation())
    data = pickle.dumps(dataset)
    assert len(data) < 9 * SIZE * SIZE * 3
    image, _ = pickle.loads(data)[Draw(2, 5)]  # noqa: S301 our own bytes
    assert torch.equal(image, dataset[Draw(2, 5)][0])


def test_training_keeps_the_numbering_of_a_checkpoint(folder):
    dataset = PatchDataset(folder, SIZE, "label", classes=["gleason4", "benign"])
    assert dataset.label(0) == ["gleason4", "benign"].index(dataset.files[0].label)


def test_classes_are_those_of_the_training_patches(tmp_path, capsys):
    rows = []
    for number, label in enumerate(["benign", "gleason4"] * 3 + ["benign", "gleason5"]):
        path, split = f"{label}/s{number}_0_0.png", "train" if number < 6 else "test"
        draw_patch(tmp_path / path, number)
        rows.append(Patch(path, f"s{number}", "radboud", 4, "4+4", label, 0, 0, 0, 0.5, 0.9, 50.0, split))
    write_manifest(tmp_path, rows)
    dataset = PatchDataset(tmp_path, SIZE, "label")
    assert dataset.classes == ["benign", "gleason4"]
    assert [file.label for file in dataset.other_split("test").files] == ["benign"]
    assert "only held-out patches are of gleason5" in capsys.readouterr().out


def test_enlarging_is_said(folder, capsys):
    PatchDataset(folder, SIZE)
    assert "enlarged" not in capsys.readouterr().out
    PatchDataset(folder, 2 * SIZE)
    assert f"patches of {SIZE} pixels are enlarged to {2 * SIZE}" in capsys.readouterr().out


def test_grey_values_of_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.full((SIZE, SIZE), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode(tmp_path / "deep.png", SIZE)


@pytest.mark.parametrize("place", [0, -1])
def test_the_common_stain_does_not_need_every_patch(folder, place):
    """The first and the last training patch are among those that the stain is taken from."""
    path = [file for file in list_patches(folder) if file.split == "train"][place].path
    (folder / path).write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.dataset.MAX_BAD_SHARE", 0.5)
        dataset = PatchDataset(folder, SIZE, stain_normalize="reinhard")
    assert len(dataset) == 8 and path not in {file.path for file in dataset.files}


def test_the_common_stain_follows_the_training_patches(folder):
    before = PatchDataset(folder, SIZE, split="test", stain_normalize="reinhard").pixels(0)
    for file in list_patches(folder):
        if file.split == "train":
            pixels = np.asarray(Image.open(folder / file.path)).copy()
            pixels[..., 1] //= 2
            Image.fromarray(pixels).save(folder / file.path)
    after = PatchDataset(folder, SIZE, split="test", stain_normalize="reinhard").pixels(0)
    assert after[..., 1].mean() < 0.8 * before[..., 1].mean()


def test_the_common_stain_is_not_that_of_held_out_patches(folder):
    before = PatchDataset(folder, SIZE, stain_normalize="reinhard").pixels(0)
    for file in list_patches(folder):
        if file.split == "test":
            pixels = np.asarray(Image.open(folder / file.path)).copy()
            pixels[..., 1] //= 2
            Image.fromarray(pixels).save(folder / file.path)
    assert np.array_equal(PatchDataset(folder, SIZE, stain_normalize="reinhard").pixels(0), before)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_patches_of_a_slide_are_normalised_alike(tmp_path, method):
    """The same colour becomes the same one in every patch of a slide, however pale the rest of the patch is."""
    random = np.random.default_rng(0)
    basis = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    (tmp_path / "benign").mkdir()
    for slide, factors in (("A", [1.0, 1.0]), ("B", [0.5, 1.4])):
        for place, strength in enumerate((1.0, 1.0, 0.1)):
            amounts = strength * random.gamma(2.0, 0.15, (SIZE, SIZE, 2))
            amounts[:4, :4] = 0.3
            pixels = (240 * 10 ** -(amounts * np.array(factors) @ basis) - 1).clip(0, 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "benign" / f"{slide}_{place}_0.png")
    dataset = PatchDataset(tmp_path, SIZE, stain_normalize=method)
    corner = {file.path[7:10]: dataset.pixels(index)[:4, :4].reshape(-1, 3) for index, file in enumerate(dataset.files)}
    assert all(len(np.unique(colour, axis=0)) == 1 for colour in corner.values())
    for slide in "AB":
        assert np.array_equal(corner[f"{slide}_0"], corner[f"{slide}_2"])
    raw = np.abs(PatchDataset(tmp_path, SIZE).pixels(0)[0, 0].astype(int) - PatchDataset(tmp_path, SIZE).pixels(3)[0, 0]).max()
    assert np.abs(corner["A_0"][0].astype(int) - corner["B_0"][0]).max() < raw / 2


def test_a_folder_of_ones_own_can_hold_slides_out(tmp_path):
    paths = [f"{label}/case{case}_{place}_0.png" for label in ("normal", "tumour") for case in (1, 2) for place in (0, 32)]
    for number, path in enumerate(paths):
        draw_patch(tmp_path / path, number)
    (tmp_path / "patches.csv").write_text(
        "path,split\n" + "".join(f"{path},{'test' if 'case2' in path else 'train'}\n" for path in paths)
    )
    dataset = PatchDataset(tmp_path, SIZE, "label")
    assert dataset.classes == ["normal", "tumour"] and len(dataset) == 4 and len(dataset.other_split("test")) == 4


def test_folders_named_train_and_val_are_the_split(tmp_path):
    for number, path in enumerate(f"{split}/{label}/{k}.png" for split in ("train", "val") for label in "ab" for k in range(2)):
        draw_patch(tmp_path / path, number)
    dataset = PatchDataset(tmp_path, SIZE, "label")
    assert dataset.classes == ["a", "b"] and len(dataset) == 4 and len(dataset.other_split("test")) == 4


def test_a_split_without_labels_is_no_label(tmp_path):
    for number, path in enumerate(("train/a.png", "train/b.png", "test/c.png")):
        draw_patch(tmp_path / path, number)
    assert {(file.path, file.label, file.split) for file in list_patches(tmp_path)} == {
        ("train/a.png", "unlabelled", "train"),
        ("train/b.png", "unlabelled", "train"),
        ("test/c.png", "unlabelled", "test"),
    }


def test_a_folder_beside_train_and_val_brings_no_held_out_patch_into_training(tmp_path):
    for path in ("train/a.png", "val/c.png", "samples/d.png"):
        draw_patch(tmp_path / path)
    assert {file.path: file.split for file in list_patches(tmp_path)}["val/c.png"] == "test"


def test_valid_beside_invalid_is_a_label(tmp_path):
    for number, path in enumerate(("valid/a.png", "invalid/b.png")):
        draw_patch(tmp_path / path, number)
    assert {(file.label, file.split) for file in list_patches(tmp_path)} == {("valid", "train"), ("invalid", "train")}
    (tmp_path / "patches.csv").write_text("path,label,split\nvalid/a.png,valid,train\ninvalid/b.png,invalid,test\n")
    assert {(file.label, file.split) for file in list_patches(tmp_path)} == {("valid", "train"), ("invalid", "test")}


def test_what_is_hidden_or_was_set_aside_is_no_patch(tmp_path):
    patches = ["_quarantine/x.png", "a/x.png", "site_quarantine/x.png"]  # there is no folder "site"
    for path in (*patches, ".ipynb_checkpoints/x.png", "a/.thumbs/x.png", "a_quarantine/x.png", "a/.y.png"):
        draw_patch(tmp_path / path)
    assert [file.path for file in list_patches(tmp_path)] == patches


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such names")
def test_names_of_any_language_are_text(tmp_path):
    for name in ("Schnitt ä.png", "切片 1.png", "a b.png"):
        draw_patch(tmp_path / name)
    assert len(list_patches(tmp_path)) == 3


def test_a_name_that_is_no_text_gets_one_sentence(tmp_path):
    draw_patch(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/x\344.png")
    with pytest.raises(UserError, match=r"x\\udce4.png, whose name is no plain text; rename"):
        list_patches(tmp_path)


def test_a_tiff_of_nonsense_is_a_damaged_patch(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(content, "TIFF")
    data = bytearray(content.getvalue())
    (start,) = struct.unpack_from("<I", data, 4)
    (tags,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * tags, 12):
        if struct.unpack_from("<H", data, entry) == (273,):  # where the pixels begin: at 8.0
            struct.pack_into("<HHIf", data, entry, 273, 11, 1, 8.0)
    (tmp_path / "x.tif").write_bytes(data)
    with pytest.raises(UNDECODABLE):
        decode(tmp_path / "x.tif", SIZE)
    assert scan_patch(tmp_path, "x.tif").fault == "damaged"


def test_grades_that_are_folders_are_balanced_too(tmp_path):
    for number in range(6):
        draw_patch(tmp_path / ("isup0" if number < 4 else "isup3") / f"{number}.png", number)
    assert set(PatchDataset(tmp_path, SIZE, "isup").groups()) == {("isup0", ""), ("isup3", "")}


@pytest.mark.parametrize("condition", ["label", "isup"])
def test_folders_named_like_grades_are_grades(condition):
    file = PatchFile("isup3/a.png", "a", "isup3", "", None, "train")
    assert class_of(file, condition) == "isup3"


def test_what_was_cut_away_is_white(tmp_path):
    pixels = np.random.default_rng(0).integers(80, 220, (SIZE, SIZE, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, : SIZE // 2] = 0
    Image.fromarray(pixels).save(tmp_path / "clipped.png")
    decoded = decode(tmp_path / "clipped.png", SIZE)
    assert (decoded[:, : SIZE // 2] == 255).all() and np.array_equal(decoded[:, SIZE // 2 :], pixels[:, SIZE // 2 :, :3])


def test_pictures_without_a_row_are_said(folder, capsys):
    draw_patch(folder / "benign" / "late_0_0.png", 99)
    assert len(PatchDataset(folder, SIZE)) == 9
    assert "1 pictures" in capsys.readouterr().out


def test_regions_are_said_to_shrink(tmp_path, capsys):
    draw_patch(tmp_path / "a.png", size=600)
    PatchDataset(tmp_path, SIZE)
    assert "patches of 600 pixels are reduced to 32" in capsys.readouterr().out
