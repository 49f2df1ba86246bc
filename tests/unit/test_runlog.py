"""Logs: fixed lines, valid JSON, rewinding, and never an end to training."""

import json

import pytest
from PIL import Image

from common.errors import UserError
from training.lock import lock_folder
from training.run import crossed, duration
from training.runlog import METRICS, RunLog, read_metrics


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


@pytest.mark.parametrize(
    "before, after, every, expected", [(0, 1, 1, True), (4, 5, 5, True), (5, 6, 5, False), (3, 12, 5, True), (1, 2, 0, False)]
)
def test_crossed(before, after, every, expected):
    assert crossed(before, after, every) is expected


@pytest.mark.parametrize("seconds, text", [(12, "12s"), (250, "4m10s"), (11100, "3h05m"), (93600, "1d02h")])
def test_duration(seconds, text):
    assert duration(seconds) == text
