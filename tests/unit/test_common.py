"""What every stage leans on: whole files, paths that stay inside, exit codes, escaped reports, progress, seeds."""

import argparse
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import cli
from common.errors import UserError
from common.files import inside, remove_leftovers, replacing, sha256, write_text
from common.film import write_film
from common.html import data_uri, render
from common.pictures import grid, save
from common.progress import say, track
from common.seeding import derive_seed


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path, "w") as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as stop:
        write_text(tmp_path / "file.txt", "x")
    assert stop.value.filename == str(tmp_path / "file.txt") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["grid.png", "film.gif", "film.mp4"])
def test_a_picture_or_film_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, name):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    frames = np.zeros((3, 16, 16, 3), np.uint8)
    write = (
        (lambda: save(grid(frames, 3), tmp_path / name)) if name == "grid.png" else lambda: write_film(tmp_path / name, frames, 5)
    )
    write()
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as stop:
        write()
    assert stop.value.filename == str(tmp_path / name) and (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    program = (
        "import os, sys; from common.files import replacing\nwith replacing(__import__('pathlib').Path(sys.argv[1]), 'w') as f:\n"
    )
    program += " f.write('half'); f.flush(); os.kill(os.getpid(), 9)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program, path], cwd=root).returncode == -9
    assert path.read_text() == "old"
    others = [tmp_path / f".file.txt.{os.getppid()}.1.tmp", tmp_path / ".file.txt.tmp", tmp_path / "file.txt.1.1.tmp"]
    ours = [tmp_path / f".file.txt.{os.getpid()}{thread}.tmp" for thread in (".1", "")]
    for left in others + ours:
        left.touch()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_files_get_the_users_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "", "a\\b", "a\0b", ".."])
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    with pytest.raises(UserError):
        inside(tmp_path, path)


def test_paths_inside_are_joined(tmp_path):
    assert inside(tmp_path, "benign/a b é.png") == tmp_path / "benign" / "a b é.png"


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf")


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (cli.positive_int, "3", ["0", "-1", "1.5", "x"]),
        (cli.natural, "0", ["-1", "nan"]),
        (cli.positive_float, "0.5", ["0", "inf", "nan", "-2"]),
        (cli.non_negative_float, "0", ["-0.1", "inf"]),
        (cli.fraction, "1", ["1.1", "-0.1", "nan"]),
    ],
)
def test_argument_types(kind, good, bad):
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not"):
            kind(text)


def test_a_picture_is_named_as_one():
    assert cli.picture_file("new/grid.PNG").name == "grid.PNG"
    for text in ("grid", "grid.foo", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="give the picture one of these endings"):
            cli.picture_file(text)


def failing():
    raise UserError("the disk is full; free some space")


@pytest.mark.parametrize("main, code", [(lambda: None, 0), (lambda: 143, 143), (failing, 1)])
def test_exit_codes(main, code, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    assert exit.value.code == code
    if code == 1:
        assert capsys.readouterr().err == "error: the disk is full; free some space\n"


def test_names_that_are_no_text_can_be_said(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", errors="strict"))
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: say("caf\udce9"))
    assert left.value.code == 0 and written.getvalue() == b"caf\\udce9\n"


def test_interrupt_is_130():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        cli.run(interrupted)
    assert exit.value.code == 130


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def test_existing_folder_says_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.existing_folder(tmp_path, "slides", "name them") == tmp_path
    with pytest.raises(UserError, match="does not exist; name them"):
        cli.existing_folder(tmp_path / "none", "slides", "name them")
    with pytest.raises(UserError, match="is a file"):
        cli.existing_folder(tmp_path / "file", "slides", "name them")


def test_reports_escape_everything():
    page = render('{% extends "page.html" %}{% block body %}{{ name }}{% endblock %}', "<b>", name="<script>alert(1)</script>")
    assert "<script>" not in page and "&lt;script&gt;" in page and "<title>&lt;b&gt;" in page


def test_pictures_travel_inside_the_page():
    assert data_uri(np.zeros((2, 2, 3), np.uint8)).startswith("data:image/png;base64,")


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = np.asarray(grid(images, 2))
    assert sheet.shape == (14, 14, 3)
    assert [sheet[3, 3, 0], sheet[3, 9, 0], sheet[9, 3, 0], sheet[9, 9, 0]] == [10, 20, 30, 255]


def test_progress_in_a_pipe_is_plain_lines(capsys):
    assert list(track([1, 2, 3], "cut", unit="slides")) == [1, 2, 3]
    out = capsys.readouterr().out
    assert "cut: 3/3 slides" in out and "\r" not in out


def test_seeds_differ_by_each_argument():
    seeds = {derive_seed(seed, purpose, position) for seed in range(5) for purpose in "ab" for position in range(5)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "x", 2) == derive_seed(1, "x", 2)
