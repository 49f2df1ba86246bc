"""Logs: fixed lines, valid JSON, rewinding, and never an end to training."""

import errno
import json
import os

import pytest
from PIL import Image

from common.errors import UserError
from common.progress import say, track
from training.lock import folders_of_a_run, lock_folder
from training.run import crossed, duration
from training.runlog import METRICS, RunLog, log_line, noted, read_metrics


def test_metrics_are_valid_json_whatever_the_number(tmp_path):
    RunLog(tmp_path).metrics({"loss": float("nan"), "norm": float("inf"), "epoch": 1}, images=8)
    assert json.loads((tmp_path / METRICS).read_text()) == {"images": 8, "loss": None, "norm": None, "epoch": 1}


def test_rewind_sets_later_rows_aside_and_drops_a_torn_line(tmp_path):
    log = RunLog(tmp_path)
    for images in (8, 16, 24):
        log.metrics({"loss": 1.0}, images)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"images": 32, "lo')
    for epoch in (1, 2, 3):
        log.picture(f"epoch_{epoch:04d}.png", Image.new("RGB", (8, 8)), epoch)
    log.rewind(16, 2.0)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "epoch_0001.png",
        "epoch_0002.png",
        "superseded_epoch_0003.png",
    }
    rows, torn = read_metrics(tmp_path / METRICS)
    assert [row["images"] for row in rows] == [8, 16] and not torn
    assert json.loads((tmp_path / "metrics.superseded.jsonl").read_text())["images"] == 24
    assert "half written" in (tmp_path / "train.log").read_text()


def test_damage_in_the_middle_is_named(tmp_path):
    (tmp_path / METRICS).write_text('{"images": 1}\nnonsense\n{"images": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path / METRICS)


def test_a_log_that_cannot_be_written_does_not_raise(tmp_path, capsys):
    log = RunLog(tmp_path)
    (tmp_path / "train.log").mkdir()
    log.line("still here")
    assert "training goes on" in capsys.readouterr().out


def test_what_is_said_before_the_log_is_open_and_the_last_error_are_in_it(tmp_path, capsys):
    folder = tmp_path / "logs"
    with pytest.raises(UserError), noted(folder, True) as notes:
        say("note: early")
        assert not folder.exists()
        notes.open()
        log_line(folder, "start")
        say("warning: late")
        list(track([1, 2], "scoring"))
        raise UserError("the disk is full")
    lines = [line.split(" ", 2)[2] for line in (folder / "train.log").read_text().splitlines()]
    assert lines == ["note: early", "start", "warning: late", "error: the disk is full"]
    assert capsys.readouterr().out.count("note: early") == 1
    say("nobody listens any more")
    assert len((folder / "train.log").read_text().splitlines()) == 4


def test_errors_before_the_log_and_faults_of_ours_are_in_it_too(tmp_path, monkeypatch):
    for error, line in ((UserError("no patches"), "error: no patches"), (KeyError("x"), "error: KeyError: 'x'")):
        with pytest.raises(type(error)), noted(tmp_path / "logs", True):
            raise error
        assert (tmp_path / "logs" / "train.log").read_text().endswith(line + "\n")
    with pytest.raises(UserError), noted(tmp_path / "dry", False):
        raise UserError("no patches")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError), noted(tmp_path / "dry", True):
        raise UserError("no patches")
    assert not (tmp_path / "dry").exists()


def test_tensorboard_files_that_cannot_be_written_do_not_end_the_training(tmp_path, capsys):
    class Full:
        def __getattr__(self, name):
            def write(*_, **__):
                raise OSError(28, "No space left on device")

            return write

    log = RunLog(tmp_path)
    log._board = Full()
    log.metrics({"loss": 1.0}, 8)
    log.picture("epoch_0001.png", Image.new("RGB", (8, 8)), 8)
    log.close()
    assert capsys.readouterr().out.count("training goes on without them") == 1


def test_tensorboard_files_appear_on_request(tmp_path):
    log = RunLog(tmp_path, tensorboard=True)
    log.metrics({"loss": 1.0}, 8)
    log.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    with lock_folder(tmp_path), pytest.raises(UserError, match="in use by process"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_a_run_removes_what_a_killed_one_was_writing(tmp_path):
    folders = tmp_path / "checkpoints", tmp_path / "logs"
    left = [folder / f".file.{os.getpid()}.1.tmp" for folder in folders]
    for path in left:
        path.parent.mkdir()
        path.touch()
    with folders_of_a_run(*folders):
        assert not any(path.exists() for path in left)


def test_a_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    lock_folder(tmp_path).close()
    assert "has no locks" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "before, after, every, expected", [(0, 1, 1, True), (4, 5, 5, True), (5, 6, 5, False), (3, 12, 5, True), (1, 2, 0, False)]
)
def test_crossed(before, after, every, expected):
    assert crossed(before, after, every) is expected


@pytest.mark.parametrize("seconds, text", [(12, "12s"), (250, "4m10s"), (11100, "3h05m"), (93600, "1d02h")])
def test_duration(seconds, text):
    assert duration(seconds) == text
