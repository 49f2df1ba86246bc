"""Which checkpoint a run goes on from."""

from types import SimpleNamespace

import pytest
import torch

from training import checkpoint
from training.resume import find_state


def write(path, epoch):
    progress = {"images": 10 * epoch, "images_per_epoch": 10, "best_kid": 1.0}
    checkpoint.save(
        path, {"model": {}, "config": {}, "classes": [], "progress": progress, "generator": {"w": torch.ones(2) * epoch}}
    )


@pytest.fixture
def folder(tmp_path):
    """A run of 4 epochs that was gone on with up to the sixth."""
    for name, epoch in (("G_final.pt", 4), ("epoch_0005.pt", 5), ("latest.pt", 6)):
        write(tmp_path / name, epoch)
    return tmp_path


def found(folder, name):
    return find_state(SimpleNamespace(resume=str(folder / name)), folder, folder)[0].name


def test_what_came_out_of_the_final_checkpoint_stands_in_for_it(folder, capsys):
    assert found(folder, "G_final.pt") == "latest.pt"
    said = capsys.readouterr().out
    assert "G_final.pt is at epoch 4.00 and its training was gone on with" in said and "latest.pt, at epoch 6.00" in said
    checkpoint.keep_as(folder / "G_final.pt", folder / "start.pt")
    for name in ("start.pt", "epoch_0005.pt", "latest.pt"):
        assert found(folder, name) == name
    assert capsys.readouterr().out == ""


def test_a_damaged_newest_one_is_said_and_the_next_stands_in(folder, capsys):
    (folder / "latest.pt").write_bytes(b"torn")
    assert found(folder, "G_final.pt") == "epoch_0005.pt"
    assert "warning: " in capsys.readouterr().out


def test_the_final_checkpoint_is_itself_where_others_are_behind_it(folder):
    write(folder / "latest.pt", 3)  # gone back to an earlier one, and on from there
    assert found(folder, "G_final.pt") == "G_final.pt"


def test_bare_weights_are_taken_over_once(folder):
    torch.save({"w": torch.ones(3)}, folder / "G_final.pt")
    assert found(folder, "G_final.pt") == "latest.pt"


def test_what_is_kept_is_never_written_over(folder):
    def keep(epoch):
        return checkpoint.keep_other_latest(folder, 10 * epoch, {"w": torch.ones(2) * epoch})

    assert keep(6) is None
    first, second = keep(4), keep(5)
    assert (first.name, second.name) == ("kept_epoch_0006.pt", "kept_epoch_0006_2.pt")
    assert (
        checkpoint.keep_other_latest(folder, 60, {"w": torch.zeros(2)}).name == "kept_epoch_0006_3.pt"
    )  # as far, and not the same
    checkpoint.prune(folder, 0)
    assert first.exists() and first not in checkpoint.all_in(folder)
    (folder / "latest.pt").write_bytes(b"torn")
    assert keep(4) is None
