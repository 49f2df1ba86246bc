"""Patches in tar shards: the same patches, the same training, and no damage passes unseen."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.files import sha256
from data import shards
from data.dataset import PatchDataset
from data.manifest import read_manifest
from data.order import Draw
from data.quality_patches import assess, scan_patch_folder
from tests.conftest import write_panda_folder
from training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("pyarrow")


def script(name, *words):
    return subprocess.run([sys.executable, ROOT / name, *map(str, words)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A patch folder and its shards, by the command line."""
    home = tmp_path_factory.mktemp("shards")
    write_panda_folder(home / "panda")
    words = [
        "--data_dir",
        home / "panda",
        "--output_dir",
        home / "patches",
        "--patch_size",
        64,
        "--max_patches",
        80,
        "--workers",
        1,
    ]
    done = script("extract_patches.py", *words, "--shards", home / "shards")
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made / "shards", tmp_path / "shards"))


def test_they_hold_the_rows_and_files_of_the_folder(made):
    rows, index = read_manifest(made / "patches"), shards.open_shards(made / "shards")
    assert len(rows) == 80
    assert [asdict(row) for row in index.rows()] == [asdict(row) for row in rows]
    assert all(index.content(row.path) == (made / "patches" / row.path).read_bytes() for row in rows)
    assert not list(index.faults())


def test_webdataset_reads_them(made):
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, (made / "shards").glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    rows = {row.path: asdict(row) for row in read_manifest(made / "patches")}
    assert {sample["json"]["path"]: sample["json"] for sample in samples} == rows
    assert all(sample["png"].shape == (64, 64, 3) for sample in samples)
    trained = [sample["json"]["path"] for sample in samples if sample["json"]["split"] == "train"]
    assert trained != sorted(trained), "a reader from front to back must see a mixture"


def test_split_into_many_they_are_numbered_by_split_and_packed_the_same_each_time(made, tmp_path):
    folder, contents = made / "patches", []
    rows = sorted(read_manifest(folder), key=lambda row: row.split)
    left = tmp_path / "two" / f".train-000000.tar.{os.getpid()}.1.tmp"  # by a killed run
    left.parent.mkdir()
    left.touch()
    for name in ("one", "two"):
        shards.write_shards(tmp_path / name, ((row, (folder / row.path).read_bytes()) for row in rows), "digest", 100_000)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))})
    assert contents[0] == contents[1] and not left.exists()
    assert len(contents[0]) > 4 and {"train-000000.tar", "train-000001.tar", "test-000000.tar"} < set(contents[0])
    index = shards.open_shards(tmp_path / "one")
    assert all(index.content(row.path) == (folder / row.path).read_bytes() for row in rows)
    for path in (tmp_path / "one").glob("train-*.tar"):
        with tarfile.open(path) as tar:
            assert all(json.load(tar.extractfile(m))["split"] == "train" for m in tar if m.name.endswith(".json"))


def test_a_dataset_of_shards_is_the_dataset_of_the_files(made):
    files, packed = (PatchDataset(made / name, 32, "label") for name in ("patches", "shards"))
    assert packed.decodes and not files.decodes
    assert packed.files == files.files and packed.classes == files.classes and packed.groups() == files.groups()
    for number in range(len(files)):
        (one, label), (other, same) = files[Draw(number, 7)], packed[Draw(number, 7)]
        assert torch.equal(one, other) and label == same
    assert len(packed.other_split("test")) == len(files.other_split("test"))


