"""evaluate.py from the command line: what it names, what it writes, what it says to bad input."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import evaluate
from common import cli
from data.manifest import Patch, write_manifest
from data.panda import read_train_csv, split_by_slide
from metrics.copies import pixel_suspicions
from metrics.features import Extractor
from metrics.images import image_set, reduced
from metrics.inception import INCEPTION_WEIGHTS
from metrics.stationarity import LIMIT, deviations, position_maps
from models.config import ModelConfig
from models.features import LITE0_WEIGHTS
from tests.drawn_tissue import drawn_tissue
from training import checkpoint
from training.config import TrainConfig
from training.sampling import load_sampler
from training.trainer import Trainer

SLIDES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "prostate_slides"


def write(folder, images, labels, name):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / label / name.format(index // 12, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real patches of fifteen slides at 64 pixels; generated ones at 32 of which four are copies."""
    root = tmp_path_factory.mktemp("evaluate")
    real = drawn_tissue(180, 64, 0, 2.5)
    labels = np.array(["benign", "gleason3", "gleason4"])[np.arange(180) % 3]
    write(root / "real", real, labels, "slide{}_{}_0.png")
    made = drawn_tissue(76, 32, 1, 1.25)
    small = real.reshape(180, 32, 2, 32, 2, 3).mean((2, 4)).astype(np.uint8)
    write(root / "made", np.concatenate([made, np.rot90(small, 1, (1, 2))]), np.r_[labels[:76], labels], "{}-{}.png")
    for path in sorted((root / "made").rglob("*.png"))[80:]:
        path.unlink()
    return root


@pytest.fixture
def quick_networks(monkeypatch):
    """Networks that cost nothing: mean colours of sixteen places."""

    def run(batch):
        return torch.nn.functional.adaptive_avg_pool2d(batch.float(), 4).flatten(1)

    monkeypatch.setattr(evaluate, "inception", lambda weights, device: Extractor("quick", "w", run))
    monkeypatch.setattr(type(LITE0_WEIGHTS), "installed", lambda self: False)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main)
    return stop.value.code


def test_the_whole_evaluation(folders, quick_networks, monkeypatch, tmp_path, capsys):
    arguments = ["--images", folders / "made", "--patches", folders / "real", "--cache", tmp_path / "cache"]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "a") == 0
    record = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert "copies" in {finding["test"] for finding in record["findings"]}
    assert record["settings"]["compared at"] == "32 x 32 pixels"
    assert any("other than quarter turns" in note for note in record["notes"])
    assert record["settings"]["number of training patches"] == "144 of 144 (for copies: all)"
    parts = {"distances", "diversity", "copies", "stationarity", "artefacts", "grades", "utility"}
    assert parts <= set(record)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "are copies of training patches" in page and "data:image/jpeg" in page and 'src="http' not in page
    assert "copies" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2  # training and held-out patches, not the generated ones
    assert run(monkeypatch, *arguments, "--out", tmp_path / "b") == 0
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == record


