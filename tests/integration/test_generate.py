"""generate.py as a user runs it."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from models.config import ModelConfig, improved_config
from tests.conftest import write_noise_patches
from tests.scripts import run_script
from training import checkpoint
from training.config import TrainConfig
from training.trainer import Trainer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoint of a tiny untrained conditional model."""
    path = tmp_path_factory.mktemp("weights") / "G_final.pt"
    model = ModelConfig("dcgan", 16, 10, 3, (16, 8), (8, 16))
    classes = ["benign", "gleason4", "unlabelled"]
    checkpoint.save(path, Trainer(model, TrainConfig("x", "label"), classes, [5, 3, 2], 10, torch.device("cpu")).state())
    return path


def generate(weights, *flags, expect=0):
    return run_script("generate", "--checkpoint", weights, *flags, expect=expect)


def pixels(folder):
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def test_one_label_is_an_image_folder_with_a_manifest(weights, tmp_path):
    generate(weights, "--num", 20, "--label", "gleason4", "--out", tmp_path)
    images = ImageFolder(tmp_path)
    assert images.classes == ["gleason4"] and len(images) == 20
    with open(tmp_path / "manifest.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and {row["label"] for row in rows} == {"gleason4"}
    assert all((tmp_path / row["path"]).exists() for row in rows)


def test_without_a_label_all_that_mean_something_share_evenly(weights, tmp_path):
    generate(weights, "--num", 21, "--out", tmp_path)
    assert {path.name: len(list(path.iterdir())) for path in tmp_path.iterdir() if path.is_dir()} == {"benign": 11, "gleason4": 10}


def test_a_label_without_a_share_has_no_folder(weights, tmp_path):
    generate(weights, "--num", 1, "--out", tmp_path)
    assert ImageFolder(tmp_path).classes == ["benign"]


def test_more_images_extend_fewer(weights, tmp_path):
    generate(weights, "--num", 5, "--label", "benign", "--out", tmp_path)
    first = pixels(tmp_path)
    generate(weights, "--num", 40, "--label", "benign", "--out", tmp_path)
    more = pixels(tmp_path)
    assert len(more) == 40 and all(np.array_equal(more[name], image) for name, image in first.items())


def test_other_seeds_do_not_mix(weights, tmp_path):
    generate(weights, "--num", 5, "--out", tmp_path)
    before = pixels(tmp_path)
    assert "another checkpoint, seed" in generate(weights, "--num", 5, "--seed", 9, "--out", tmp_path, expect=1)
    assert pixels(tmp_path).keys() == before.keys()


def test_guidance_is_part_of_what_a_folder_holds(weights, tmp_path):
    path, model = tmp_path / "G_final.pt", improved_config(64, 2, discriminator="residual")
    checkpoint.save(path, Trainer(model, TrainConfig("x", "label"), ["benign", "gleason4"], [5, 3], 8, torch.device("cpu")).state())
    generate(path, "--num", 2, "--guidance", 0.5, "--out", tmp_path / "out")
    before = pixels(tmp_path / "out")
    assert "guidance" in generate(path, "--num", 2, "--out", tmp_path / "out", expect=1)
    generate(path, "--num", 2, "--out", tmp_path / "plain")
    assert before.keys() == pixels(tmp_path / "plain").keys()
    assert not any(np.array_equal(before[name], image) for name, image in pixels(tmp_path / "plain").items())
    with open(tmp_path / "out" / "manifest.csv") as file:
        assert {float(row["guidance"]) for row in csv.DictReader(file)} == {0.5}
    assert "--guidance" in generate(weights, "--num", 2, "--guidance", 1, "--out", tmp_path / "dcgan", expect=1)


def test_the_clearest_are_candidates_and_are_not_mixed_with_others(weights, tmp_path):
    """The extractor is real, the patches are noise: what is learned from them does not matter here."""
    write_noise_patches(tmp_path / "patches", 160, ("benign", "gleason4"))
    flags = ("--num", 4, "--best_of", 3, "--patches", tmp_path / "patches", "--out", tmp_path / "chosen")
    generate(weights, *flags)
    generate(weights, "--num", 12, "--out", tmp_path / "all")
    candidates, chosen = pixels(tmp_path / "all"), pixels(tmp_path / "chosen")
    for label in ("benign", "gleason4"):
        for k in range(2):
            group = [candidates[f"{label}/{3 * k + j:06d}.png"] for j in range(3)]
            assert any(np.array_equal(chosen[f"{label}/{k:06d}.png"], image) for image in group)
    assert "--best_of" in generate(weights, "--num", 4, "--out", tmp_path / "chosen", expect=1)
    generate(weights, *flags, "--num", 6)
    chosen = pixels(tmp_path / "chosen")
    write_noise_patches(tmp_path / "others", 170, ("benign", "gleason4"))
    other_judge = generate(weights, *flags, "--num", 8, "--patches", tmp_path / "others", expect=1)
    assert "chosen by other patches" in other_judge
    assert pixels(tmp_path / "chosen").keys() == chosen.keys()
    assert "patches teach benign, gleason4" in generate(weights, *flags, "--label", "unlabelled", expect=1)


def test_a_refused_choice_leaves_the_folder_as_it_was(weights, tmp_path):
    out = ("--num", 2, "--out", tmp_path / "out")
    assert "no folder of images at" in generate(weights, *out, "--best_of", 2, "--patches", tmp_path / "none", expect=1)
    write_noise_patches(tmp_path / "patches" / "test", 8, ("benign", "gleason4"))
    assert "no training patches" in generate(weights, *out, "--best_of", 2, "--patches", tmp_path / "patches", expect=1)
    assert not (tmp_path / "out").exists()
    generate(weights, *out)  # as the sentence about a label says: leave it out


@pytest.mark.parametrize("row", ["x,y,0,one,1,c,d", "x,y"])
def test_a_foreign_manifest_is_one_sentence(weights, tmp_path, row):
    before = f"path,label,index,seed,truncation,checkpoint,checkpoint_sha256\n{row}\n"
    (tmp_path / "manifest.csv").write_text(before)
    assert "damaged or another program's" in generate(weights, "--num", 2, "--out", tmp_path, expect=1)
    assert (tmp_path / "manifest.csv").read_text() == before


def test_an_empty_image_is_drawn_again(weights, tmp_path):
    generate(weights, "--num", 3, "--label", "benign", "--out", tmp_path)
    before = pixels(tmp_path)
    (tmp_path / "benign" / "000001.png").write_bytes(b"")
    generate(weights, "--num", 3, "--label", "benign", "--out", tmp_path)
    assert all(np.array_equal(image, before[name]) for name, image in pixels(tmp_path).items())


@pytest.mark.parametrize("content", ["", "path,label,index,seed,truncation,checkpoint,checkpoint_sha256,best_of,guidance,judge\n"])
def test_a_manifest_without_rows_makes_no_foreign_image_ours(content, weights, tmp_path):
    (tmp_path / "benign").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "benign" / "000000.png")
    (tmp_path / "manifest.csv").write_text(content)
    assert "without a manifest" in generate(weights, "--num", 5, "--out", tmp_path, expect=1)
    assert Image.open(tmp_path / "benign" / "000000.png").size == (8, 8)


