"""--stream: patches of more slides than the disk holds, the same as if all had been fetched first."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest

import download_panda_data as script
from common.errors import UserError
from data import stream
from data.ledger import Ledger
from data.panda import KNOWN_BAD, STREAMING
from data.patches import ExtractSettings, extract
from data.transfer import Line
from tests.conftest import sizes
from tests.kaggle_server import Fault, KaggleServer, Options, once

ROOT = Path(script.__file__).parent
REAL = ROOT.parent / "shared" / "data" / "prostate_slides"


def read_folder(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def competition_of(folder):
    return {name: Path(folder) / name for name in read_folder(folder)}


@pytest.fixture
def files(_tiny_slides):
    """Six slides of both providers, 0.8 MB with their masks, 54 places for patches."""
    return competition_of(_tiny_slides)


@pytest.fixture
def streaming(files, tmp_path, monkeypatch):
    """Start a server; return it with a function that streams from it, waiting little and without worker processes."""
    servers = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(script, "Line", partial(Line, first_wait=0.005, longest_wait=0.02, read_timeout=1.0))
    monkeypatch.setattr(script.cli, "terminate_like_interrupt", lambda: None)
    monkeypatch.setattr(stream, "cores", lambda: 0)

    def start(fault=None, **options):
        server = KaggleServer(files, Options(**options), fault).__enter__()
        servers.append(server)
        for name, value in server.environment("token").items():
            monkeypatch.setenv(name, value)
        return server, run

    def run(*arguments, room=400_000):
        monkeypatch.setattr(sys, "argv", ["x", *flags(tmp_path, room), *arguments])
        return script.main()

    yield start
    for server in servers:
        server.__exit__()


def flags(tmp_path, room):
    folders = ["--data_dir", str(tmp_path / "panda"), "--output_dir", str(tmp_path / "streamed")]
    return [*folders, "--stream", "--max_disk", f"{room}", "--patch_size", "256"]


@cache
def plain(folder, max_patches):
    """Patches and manifest of the plain way."""
    with tempfile.TemporaryDirectory() as parent:
        output = Path(parent) / "plain"
        extract(ExtractSettings(data_dir=Path(folder), output_dir=output, workers=0, patch_size=256, max_patches=max_patches))
        return patches_of(output)


def patches_of(output):
    return {name: content for name, content in read_folder(output).items() if name.endswith((".png", "patches.csv"))}


def room_of(files, slides):
    """Bytes that so many of the largest slides take with their masks."""
    pairs = [sum(path.stat().st_size for name, path in files.items() if slide in name) for slide in ("aaa1", "bbb1")]
    return max(pairs) * slides + 10_000


@pytest.mark.parametrize("max_patches", [20, 1000])
def test_streamed_patches_are_those_of_the_plain_way(streaming, files, tmp_path, _tiny_slides, max_patches, monkeypatch):
    room, staging, most = room_of(files, 2), tmp_path / "panda" / STREAMING, []
    visits, visit = Counter(), stream._Visits._visit

    def counted(self, todo, work):
        visits.update(name for item in todo for name in item.files if "mask" in name)
        return visit(self, todo, work)

    monkeypatch.setattr(stream._Visits, "_visit", counted)

    def watch(request):
        most.append(sum(sizes(staging.rglob("*.tiff*"))))  # an error in here would drop the connection

    server, run = streaming(watch)
    run("--max_patches", str(max_patches), room=room)
    assert patches_of(tmp_path / "streamed") == plain(_tiny_slides, max_patches=max_patches)
    assert 0 < max(most) <= room
    assert not list(staging.rglob("*.tiff*"))
    assert all(entry.state == "used" for entry in Ledger(staging).entries.values())
    # A slide is visited again where its share grew when the last slides were known: which ones depends on the order of arrival. In
    # a visit it is fetched once. An image may also be asked for as the probe of the speed.
    assert {name: server.count("storage", name) for name in files if "mask" in name} == visits


def test_without_masks(streaming, tmp_path, _tiny_slides):
    _, run = streaming()
    run("--max_patches", "20", "--no_masks")
    bare = shutil.copytree(_tiny_slides, tmp_path / "bare")
    shutil.rmtree(bare / "train_label_masks")
    assert patches_of(tmp_path / "streamed") == plain(bare, max_patches=20)


def test_masks_are_not_asked_for_later(streaming, tmp_path):
    _, run = streaming()
    run("--max_patches", "6", "--no_masks")
    before = patches_of(tmp_path / "streamed")
    with pytest.raises(UserError, match="was made with masks False; use the same settings again"):
        run("--max_patches", "20")
    assert patches_of(tmp_path / "streamed") == before


def test_patches_that_are_there_need_no_more_room(streaming, tmp_path, monkeypatch):
    _, run = streaming()
    run("--max_patches", "20")
    made = sum(sizes(path for path in (tmp_path / "streamed").rglob("*") if path.is_file()))
    needed = 400_000 + 20 * 256 * 256 * 3
    monkeypatch.setattr(stream, "free_disk", lambda _: needed - made // 2)
    run("--max_patches", "20")
    monkeypatch.setattr(stream, "free_disk", lambda _: needed - 2 * made)
    with pytest.raises(UserError, match="may be needed"):
        run("--max_patches", "20")


def test_a_slide_that_came_again_without_its_mask_is_waited_for(streaming, tmp_path, _tiny_slides):
    _, run = streaming()
    run("--max_patches", "6")
    image = tmp_path / "panda" / STREAMING / "train_images" / "aaa3.tiff"  # as a run leaves it that is stopped between the two
    shutil.copy(_tiny_slides / "train_images" / "aaa3.tiff", image)
    run("--max_patches", "20")
    assert patches_of(tmp_path / "streamed") == plain(_tiny_slides, max_patches=20)


def test_a_finished_stream_fetches_nothing_and_a_larger_one_fetches_again(streaming, files, tmp_path, _tiny_slides):
    server, run = streaming()
    run("--max_patches", "6")
    seen = server.count("storage")
    run("--max_patches", "6")
    assert server.count("storage") == seen
    run("--max_patches", "20")
    assert server.count("storage") > seen
    assert patches_of(tmp_path / "streamed") == plain(_tiny_slides, max_patches=20)


def test_killed_at_any_point_it_goes_on_without_loss_or_double(streaming, files, tmp_path, _tiny_slides):
    server, run = streaming()
    code = "from data import stream; stream.cores = lambda: 0; import download_panda_data as s; s.cli.run(s.main)"
    command = [sys.executable, "-c", code, *flags(tmp_path, room_of(files, 2)), "--max_patches", "20", "--limit_rate", "600kB"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    staging, streamed = tmp_path / "panda" / STREAMING, tmp_path / "streamed"
    conditions = (
        lambda: list(streamed.rglob("*.png")),
        lambda: (staging / "downloads.csv").exists() and ",used" in (staging / "downloads.csv").read_text(),
    )
    for condition in conditions:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 200
        while not condition() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert condition()
    run("--max_patches", "20", room=room_of(files, 2))
    assert patches_of(streamed) == plain(_tiny_slides, max_patches=20)
    assert not list(staging.rglob("*.tiff*"))


def test_a_slide_that_does_not_arrive_is_named_and_the_next_run_completes(streaming, files, tmp_path, _tiny_slides):
    broken = "train_images/aaa2.tiff"
    server, run = streaming(wrong_md5=(broken,))
    with pytest.raises(UserError, match=r"1 slide\(s\) did not arrive, the first is aaa2"):
        run("--max_patches", "20")
    server.options.wrong_md5 = ()
    run("--max_patches", "20")
    assert patches_of(tmp_path / "streamed") == plain(_tiny_slides, max_patches=20)


def test_faults_change_nothing(streaming, tmp_path, _tiny_slides):
    _, run = streaming(once("storage", Fault(after=20_000, how="reset"), times=6))
    run("--max_patches", "20")
    assert patches_of(tmp_path / "streamed") == plain(_tiny_slides, max_patches=20)


def test_a_corrected_table_is_followed_and_what_nobody_wants_any_more_goes(streaming, tmp_path, _tiny_slides):
    _, run = streaming()
    run("--max_patches", "1000")
    table = tmp_path / "panda" / "train.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()]
    corrected = [[*row[:2], "5", "4+5"] if row[0] == "bbb2" else row for row in rows]
    assert corrected != rows
    table.write_text("".join(",".join(row) + "\n" for row in corrected))
    stray = tmp_path / "panda" / STREAMING / "train_images" / "ccc9.tiff.part"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"of an earlier choice")
    run("--max_patches", "1000")
    slides = shutil.copytree(_tiny_slides, tmp_path / "corrected")
    shutil.copy(table, slides / "train.csv")
    assert patches_of(tmp_path / "streamed") == plain(slides, max_patches=1000)
    assert not stray.exists()


def test_a_bound_below_one_slide_is_refused(streaming, tmp_path):
    _, run = streaming()
    with pytest.raises(UserError, match="--max_disk is smaller than the largest slide"):
        run(room=10_000)


def test_the_plain_way_does_not_use_the_folder_of_a_stream(streaming, tmp_path, _tiny_slides):
    _, run = streaming()
    run("--max_patches", "20")
    before = patches_of(tmp_path / "streamed")
    with pytest.raises(UserError, match="was made with data_dir"):
        extract(ExtractSettings(data_dir=_tiny_slides, output_dir=tmp_path / "streamed", workers=0, patch_size=256, max_patches=20))
    assert patches_of(tmp_path / "streamed") == before


def test_what_came_of_it_is_said_and_no_patch_is_a_failure(streaming, capsys):
    _, run = streaming()
    assert run("--max_patches", "500") == 0
    out = capsys.readouterr().out
    assert "gleason3" in out and "short of --max_patches 500" in out and "54 patches from 6 slides" in out
    assert run("--patch_size", "4096", "--max_patches", "9", "--output_dir", "large") == 1
    assert "error: no patch at all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slide", "sentence"), [("nowhere", "not in train.csv"), ("absent", "none of the 1 chosen"), ("bad", "known to be bad")]
)
def test_slides_that_cannot_be_used_are_named(slide, sentence, streaming, files, tmp_path):
    table, known_bad = tmp_path / "train.csv", next(iter(KNOWN_BAD))
    table.write_text(files["train.csv"].read_text() + f"absent,radboud,0,negative\n{known_bad},radboud,0,negative\n")
    files["train.csv"] = table
    files[f"train_images/{known_bad}.tiff"] = files["train_images/aaa1.tiff"]
    (tmp_path / "ids.txt").write_text(f"{known_bad if slide == 'bad' else slide}\n")
    _, run = streaming()
    with pytest.raises(UserError, match=sentence):
        run("--ids", str(tmp_path / "ids.txt"))


def test_slides_known_to_be_bad_are_named_and_not_fetched(streaming, files, tmp_path, capsys):
    table, known_bad = tmp_path / "train.csv", next(iter(KNOWN_BAD))
    table.write_text(files["train.csv"].read_text() + f"{known_bad},radboud,0,negative\n")
    files["train.csv"], files[f"train_images/{known_bad}.tiff"] = table, files["train_images/aaa1.tiff"]
    server, run = streaming()
    run("--max_patches", "6")
    assert f"left out {known_bad}: {KNOWN_BAD[known_bad]}" in capsys.readouterr().out
    assert server.count("storage", "train_images/aaa1.tiff") and not server.count("storage", f"train_images/{known_bad}.tiff")


def test_dry_run(streaming, tmp_path, capsys):
    _, run = streaming()
    run("--dry_run")
    assert "of slides and" in capsys.readouterr().out
    assert not (tmp_path / "streamed").exists() and not (tmp_path / "panda").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max_disk", "5GB"], "--max_disk needs --stream"),
        (["--stream", "--verify"], "neither --list nor"),
        (["--stream", "--include_bad"], "leave --include_bad out"),
    ],
)
def test_contradictions(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        script.parse(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real slides are not on this machine")
@pytest.mark.parametrize("max_patches", [300, 10_000])
def test_forty_real_slides_with_room_for_three(streaming, files, tmp_path, max_patches):
    files.clear()
    files.update(competition_of(REAL))
    files.pop("README.md", None)
    server, run = streaming(deflate=True)
    run("--max_patches", str(max_patches), room=4_000_000)
    output = tmp_path / "plain"
    extract(ExtractSettings(data_dir=REAL, output_dir=output, workers=0, max_patches=max_patches))
    assert patches_of(tmp_path / "streamed") == patches_of(output) != {}
    assert sum(server.sent.values()) < 1.05 * sum(path.stat().st_size for path in files.values())