def test_parts_can_be_left_out_and_sets_limited(folders, quick_networks, monkeypatch, tmp_path):
    skip = ["--skip", "distances", "diversity", "grades", "utility", "artefacts"]
    arguments = ["--images", folders / "made", "--patches", folders / "real", "--cache", tmp_path / "cache"]
    assert run(monkeypatch, *arguments, "--out", tmp_path, "--max_images", 30, *skip) == 0
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["copies"]["n_generated"] == 30
    assert record["copies"]["n_training"] > 100  # copies are sought among all patches
    assert "distances" not in record and not list((tmp_path / "cache").iterdir())
    assert any("Left out, as asked: distances" in note for note in record["notes"])


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "one of the arguments --checkpoint --images --compare is required"),
        (["--images", "a", "--checkpoint", "b"], 2, "not allowed with"),
        (["--images", "a", "--max_images", "0"], 2, "at least 1"),
        (["--images", "{root}/made", "--patches", "{root}/nowhere"], 1, "nowhere; run extract_patches.py or name yours with"),
        (["--images", "{root}/nowhere", "--patches", "{root}/real"], 1, "nowhere; run generate.py or name the generated"),
        (["--images", "{root}/made", "--patches", "{root}/made/benign"], 1, "at least 20 of each"),
        (["--checkpoint", "{root}/no.pt", "--patches", "{root}/real"], 1, "no.pt"),
        (["--images", "{root}/made", "--out", "{root}/made/benign/0-0.png"], 1, "0-0.png: File exists"),
        (["--images", "{root}/made", "--cache", "{root}/made/benign/0-0.png"], 1, "0-0.png: File exists"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, code, sentence, folders, quick_networks, monkeypatch, capsys):
    assert run(monkeypatch, *(part.format(root=folders) for part in arguments)) == code
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_labels_that_only_look_like_grades_are_labels(folders, quick_networks, monkeypatch, tmp_path):
    real = shutil.copytree(folders / "real", tmp_path / "real")
    for before, name in (("gleason3", "isup0"), ("gleason4", "isup-low")):
        (real / before).rename(real / name)
    classes = ["benign", "isup-low", "isup0"]
    trainer = Trainer(
        ModelConfig("dcgan", 32, 10, 3, (16, 8, 8), (8, 8, 16)), TrainConfig("x", "label"), classes, [1] * 3, 9, torch.device("cpu")
    )
    checkpoint.save(tmp_path / "a.pt", trainer.state())
    few = ("--skip", "diversity", "copies", "artefacts", "utility", "grades", "--cache", tmp_path / "cache", "--out", tmp_path)
    assert run(monkeypatch, "--checkpoint", tmp_path / "a.pt", "--patches", real, "--max_images", 60, *few) == 0
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert not any("mixed otherwise" in note for note in record["notes"])
    assert set(record["distances"]["quick"]["label"]) == set(classes) and not record["distances"]["quick"]["provider"]


def test_images_of_a_few_pixels_are_refused(folders, quick_networks, monkeypatch, tmp_path, capsys):
    write(tmp_path / "dots", np.zeros((24, 1, 1, 3), np.uint8), ["benign"] * 24, "{}_{}.png")
    places = ("--cache", tmp_path / "cache", "--out", tmp_path / "out")
    assert run(monkeypatch, "--images", tmp_path / "dots", "--patches", folders / "real", *places) == 1
    assert "images of 1 pixels show nothing that could be compared" in capsys.readouterr().err


def test_it_says_when_the_patches_to_judge_by_were_trained_on(folders, quick_networks, monkeypatch, tmp_path, capsys):
    few = ("--skip", "diversity", "copies", "artefacts", "grades", "utility", "--cache", tmp_path)
    run(monkeypatch, "--images", folders / "made", "--patches", folders / "real", "--out", tmp_path / "none", *few)
    assert "note: The patches have no split" in capsys.readouterr().out
    assert "The patches have no split" in (tmp_path / "none/report.html").read_text()
    split = shutil.copytree(folders / "real", tmp_path / "real")
    rows = [
        Patch(
            path.relative_to(split).as_posix(),
            path.stem.split("_")[0],
            "",
            None,
            "",
            path.parent.name,
            0,
            0,
            0,
            None,
            1.0,
            1.0,
            side,
        )
        for path in sorted(split.rglob("*.png"))
        for side in ["test" if path.stem < "slide12" else "train"]
    ]
    write_manifest(split, rows)
    run(monkeypatch, "--images", folders / "made", "--patches", split, "--out", tmp_path / "some", *few)
    assert "no split" not in capsys.readouterr().out + (tmp_path / "some/report.html").read_text()