@pytest.mark.slow
def test_training_from_them_gives_the_bits_of_training_from_files(made):
    for name in ("patches", "shards"):
        words = ["--patches", made / name, "--model", "dcgan", "--image_size", 64, "--epochs", 1, "--device", "cpu"]
        words += [
            "--checkpoint_dir",
            made / f"of_{name}",
            "--log_dir",
            made / f"logs_{name}",
            "--batch_size",
            16,
            "--eval_every",
            0,
        ]
        done = script("train.py", *words)
        assert done.returncode == 0, done.stderr
    one, other = (checkpoint.load(made / f"of_{name}" / "G_final.pt")["ema"] for name in ("patches", "shards"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_they_are_packed_again_only_when_the_patches_changed(made, copy):
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert shards.pack(made / "patches", copy) == 80
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    (copy / "train-000000.tar").write_bytes(b"")  # as after a disk that was full
    (copy / "train-000007.tar").write_bytes(b"of an earlier packing")
    shards.pack(made / "patches", copy)
    assert not list(shards.open_shards(copy).faults())
    assert not (copy / "train-000007.tar").exists()
    damaged = bytearray((copy / "train-000000.tar").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copy / "train-000000.tar").write_bytes(damaged)
    shards.pack(made / "patches", copy)
    assert sha256(copy / "train-000000.tar") == shards.checksums(copy)["train-000000.tar"]


def test_a_run_that_stops_midway_leaves_no_index(made, tmp_path):
    def failing():
        for number, row in enumerate(read_manifest(made / "patches")):
            if number == 50:
                raise KeyboardInterrupt
            yield row, (made / "patches" / row.path).read_bytes()

    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(tmp_path / "shards", failing(), "digest", 50_000)
    assert not shards.is_sharded(tmp_path / "shards")
    assert [path.suffix for path in (tmp_path / "shards").iterdir()] == [".tar"] * len(list((tmp_path / "shards").iterdir()))


def test_they_must_not_lie_among_the_patches(made):
    for target in (made / "patches", made / "patches" / "shards"):
        with pytest.raises(UserError, match="outside"):
            shards.check_target(made / "patches", target)


def _assess(folder):
    return assess(folder, *scan_patch_folder(folder, 0))


def test_check_data_finds_whole_shards_whole(copy):
    assert not {"shards", "damaged"} & {finding.check for finding in _assess(copy).findings}


def test_check_data_finds_a_damaged_picture_and_a_changed_label(copy):
    index = shards.open_shards(copy)
    row = index.rows()[0]
    path = copy / index._names[index._shard[0]]
    content = bytearray(path.read_bytes())
    middle = int(index._offset[0] + index._size[0] // 2)
    content[middle : middle + 40] = bytes(40)
    label = content.index(json.dumps(row.label).encode(), int(index._offset[0]))
    content[label + 1 : label + 1 + len(row.label)] = b"x" * len(row.label)
    path.write_bytes(content)
    found = {finding.check: finding for finding in _assess(copy).findings}
    assert row.path in found["damaged"].items[0]
    assert "the label in" in found["shards"].items[0]


@pytest.mark.parametrize("spoil", ["shorten", "remove", "index", "columns"])
def test_damage_is_one_sentence(copy, spoil):
    shard, index = copy / "train-000000.tar", copy / shards.NAME
    if spoil == "shorten":
        shard.write_bytes(shard.read_bytes()[:20_000])
    elif spoil == "remove":
        shard.unlink()
    elif spoil == "index":
        index.write_bytes(index.read_bytes()[:-100])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"path": ["benign/a_0_0.png"]}), index)
    with pytest.raises(UserError, match="missing or cut short|damaged"):
        PatchDataset(copy, 32, "label")


def test_quarantine_refuses_shards(made):
    done = script("check_data.py", "--patches", made / "shards", "--quarantine", "--out", made / "check")
    assert done.returncode == 1 and "pack them again" in done.stderr and "Traceback" not in done.stderr


def test_a_shard_that_goes_during_training_is_told(copy):
    dataset, said = PatchDataset(copy, 32, "label"), []
    dataset.report = said.append
    assert np.ptp(dataset.pixels(0)) > 0
    (copy / "train-000000.tar").unlink()
    with pytest.raises(UserError, match="can no longer be read"):
        dataset.pixels(0)
    assert said


def test_shards_of_other_slides_are_not_written_over(made, tmp_path):
    other = write_panda_folder(tmp_path / "panda")
    for kind in ("train_images", "train_label_masks"):
        for path in (other / kind).iterdir():
            path.rename(path.with_name("x" + path.name))
    table = other / "train.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, *("x" + row for row in rows)]) + "\n")
    target = shutil.copytree(made / "shards", tmp_path / "shards")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    words = ["--data_dir", other, "--output_dir", tmp_path / "patches", "--patch_size", 64, "--max_patches", 20, "--workers", 1]
    done = script("extract_patches.py", *words, "--shards", target)
    assert done.returncode == 1 and "slide(s) that are not among these" in done.stdout + done.stderr
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