def test_foreign_images_are_left_alone(weights, tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "a.png")
    assert "without a manifest" in generate(weights, "--num", 5, "--out", tmp_path, expect=1)


def test_grid_and_walks(weights, tmp_path):
    generate(weights, "--grid", tmp_path / "grid.png", "--interpolate", tmp_path / "walk.gif")
    assert Image.open(tmp_path / "grid.png").width > 8 * 16
    with Image.open(tmp_path / "walk.gif") as film:
        assert film.n_frames > 20
    generate(weights, "--interpolate", tmp_path / "walk.mp4")
    assert (tmp_path / "walk.mp4").stat().st_size > 1000


def test_mistakes_are_one_sentence(weights, tmp_path):
    assert "say what to make" in generate(weights, expect=2)
    assert "benign, gleason4" in generate(weights, "--num", 1, "--label", "gleason9", "--out", tmp_path, expect=1)
    assert ".png or .jpg" in generate(weights, "--grid", tmp_path / "grid", expect=2)
    assert ".gif or .mp4" in generate(weights, "--interpolate", tmp_path / "x.avi", expect=2)
    assert "--best_of" in generate(weights, "--grid", tmp_path / "x.png", "--best_of", 2, expect=2)
    assert "--out takes a path of this machine" in generate(weights, "--num", 1, "--out", "s3://bucket/x", expect=2)
    assert "no checkpoint" in generate(tmp_path / "none.pt", "--num", 1, expect=1)