def test_three_images_are_not_accused_and_not_cleared_either(folders, quick_networks, monkeypatch, tmp_path, capsys):
    write(tmp_path / "made", drawn_tissue(3, 32, 5), ["benign"] * 3, "sample_{}_{}.png")
    arguments = ["--images", tmp_path / "made", "--patches", folders / "real", "--cache", tmp_path / "cache"]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "out") == 0
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "out/metrics.json").read_text())
    assert "no fault found by what was tested; see the notes" in printed
    assert "no fault found by what was tested; see the notes" in (tmp_path / "out/report.html").read_text()
    untested = " ".join(record["untested"])
    for part in ("Distances", "Variety", "same place", "Corners, patterns and colour", "look like their label", "Usefulness"):
        assert part in untested and part in printed


@pytest.mark.parametrize("which", ["made", "real"])
def test_all_is_compared_at_the_size_of_the_smallest_image(which, folders, quick_networks, monkeypatch, tmp_path):
    there = {name: shutil.copytree(folders / name, tmp_path / name) for name in ("made", "real")}
    for path in there["real"].rglob("*.png"):
        Image.open(path).resize((40, 40)).save(path)
    last = sorted(there[which].rglob("*.png"))[-1]
    Image.open(last).resize((24, 24)).save(last)
    few = ("--skip", "distances", "diversity", "copies", "artefacts", "grades", "utility", "--cache", tmp_path / "cache")
    assert run(monkeypatch, "--images", there["made"], "--patches", there["real"], "--out", tmp_path, *few) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["settings"]["compared at"] == "24 x 24 pixels"


@pytest.mark.parametrize("which", ["made", "real"])
def test_one_tiny_image_does_not_blind_the_search_for_copies(which, folders, quick_networks, monkeypatch, tmp_path, capsys):
    there = {name: shutil.copytree(folders / name, tmp_path / name) for name in ("made", "real")}
    last = sorted(there[which].rglob("*.png"))[-1]
    Image.open(last).resize((6, 9)).save(last)
    arguments = ("--images", there["made"], "--patches", there["real"], "--out", tmp_path, "--cache", tmp_path / "cache")
    assert run(monkeypatch, *arguments) == 1
    assert f"{last.name} is 6 pixels wide or high" in capsys.readouterr().err


def test_small_images_are_said_to_tell_little():
    assert "16 pixels" in evaluate.too_small(image_set(drawn_tissue(2, 16)))[0]
    assert not evaluate.too_small(image_set(drawn_tissue(2, 32)))


@pytest.mark.parametrize(("stain", "said"), [("none", False), ("macenko", True)])
def test_a_model_of_one_stain_is_said_to_be_compared_with_all(stain, said, tmp_path):
    model, config = ModelConfig("dcgan", 16, 10, 0, (16, 8), (8, 16)), TrainConfig("x", "none", stain_normalize=stain)
    checkpoint.save(tmp_path / "a.pt", Trainer(model, config, [], [], 10, torch.device("cpu")).state())
    notes = evaluate.of_one_stain(load_sampler(tmp_path / "a.pt", torch.device("cpu")))
    assert bool(notes) == said and all("--stain_normalize macenko" in note for note in notes)


