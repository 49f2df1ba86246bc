"""Benchmarks must still run, and refuse bad input as the scripts do."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scripts import run_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/[a-z]*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_flag_that_no_script_has_gets_one_sentence(script):
    if script.stem == "fuzz":
        pytest.importorskip("atheris")
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    text = run_script(name, "--no_such_flag", 1, expect=2)
    assert text.startswith(f"{name}.py: error: ") and text.count("\n") == 1 and "--help" in text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Patches of ten slides and generated images, of two labels and 32 pixels."""
    random = np.random.default_rng(0)
    patches, generated = tmp_path_factory.mktemp("patches"), tmp_path_factory.mktemp("generated")
    for label in ("benign", "gleason4"):
        names = [f"slide{slide}_{place}_0" for slide in range(10) for place in range(25)]
        for folder, own in ((patches, names), (generated, names[:20])):
            (folder / label).mkdir()
            for name in own:
                Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / label / f"{name}.png")
    return patches, generated


def test_generate_speed_runs():
    text = run_script("benchmarks.generate_speed", "--sizes", 64, "--models", "dcgan", "--images", 64, "--rounds", 1)
    assert "dcgan" in text and "ratio" in text


def test_the_classifier_is_taught_in_every_way(folders):
    patches, generated = folders
    flags = ("--patches", patches, "--generated", generated, "--side", 32, "--steps", 2)
    text = run_script("benchmarks.classifier", *flags, "--seeds", 2)
    for way in ("real", "half of each batch generated", "generated alone", "generated first, then real", "real for as long"):
        assert f"\n{way} " in text, way
    assert text.count("±") == 10 and "40 generated images of benign, gleason4" in text


@pytest.mark.parametrize(
    "what, says",
    [
        ("nowhere", "nowhere; make some with generate.py or name yours with --generated"),
        ("empty", "empty; make some with generate.py or name yours with --generated"),
        ("loose", "no labelled images"),
    ],
)
def test_the_classifier_refuses_a_folder_without_labels(folders, tmp_path, what, says):
    folder = tmp_path / what
    if what != "nowhere":
        folder.mkdir()
    if what == "loose":
        Image.new("RGB", (32, 32)).save(folder / "1.png")
    assert says in run_script("benchmarks.classifier", "--patches", folders[0], "--generated", folder, "--side", 32, expect=1)
