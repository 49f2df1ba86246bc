"""train.py as a user runs it: start, stop, resume, refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data.manifest import Patch, write_manifest
from metrics.features import Extractor
from models.config import dcgan_config
from tests.scripts import run_script
from training import checkpoint, presets

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module", autouse=True)
def _narrow_baseline():
    """What runs in this process has few feature maps: what is tested here is around the networks."""

    def narrow(*arguments):
        config = dcgan_config(*arguments)
        return replace(config, g_channels=(8,) * len(config.g_channels), d_channels=(8,) * len(config.d_channels))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "dcgan_config", narrow)
        yield


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """Twelve 64 px patches in two label folders."""
    folder = tmp_path_factory.mktemp("patches")
    random = np.random.default_rng(0)
    for number in range(12):
        path = folder / ("benign", "gleason4")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(90, 220, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


def flags_for(patches, folder, *flags):
    places = ["--checkpoint_dir", folder / "checkpoints", "--log_dir", folder / "logs"]
    return ["--patches", patches, *places, "--device", "cpu", *flags]


def command(patches, folder, *flags):
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags_for(patches, folder, *flags))]


def run(patches, folder, *flags, expect=0):
    return run_script("train", *flags_for(patches, folder, *flags), expect=expect)


START = ("--model", "dcgan", "--image_size", 64, "--batch_size", 4, "--eval_every", 0, "--save_every", 1, "--sample_every", 1)


@pytest.fixture(scope="module")
def finished(patches, tmp_path_factory):
    """A run of 4 epochs without a break."""
    folder = tmp_path_factory.mktemp("run")
    run(patches, folder, "--epochs", 4, *START, "--tensorboard")
    return folder


def test_a_run_leaves_checkpoints_logs_and_pictures(finished):
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert {"latest.pt", "G_final.pt", "epoch_0002.pt", "epoch_0003.pt", "epoch_0004.pt"} <= names
    assert "epoch_0001.pt" not in names  # --keep 3
    logs = finished / "logs"
    assert {path.name for path in (logs / "samples").iterdir()} == {
        "real.png",
        *(f"epoch_{epoch:04d}.png" for epoch in range(1, 5)),
    }
    rows = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["images"] == 48 and rows[-1]["epoch"] == 4
    assert {"loss_d", "loss_g", "acc_real", "acc_fake", "grad_d", "grad_g", "img_s", "wait", "left_s"} <= set(rows[-1])
    assert list((logs / "tensorboard").glob("events*"))
    text = (logs / "train.log").read_text()
    assert "\r" not in text and "done: 4 epochs, 48 images" in text
    page = (logs / "report.html").read_text()
    assert "Done: epoch 4.0 of 4, 48 of 48 images" in page and page.count("data:image/jpeg") == 5


def test_stopping_and_resuming_gives_the_same_weights_bit_for_bit(patches, finished, tmp_path):
    run(patches, tmp_path, "--epochs", 1, *START)
    run(patches, tmp_path, "--epochs", 3, "--resume", tmp_path / "checkpoints" / "G_final.pt")
    assert (tmp_path / "logs/samples/epoch_0002.png").exists(), "how often it draws is kept"
    text = run(patches, tmp_path, "--epochs", 4, "--resume")
    assert "scores" not in text
    whole, parts = (checkpoint.load(folder / "checkpoints" / "G_final.pt") for folder in (finished, tmp_path))
    for network in ("generator", "discriminator", "ema"):
        assert all(torch.equal(value, parts[network][name]) for name, value in whole[network].items()), network
    for name in ("opt_g", "opt_d"):
        moments = zip(whole[name]["state"].values(), parts[name]["state"].values(), strict=True)
        assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in moments)
    last = "epoch_0004.png"
    assert (finished / "logs/samples" / last).read_bytes() == (tmp_path / "logs/samples" / last).read_bytes()


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def start():
    """Starts train.py as a program of its own, which does not outlive the test."""
    started = []

    def begin(patches, folder, *flags, under=()):
        words = [*under, *command(patches, folder, *flags)]
        started.append(subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()  # without effect once it has left


def test_signals_save_and_leave_or_go_on(start, patches, tmp_path):
    latest, log = tmp_path / "checkpoints" / "latest.pt", tmp_path / "logs" / "train.log"
    process = start(patches, tmp_path, "--epochs", 5000, *START[:8])
    wait_for(lambda: log.exists() and "start:" in log.read_text())
    wait_for(lambda: (tmp_path / "logs/samples/real.png").exists())
    process.send_signal(signal.SIGUSR1)
    wait_for(latest.exists)
    saved = checkpoint.load(latest)["progress"]["images"]
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 143, output
    assert checkpoint.load(latest)["progress"]["images"] > saved
    assert "stopped by SIGTERM after saving" in log.read_text() and "Traceback" not in output
    # Where it stopped is no multiple of an epoch; going on from there needs no other flag. Under nohup a hangup only saves.
    stopped = images_in(latest)
    process = start(patches, tmp_path, "--resume", under=["nohup"])
    wait_for(lambda: "resume" in log.read_text())
    wait_for(lambda: (tmp_path / "logs/samples/real.png").stat().st_mtime > latest.stat().st_mtime)
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: images_in(latest) > stopped)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=200)
    assert process.returncode == 130


def test_hangup_saves_and_leaves_from_a_terminal(start, patches, tmp_path):
    process = start(patches, tmp_path, "--epochs", 5000, *START[:8])
    wait_for(lambda: (tmp_path / "logs/samples/real.png").exists())
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=200)
    assert process.returncode == 129 and (tmp_path / "checkpoints" / "latest.pt").exists()


def test_another_run_is_not_written_over(patches, finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").iterdir()}
    assert "--run_name" in run(patches, finished, "--epochs", 1, *START, expect=1)
    assert {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").iterdir()} == before


def test_a_run_whose_output_nobody_sees_has_its_notes_and_its_error_in_the_log(patches, tmp_path):
    folder = shutil.copytree(patches, tmp_path / "patches", ignore=shutil.ignore_patterns(".*"))
    (folder / "benign" / "x.png").write_bytes(b"no picture")
    for number in range(20, 40):
        shutil.copy(folder / "benign" / "0.png", folder / "benign" / f"{number}.png")
    run(folder, tmp_path, "--epochs", 1, *START, "--sample_every", 9)
    text = (tmp_path / "logs" / "train.log").read_text()
    assert text.index("--condition label: ") < text.index("patch left out, it cannot be read") < text.index(" start: ")
    assert "condition label ['benign', 'gleason4'], 32 patches" in text
    run(folder, tmp_path, "--epochs", 1, *START, expect=1)
    assert "another run was refused: " in (tmp_path / "logs" / "train.log").read_text().splitlines()[-1]
    run(patches, tmp_path / "other", "--epochs", 1, *START, "--condition", "none")
    assert "condition none, 12 patches" in (tmp_path / "other" / "logs" / "train.log").read_text()


def test_a_finished_run_says_so(patches, finished):
    assert "nothing left to do" in run(patches, finished, "--epochs", 4, "--resume", finished / "checkpoints" / "G_final.pt")


def images_in(path):
    return checkpoint.load(path)["progress"]["images"]


def test_the_command_that_prolonged_a_run_goes_on_where_it_was_stopped(patches, copied):
    folder = copied / "checkpoints"
    final, command = folder / "G_final.pt", ("--epochs", 9, *START[4:], "--resume", folder / "G_final.pt")
    run(patches, copied, "--epochs", 6, *START[4:], "--resume")
    checkpoint.keep_as(folder / "epoch_0004.pt", final)  # as if --epochs 9 had been stopped at 6
    assert "latest.pt, at epoch 6.00" in run(patches, copied, *command) and images_in(folder / "latest.pt") == 9 * 12
    assert "latest.pt at epoch 6.00: " in (copied / "logs" / "train.log").read_text()
    assert "nothing left to do" in run(patches, copied, *command)
    assert not list(folder.glob("kept_*"))


def test_going_back_keeps_what_was_reached(patches, copied):
    folder = copied / "checkpoints"
    back = ("--epochs", 3, "--keep", 1, *START[4:], "--resume", folder / "epoch_0002.pt")
    shutil.copy(folder / "epoch_0002.pt", folder / "start.pt")
    reached = (folder / "latest.pt").read_bytes()
    text = run(patches, copied, *back)
    assert "at epoch 2.00: it stays as" in text and "kept_epoch_0004.pt" in text
    assert images_in(folder / "latest.pt") == 36 and (folder / "kept_epoch_0004.pt").read_bytes() == reached
    run(patches, copied, *back[:-1], folder / "start.pt")
    run(patches, copied, *back[:-1], folder / "start.pt", "--lr_g", 1e-3)
    assert (folder / "kept_epoch_0004.pt").read_bytes() == reached
    assert {path.name for path in folder.glob("kept_*")} == {f"kept_epoch_{n}.pt" for n in ("0004", "0003", "0003_2")}
    run(patches, copied, "--epochs", 5, "--keep", 1, *START[4:], "--resume", folder / "kept_epoch_0004.pt")
    assert images_in(folder / "latest.pt") == 60


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_end_is_made_up_for_where_it_was_missed(patches, copied):
    (copied / "checkpoints" / "G_final.pt").unlink()  # as when a signal comes with the last step
    assert "done: 4 epochs" in run(patches, copied, "--epochs", 4, "--eval_every", 0, "--resume")
    assert checkpoint.load(copied / "checkpoints" / "G_final.pt")["progress"]["images"] == 48
    assert "nothing left to do" in run(patches, copied, "--epochs", 4, "--resume", "--dry_run")


def test_going_back_keeps_what_is_made_from_there(patches, copied):
    numbered = copied / "checkpoints" / "epoch_0002.pt"
    run(patches, copied, "--epochs", 3, "--keep", 1, *START[4:], "--resume", numbered)
    assert [path.name for path in checkpoint.all_numbered(copied / "checkpoints")] == ["epoch_0003.pt"]
    names = {path.name for path in (copied / "logs" / "samples").iterdir()}
    assert "superseded_epoch_0004.png" in names and "epoch_0004.png" not in names and "epoch_0003.png" in names


def test_a_resumed_run_stays_with_its_patches_and_checkpoints(patches, copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(patches, tmp_path / "datasets" / "patches")
    places = ["--checkpoint_dir", copied / "checkpoints", "--log_dir", copied / "logs", "--device", "cpu", *START[4:]]
    run_script("train", *places, "--resume", "--epochs", 8, "--keep", 6)
    assert checkpoint.load(copied / "checkpoints" / "latest.pt")["config"]["patches"] == str(patches)
    run_script("train", *places, "--resume", "--epochs", 9)
    assert len(checkpoint.all_numbered(copied / "checkpoints")) == 6
    text = run_script("train", *places, "--resume", "--epochs", 10, "--patches", "datasets/patches")
    assert f"was trained on {patches} until now and goes on with datasets/patches" in text


def test_the_best_before_going_back_stays_the_best(patches, copied):
    folder = copied / "checkpoints"
    state = checkpoint.load(folder / "epoch_0004.pt")
    checkpoint.save(folder / "best.pt", state | {"progress": state["progress"] | {"best_kid": 0.01}})
    run(patches, copied, "--epochs", 3, *START[4:], "--resume", folder / "epoch_0002.pt")
    assert checkpoint.load(folder / "latest.pt")["progress"]["best_kid"] == 0.01


def test_epochs_count_on_when_the_folder_has_grown_or_shrunk(patches, finished, tmp_path):
    copied, folder = tmp_path / "run", tmp_path / "patches"
    shutil.copytree(finished, copied)
    shutil.copytree(patches, folder, ignore=shutil.ignore_patterns(".*"))
    for number in range(12):
        shutil.copy(folder / "benign" / "0.png", folder / "gleason4" / f"more_{number}.png")
    text = run(folder, copied, "--epochs", 5, *START[4:], "--resume")
    assert "an epoch was 12 patches and is now 24; epochs count on from 4.00" in text
    assert {path.name for path in (copied / "logs" / "samples").iterdir()} == {
        "real.png",
        *(f"epoch_{epoch:04d}.png" for epoch in range(1, 6)),
    }
    rows = [json.loads(line) for line in (copied / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert "epoch 5.0 of 5" in (copied / "logs" / "report.html").read_text()
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows) and rows[-1]["images"] == 48 + 24
    run(patches, copied, "--epochs", 6, *START[4:], "--resume")
    assert checkpoint.load(copied / "checkpoints" / "epoch_0006.pt")["progress"]["images"] == 48 + 24 + 12


def test_an_earlier_end_than_the_checkpoint_is_refused(patches, copied, tmp_path):
    state = checkpoint.load(copied / "checkpoints" / "epoch_0003.pt")
    (tmp_path / "checkpoints" / "a").mkdir(parents=True)
    checkpoint.save(tmp_path / "checkpoints" / "a" / "latest.pt", state)
    text = run(patches, tmp_path, "--run_name", "a", "--resume", "--epochs", 2, expect=1)
    assert "is at epoch 3.00, beyond --epochs 2; give a larger number" in text
    folder = tmp_path / "patches"
    shutil.copytree(patches, folder, ignore=shutil.ignore_patterns(".*"))
    (folder / "benign" / "0.png").unlink()
    assert "beyond --epochs 2" in run(folder, tmp_path, "--run_name", "a", "--resume", "--epochs", 2, expect=1)
    assert not (tmp_path / "checkpoints" / "a" / "G_final.pt").exists()


def test_a_run_from_another_folders_checkpoint_leaves_that_runs_log_alone(patches, copied, tmp_path):
    source, places = copied / "checkpoints" / "epoch_0002.pt", ["--checkpoint_dir", tmp_path / "other"]
    log = {path.name for path in (copied / "logs" / "samples").iterdir()}
    flags = ["--patches", patches, "--device", "cpu", "--resume", source, "--epochs", 3, *START[4:], *places]
    assert "holds another run's log" in run_script("train", *flags, "--log_dir", copied / "logs", expect=1)
    assert {path.name for path in (copied / "logs" / "samples").iterdir()} == log
    run_script("train", *flags, "--log_dir", tmp_path / "logs")


def test_looking_is_possible_beside_a_run(patches, copied, tmp_path):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    run(patches, copied, "--image_size", 64, "--model", "dcgan", "--preview_augmentation", tmp_path / "a.png")
    assert "dcgan" in run(patches, copied, "--image_size", 64, "--model", "dcgan", "--dry_run")
    assert (tmp_path / "a.png").exists() and {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_run_does_not_go_on_in_the_log_of_another(patches, copied, tmp_path):
    whole = {path: path.read_bytes() for path in (copied / "logs").rglob("*") if path.is_file() and path.name != "train.log"}
    run(patches, tmp_path, "--epochs", 1, *START)
    other = ["--patches", patches, "--device", "cpu", "--checkpoint_dir", tmp_path / "checkpoints", "--epochs", 2, "--resume"]
    text = run_script("train", *other, "--log_dir", copied / "logs", expect=1)
    assert f"holds another run's log than that of the checkpoints in {tmp_path / 'checkpoints'}; name this run's own" in text
    assert {path: path.read_bytes() for path in whole} == whole
    *_, last = (copied / "logs" / "train.log").read_text().splitlines()
    assert "note: another run was refused: " in last and "error: " not in last
    for name in ("checkpoints", "logs"):  # out of the way, and another one begins in their place: they are still one run's
        (copied / name).rename(copied / f"first_{name}")
    run(patches, copied, "--epochs", 1, *START)
    first = ["--checkpoint_dir", copied / "first_checkpoints", "--log_dir", copied / "first_logs"]
    run_script("train", "--patches", patches, "--device", "cpu", *first, "--epochs", 5, *START[4:], "--resume")
    (copied / "logs" / "samples" / "epoch_0001.png").unlink()  # as before the first picture
    new = ["--checkpoint_dir", tmp_path / "new", "--log_dir", copied / "logs", "--epochs", 1]
    assert "holds another run's log" in run_script("train", "--patches", patches, "--device", "cpu", *new, *START, expect=1)


def test_as_many_checkpoints_stay_as_were_asked_for_also_when_resumed(patches, copied, tmp_path):
    for keep, kept in ((1, 1), (6, 6)):
        folder = shutil.copytree(copied, tmp_path / str(keep))
        run(patches, folder, "--epochs", 5, *START[4:], "--keep", keep, "--resume")
        run(patches, folder, "--epochs", 9, *START[4:], "--resume")
        assert len(checkpoint.all_numbered(folder / "checkpoints")) == kept


@pytest.mark.parametrize("held_out", [0, 4])
def test_patches_too_few_to_score_by_are_trained_on_to_the_end(patches, tmp_path, held_out, monkeypatch):
    monkeypatch.setattr("metrics.watch.inception", lambda device: Extractor("mean", "", lambda b: b.float().mean((2, 3)) / 255))
    pictures = sorted(patches.rglob("*.png"))
    for split, some in (("train", pictures[:2]), ("test", pictures[2 : 2 + held_out])):
        for number, path in enumerate(some):
            target = tmp_path / "few" / split / "benign" / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    text = run(tmp_path / "few", tmp_path, "--epochs", 2, "--model", "dcgan", "--image_size", 64, "--batch_size", 2)
    assert "done: 2 epochs" in text
    assert ("there are no scores during training" in text) == (held_out == 0)


def test_a_best_of_another_program_is_no_best(patches, copied):
    torch.save({"epoch": 3}, copied / "checkpoints" / "best.pt")
    run(patches, copied, "--epochs", 5, *START[4:], "--resume", copied / "checkpoints" / "G_final.pt")
    assert checkpoint.load(copied / "checkpoints" / "latest.pt")["progress"]["best_kid"] == float("inf")


def test_odd_checkpoints_are_refused(patches, copied):
    state = checkpoint.load(copied / "checkpoints" / "latest.pt")
    name = next(iter(state["generator"]))
    broken = state["generator"] | {name: torch.full_like(state["generator"][name], float("nan"))}
    for change, words in (
        ({"generator": broken}, "had diverged"),
        ({"progress": 3}, "does not fit its own description"),
        ({"progress": state["progress"] | {"images_per_epoch": 0}}, "does not fit its own description"),
        ({"progress": state["progress"] | {"origin": (float("nan"), 0)}}, "does not fit its own description"),
        ({"classes": ["benign", "gleason4", "gleason5"]}, "does not fit its own description"),
    ):
        checkpoint.save(copied / "checkpoints" / "latest.pt", state | change)
        assert words in run(patches, copied, "--epochs", 9, "--resume", copied / "checkpoints" / "latest.pt", expect=1)


def test_contradictions_and_missing_things_are_one_sentence(patches, finished, tmp_path):
    final = finished / "checkpoints" / "G_final.pt"
    assert "contradicts" in run(patches, finished, "--resume", final, "--image_size", 128, expect=1)
    assert "contradicts" in run(patches, finished, "--resume", final, "--condition", "none", expect=1)
    assert "contradicts" in run(patches, finished, "--resume", final, "--preset", "gpu", expect=1)
    assert "extract_patches.py" in run(tmp_path / "nothing", tmp_path, expect=1)
    assert "leave one of them out" in run(patches, tmp_path, "--condition", "none", "--grading", 1, expect=1)
    assert "no checkpoint" in run(patches, tmp_path, "--resume", tmp_path / "x.pt", expect=1)
    assert "at least 2" in run(patches, tmp_path, "--batch_size", 1, expect=2)
    assert "--norm belongs to --model improved" in run(patches, tmp_path, "--model", "dcgan", "--norm", "instance", expect=2)
    assert "--grow_images belongs to" in run(patches, tmp_path, "--model", "dcgan", "--grow_images", 7, expect=2)
    assert "--run_name" in run(patches, tmp_path, "--run_name", "../x", expect=2)
    assert "bent by 8 at most" in run(patches, finished, "--resume", final, "--epochs", 9, "--elastic", 9, expect=1)
    assert not list(tmp_path.rglob("*.pt"))


def test_dry_run_and_preview_write_no_run(patches, tmp_path):
    text = run(patches, tmp_path, "--dry_run", *START)
    assert "one epoch" in text and "images/s" in text and "parameters" in text
    assert "left column before augmentation" in run(
        patches, tmp_path, "--image_size", 64, "--rotation", 20, "--preview_augmentation", tmp_path / "new/preview.png"
    )
    assert Image.open(tmp_path / "new/preview.png").size[0] > 8 * 64
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "logs").exists()


def test_bare_weights_are_taken_over_and_kept(patches, tmp_path):
    from tests.unit.test_models import legacy_networks

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    g, d = legacy_networks()
    torch.save(g.state_dict(), folder / "G_final.pt")
    torch.save(d.state_dict(), folder / "D_final.pt")
    original = (folder / "G_final.pt").read_bytes()
    text = run(patches, tmp_path, "--epochs", 1, "--batch_size", 4, "--eval_every", 0, "--resume", folder / "G_final.pt")
    assert "could not be restored" in text
    assert (folder / "legacy_G_final.pt").read_bytes() == original
    assert checkpoint.load(folder / "G_final.pt")["progress"]["images"] == 12


def test_weights_of_another_folder_are_taken_over_without_writing_there(patches, tmp_path):
    from tests.unit.test_models import legacy_networks

    (tmp_path / "theirs").mkdir()
    torch.save(legacy_networks()[0].state_dict(), tmp_path / "theirs" / "netG.pt")
    run(patches, tmp_path, "--epochs", 1, *START[4:], "--resume", tmp_path / "theirs" / "netG.pt")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["netG.pt"]


def test_scores_during_training_change_nothing_and_keep_the_best(patches, finished, tmp_path, monkeypatch):
    def colours(device):
        return Extractor("mean colour", "", lambda batch: batch.float().mean((2, 3)) / 255)

    monkeypatch.setattr("metrics.watch.inception", colours)
    text = run(patches, tmp_path, "--epochs", 4, *START, "--eval_every", 2)
    assert "too few held-out patches" in text and "the best so far" in text
    rows = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    scored = [row for row in rows if "kid" in row]
    assert [row["epoch"] for row in scored] == [2, 4]
    assert {"kid_se", "precision", "recall"} <= set(scored[0])
    assert not any("acc_held_out" in row for row in rows)  # of training patches it would say that D learns nothing by heart
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")["progress"]
    assert best["best_kid"] == pytest.approx(min(row["kid"] for row in scored), abs=1e-6)
    whole, watched = (checkpoint.load(folder / "checkpoints" / "G_final.pt") for folder in (finished, tmp_path))
    for network in ("generator", "discriminator", "ema"):
        assert all(torch.equal(value, watched[network][name]) for name, value in whole[network].items()), network


def test_against_other_held_out_patches_kid_begins_anew(patches, tmp_path, monkeypatch):
    scores = {"kid": 0.1, "kid_se": 0.001, "scored_on": "a"}
    monkeypatch.setattr("train.Watch", lambda *_, **__: lambda sample: dict(scores))
    every = ("--eval_every", 1)
    run(patches, tmp_path, "--epochs", 1, *START, *every)
    scores |= {"kid": 0.3, "scored_on": "b"}
    text = run(patches, tmp_path, "--epochs", 2, *START[4:], *every, "--resume")
    assert "KID begins anew; best.pt is now best_before.pt" in text and text.count("the best so far") == 1
    folder = tmp_path / "checkpoints"
    kept, best = (checkpoint.load(folder / name)["progress"] for name in ("best_before.pt", "best.pt"))
    assert (kept["best_kid"], kept["best_scored_on"], best["best_kid"], best["best_scored_on"]) == (0.1, "a", 0.3, "b")
    scores |= {"kid": 0.2}
    assert "begins anew" not in run(patches, tmp_path, "--epochs", 3, *START[4:], *every, "--resume")
    assert checkpoint.load(folder / "best.pt")["progress"]["best_kid"] == 0.2
    scores |= {"kid": 0.5, "scored_on": "a"}
    run(patches, tmp_path, "--epochs", 4, *START[4:], *every, "--resume")
    names = ("best_before.pt", "best_before_2.pt", "best.pt")
    assert [checkpoint.load(folder / name)["progress"]["best_kid"] for name in names] == [0.1, 0.2, 0.5]


@pytest.mark.parametrize("scored", [False, True])
def test_held_out_patches_are_judged_in_each_line_without_scores_too(scored, patches, tmp_path, monkeypatch):
    monkeypatch.setattr("train.Watch", lambda *_, **__: lambda sample: {"kid": 0.5, "scored_on": "a"})
    folder = shutil.copytree(patches, tmp_path / "patches", ignore=shutil.ignore_patterns(".*"))
    rows = []
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        name, split = f"slide{number // 3}", "train" if number < 9 else "test"
        rows.append(
            Patch(
                f"{path.parent.name}/{path.name}", name, "radboud", 4, "4+4", path.parent.name, number, 0, 0, 0.5, 0.9, 50.0, split
            )
        )
    write_manifest(folder, rows)
    run(folder, tmp_path, "--epochs", 1, *START, *(["--eval_every", 1] if scored else []))
    lines = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    assert lines and all(0 <= line["acc_held_out"] <= 1 for line in lines if "loss_d" in line)
    assert any("kid" in line for line in lines) == scored
    assert all(0 <= line["acc_trained"] <= 1 and line["side"] == 64 for line in lines if "loss_d" in line)
    text = (tmp_path / "logs/train.log").read_text()
    assert " acc_held_out " in text and " acc_trained " in text
    whole = tmp_path / "unwatched"
    monkeypatch.setattr("train.held_out_patches", lambda *_: None)
    run(folder, whole, "--epochs", 1, *START)
    ends = [checkpoint.load(place / "checkpoints" / "G_final.pt")["generator"] for place in (tmp_path, whole)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), "looking changes nothing"


def test_missing_weights_are_a_note_and_not_the_end(patches, tmp_path, monkeypatch):
    def missing(device):
        raise UserError("not installed")

    monkeypatch.setattr("metrics.watch.inception", missing)
    text = run(patches, tmp_path, "--epochs", 1, *START, "--eval_every", 1)
    assert "note: no scores" in text and "done: 1 epochs" in text


def test_patches_of_an_unknown_class_are_refused(patches, finished, tmp_path):
    for label in ("benign", "gleason5"):
        (tmp_path / "other" / label).mkdir(parents=True)
        Image.new("RGB", (64, 64), "pink").save(tmp_path / "other" / label / "1.png")
    final = finished / "checkpoints" / "G_final.pt"
    assert "gleason5" in run(tmp_path / "other", finished, "--epochs", 9, "--resume", final, expect=1)


def test_the_improved_model_is_the_default_and_resumes(patches, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--grow_from", 32, "--grow_images", 8, *START[2:], "--sample_every", 9)
    run(patches, whole, "--epochs", 4, *flags)
    run(patches, parts, "--epochs", 1, *flags)
    assert "left over" in (parts / "logs" / "train.log").read_text(), "larger images will take longer"
    run(patches, parts, "--epochs", 4, "--resume")
    one, other = (checkpoint.load(folder / "checkpoints" / "G_final.pt") for folder in (whole, parts))
    assert one["model"]["model"] == "improved" and one["model"]["discriminator"] == "projected"
    for name, value in one["ema"].items():
        assert value == other["ema"][name] if isinstance(value, float) else torch.equal(value, other["ema"][name]), name
    assert "contradicts" in run(patches, parts, "--epochs", 5, "--resume", "--discriminator", "residual", expect=1)
    assert "nothing left" in run(patches, parts, "--epochs", 4, "--resume", "--image_size", 64)
    assert "contradicts the checkpoint's 64" in run(patches, parts, "--epochs", 5, "--resume", "--image_size", 128, expect=1)
    pictures = [Image.open(whole / "logs" / "samples" / name) for name in ("real.png", "epoch_0004.png")]
    assert pictures[0].size == pictures[1].size, "both of images of 64 pixels"
    lines = (whole / "logs" / "train.log").read_text()
    for words in ("improved 64x64, painted at 128x128, preset cpu", "augment", "diversity", " res 128 "):
        assert words in lines, words
    assert "left over" not in lines.strip().splitlines()[-2]  # the last line of numbers
    assert "<td>64, painted at 128</td>" in (whole / "logs" / "report.html").read_text()