def test_a_checkpoint_of_larger_images_is_compared_at_the_patches_size():
    images = drawn_tissue(3, 64)
    assert reduced(images, 64) is images
    expected = images.reshape(3, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(reduced(images, 32) - expected).max() <= 1


def test_slides_on_both_sides_and_another_mix_of_labels_are_said(folders, quick_networks, monkeypatch, tmp_path, capsys):
    names = sorted(path.relative_to(folders / "real").as_posix() for path in (folders / "real").rglob("*.png"))
    shutil.copytree(folders / "real", tmp_path / "real")
    shutil.copytree(folders / "made" / "benign", tmp_path / "made" / "benign")
    flags = ["--images", str(tmp_path / "made"), "--patches", str(tmp_path / "real"), "--skip", "utility"]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    monkeypatch.chdir(tmp_path)

    def evaluated(slides):
        """What is said when patch number n is of slide n % slides and every third one is held out."""
        rows = [f"{name},S{number % slides},{'test' if number % 3 == 0 else 'train'}" for number, name in enumerate(names)]
        (tmp_path / "real" / "patches.csv").write_text("\n".join(["path,slide_id,split", *rows]))
        assert evaluate.main() == 0
        return capsys.readouterr().out

    alone, shared = evaluated(9), evaluated(10)
    assert "are mixed otherwise" in alone and "training patches too" not in alone
    assert "10 of 10 held-out slides have training patches too" in shared


def test_an_unreadable_image_is_named(folders, quick_networks, monkeypatch, tmp_path, capsys):
    write(tmp_path / "made", drawn_tissue(20, 32), ["benign"] * 20, "{}-{}.png")
    (tmp_path / "made" / "benign" / "x.png").write_bytes(b"no image")
    assert run(monkeypatch, "--images", tmp_path / "made", "--patches", folders / "real", "--out", tmp_path / "out") == 1
    assert "x.png is not a readable image" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def tissue():
    """Real patches of 64 pixels (256 at full resolution) by split, from the tiles' middle level."""
    if not SLIDES.is_dir():
        pytest.skip("needs the prostate slides")
    records = read_train_csv(SLIDES / "train.csv")
    split = split_by_slide(records, 0.3)
    sets, groups = {"train": [], "test": []}, {"train": [], "test": []}
    for record in records:
        slide = tifffile.imread(SLIDES / "train_images" / f"{record.slide_id}.tiff", key=1)
        cells = [
            slide[y : y + 64, x : x + 64] for y in range(0, slide.shape[0] - 63, 64) for x in range(0, slide.shape[1] - 63, 64)
        ]
        kept = [cell for cell in cells if (cell.min(2) < 225).mean() > 0.6]
        sets[split[record.slide_id]] += kept
        groups[split[record.slide_id]] += [record.slide_id] * len(kept)
    return {name: np.stack(cells) for name, cells in sets.items()} | {f"{name} slides": np.array(groups[name]) for name in sets}


def test_real_tissue_of_other_slides_is_not_accused(tissue):
    half = min(len(tissue["test"]) // 2, 48)
    thumbnails = tissue["train"].reshape(-1, 32, 2, 32, 2, 3).mean((2, 4)).astype(np.uint8)
    other = tissue["test"][-half:]
    suspicions = pixel_suspicions(tissue["test"][:half], other, thumbnails)
    assert all((suspicion.excess < 1).all() for suspicion in suspicions)
    copies = np.concatenate([tissue["train"][:5, ::-1], tissue["test"][:half]])
    assert (pixel_suspicions(copies, other, thumbnails)[0].excess > 1).sum() == 5


def test_a_ring_in_the_corner_of_real_tissue_is_found(tissue):
    reference = position_maps(tissue["train"], tissue["train slides"])
    rows, columns = np.mgrid[:64, :64]
    ringed = tissue["test"].astype(int)
    ringed[:, np.abs(np.hypot(rows - 8, columns - 8) - 5) < 1] -= 25
    worst = {}
    for name, images in (("real", tissue["test"]), ("ringed", np.clip(ringed, 0, 255).astype(np.uint8))):
        worst[name] = max(
            np.abs(maps).max() for maps in deviations(position_maps(images, tissue["test slides"]), reference).values()
        )
    assert worst["real"] < LIMIT < worst["ringed"]


@pytest.mark.slow
@pytest.mark.skipif(not (INCEPTION_WEIGHTS.installed() and LITE0_WEIGHTS.installed()), reason="needs the weights")
def test_with_the_real_networks(folders, monkeypatch, tmp_path):
    arguments = ["--images", folders / "made", "--patches", folders / "real", "--max_images", 24, "--device", "cpu"]
    assert run(monkeypatch, *arguments, "--out", tmp_path, "--cache", tmp_path / "cache") == 0
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert set(record["distances"]) == {"inception-v3-2048", "efficientnet-lite0-128"}
    assert record["distances"]["inception-v3-2048"]["all"]["generated against training"]["fid_biased"]
    assert set(record["copies"]["kinds"]) == {"whole image", "half image", "turned or resized"}
