"""Checkpoints: whole or refused in a sentence; nothing is ever executed."""

import os
import pickle

import pytest
import torch

from common.errors import UserError
from training import checkpoint


def state(images=0):
    return {"progress": {"images": images}, "weights": torch.arange(10_000.0)}


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "latest.pt", state(5))
    loaded = checkpoint.load(tmp_path / "latest.pt")
    assert loaded["progress"]["images"] == 5 and torch.equal(loaded["weights"], torch.arange(10_000.0))
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"]


@pytest.mark.parametrize("keep", [0, 1, 100, 0.3, 0.9, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "latest.pt"
    checkpoint.save(path, state())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError):
        checkpoint.load(path)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path, share):
    path = tmp_path / "latest.pt"
    checkpoint.save(path, state())
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged|not a whole"):
        checkpoint.load(path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_no_pickle_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "weights": Hostile()}, "new.pt")
    torch.save(Hostile(), "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("new.pt", "old.pt", "plain.pt"):
        with pytest.raises(UserError):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{}, [1, 2], {"format": 99, "x": 1}, {"x": 1}])
def test_other_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [{"epoch": 3, "model_state_dict": {"w": torch.ones(2)}}, {"netG": {}, "netD": {}}])
def test_other_programs_checkpoints_are_called_that(tmp_path, content):
    torch.save(content, tmp_path / "tut.pt")
    with pytest.raises(UserError, match="was not written by train.py.*plain state_dict of a DCGAN generator"):
        checkpoint.load(tmp_path / "tut.pt")


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="name a file that train.py wrote"):
        checkpoint.load(tmp_path / "none.pt")


def test_newest_whole_falls_back_and_says_why(tmp_path):
    for age, name in ((3, "epoch_0010.pt"), (2, "epoch_0020.pt"), (1, "latest.pt")):
        checkpoint.save(tmp_path / name, state(age))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "latest.pt").write_bytes(b"torn")
    os.utime(tmp_path / "latest.pt", (999, 999))
    path, loaded, complaints = checkpoint.newest_whole(tmp_path)
    assert path.name == "epoch_0020.pt" and loaded["progress"]["images"] == 2
    assert len(complaints) == 1 and "latest.pt" in complaints[0]
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.newest_whole(tmp_path / "nowhere")


def test_latest_comes_first_whatever_a_copy_did_to_the_times(tmp_path):
    for age, name in enumerate(("epoch_0010.pt", "epoch_0020.pt", "latest.pt")):
        checkpoint.save(tmp_path / name, state(age))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert checkpoint.newest_whole(tmp_path)[0].name == "latest.pt"
    assert [path.name for path in checkpoint.all_numbered(tmp_path)] == ["epoch_0010.pt", "epoch_0020.pt"]


def test_a_run_is_complete_when_nothing_came_after_its_end(tmp_path):
    assert not checkpoint.is_complete(tmp_path)
    for name, time in (("latest.pt", 10), ("G_final.pt", 20)):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time, time))
    assert checkpoint.is_complete(tmp_path)
    os.utime(tmp_path / "latest.pt", (30, 30))  # gone on with, and not yet at the end
    assert not checkpoint.is_complete(tmp_path)
    (tmp_path / "latest.pt").unlink()
    assert checkpoint.is_complete(tmp_path)


def test_prune_goes_by_time_and_not_by_number(tmp_path):
    for age, name in enumerate(("epoch_0003.pt", "epoch_0004.pt", "epoch_0009.pt")):  # gone back from 9 to 2, and on
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    checkpoint.prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch_0003.pt", "epoch_0004.pt"}


def test_prune_keeps_the_newest_numbered_and_all_named_ones(tmp_path):
    for name in ("epoch_0010.pt", "epoch_0020.pt", "epoch_0100.pt", "best.pt", "latest.pt", "G_final.pt", "mine.pt"):
        (tmp_path / name).write_text("x")
    checkpoint.prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "epoch_0020.pt",
        "epoch_0100.pt",
        "best.pt",
        "latest.pt",
        "G_final.pt",
        "mine.pt",
    }


def test_keep_as_survives_the_next_save(tmp_path):
    checkpoint.save(tmp_path / "latest.pt", state(1))
    checkpoint.keep_as(tmp_path / "latest.pt", tmp_path / "epoch_0001.pt")
    checkpoint.save(tmp_path / "latest.pt", state(2))
    assert checkpoint.load(tmp_path / "epoch_0001.pt")["progress"]["images"] == 1
