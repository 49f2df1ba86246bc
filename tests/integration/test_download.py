"""download_panda_data.py from end to end, with the real Kaggle client, against a Kaggle of our own with every kind of fault."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile

import download_panda_data as script
from common.errors import UserError
from data import download
from data.ledger import Ledger
from data.panda import PROVIDERS
from data.transfer import Line
from tests.conftest import sizes
from tests.kaggle_server import SECRET_KEY, SECRET_SIGNATURE, SECRET_TOKEN, Fault, KaggleServer, Options, once

SCRIPT = Path(script.__file__)
SLIDES = 6
WAYS = ["single", "bundle"]
FIRST = "train_images/slide0.tiff"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small competition: tables, six slides of noise (so that every byte counts), their masks."""
    folder = tmp_path_factory.mktemp("competition")
    rng = np.random.default_rng(0)
    rows = ["image_id,data_provider,isup_grade,gleason_score"]
    found = {}
    for number in range(SLIDES):
        rows.append(f"slide{number},{PROVIDERS[number % 2]},0,negative")
        for name in (f"train_images/slide{number}.tiff", f"train_label_masks/slide{number}_mask.tiff"):
            path = folder / Path(name).name
            tifffile.imwrite(path, rng.integers(0, 256, (256, 256, 3), np.uint8), tile=(256, 256), photometric="rgb")
            found[name] = path.read_bytes()
    return {"train.csv": "\n".join(rows).encode(), "test.csv": b"image_id,data_provider\n", **found}


@pytest.fixture
def kaggle(files, tmp_path, monkeypatch):
    """Start a server; return it with a function that runs the script against it in this process, waiting little."""
    servers = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(script, "Line", partial(Line, first_wait=0.005, longest_wait=0.02, read_timeout=0.6, connect_timeout=2.0))
    monkeypatch.setattr(script.cli, "terminate_like_interrupt", lambda: None)

    def start(way="single", fault=None, changed=None, **options):
        server = KaggleServer(changed or files, Options(**options), fault).__enter__()
        servers.append(server)
        monkeypatch.setattr(download, "FEW_FILES", {"single": 10**9, "bundle": 0}[way])
        for name, value in server.environment("token").items():
            monkeypatch.setenv(name, value)

        def run(*arguments):
            monkeypatch.setattr(sys, "argv", ["download_panda_data.py", "--data_dir", str(tmp_path / "panda"), *arguments])
            return script.main()

        return server, run

    yield start
    for server in servers:
        server.__exit__()


def command(folder, *arguments):
    return [sys.executable, str(SCRIPT), "--data_dir", str(folder), *arguments]


def environment(server, home):
    return {**os.environ, **server.environment("token"), "HOME": str(home), "OMP_NUM_THREADS": "1"}


def assert_whole(folder, files, names=None):
    """Every file is there, byte for byte, entered in the ledger, and nothing half is left."""
    ledger = Ledger(folder)
    for name in names or files:
        assert (folder / name).read_bytes() == files[name], name
        assert ledger.has(name, len(files[name])), name
    left = [path.name for path in folder.rglob("*") if ".part" in path.name or ".unpacked" in path.name or path.suffix == ".tmp"]
    assert not left


def wasted(server, files, before=0):
    """Bytes sent beyond what was needed."""
    return sum(server.sent.values()) - before - sum(map(len, files.values()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("deflate", [False, True])
def test_fetches_everything_and_then_nothing(kaggle, files, tmp_path, capsys, way, deflate):
    server, run = kaggle(way, deflate=deflate)
    run()
    assert_whole(tmp_path / "panda", files)
    shown = capsys.readouterr().out
    assert "slides, " in shown and "at the measured" in shown
    assert ("bundle" if way == "bundle" else "single files") in shown
    if way == "bundle":
        assert server.count("bundle") == 1 and server.count("file") <= 2  # train.csv twice: the check, and the table
    seen = len(server.requests)
    run()
    assert "everything is there" in capsys.readouterr().out
    assert len(server.requests) == seen + 2  # the check of the credentials


def test_a_subset_grows_and_masks_can_be_left_out(kaggle, files, tmp_path):
    server, run = kaggle()
    run("--num_slides", "2", "--no_masks")
    folder = tmp_path / "panda"
    first = {path.name for path in (folder / "train_images").iterdir()}
    assert len(first) == 2 and not (folder / "train_label_masks").exists()
    run("--num_slides", "4")
    assert len(list((folder / "train_label_masks").iterdir())) == 4
    assert first < {path.name for path in (folder / "train_images").iterdir()}
    assert server.count("storage", FIRST) <= 2  # once, and perhaps as the probe


def test_ids_grades_and_providers(kaggle, tmp_path):
    _, run = kaggle()
    (tmp_path / "ids.txt").write_text("slide1\nslide2\nslide3\n")
    run("--ids", str(tmp_path / "ids.txt"), "--providers", "radboud", "--grades", "0")
    assert {path.name for path in (tmp_path / "panda/train_images").iterdir()} == {"slide1.tiff", "slide3.tiff"}
    with pytest.raises(UserError, match="no slide is left"):
        run("--grades", "5")


def test_list_and_dry_run_write_nothing(kaggle, files, tmp_path, capsys):
    server, run = kaggle("bundle")
    run("--list")
    assert f"{len(files[FIRST]):>14} {FIRST}" in capsys.readouterr().out
    run("--dry_run")
    assert "at the measured" in capsys.readouterr().out
    assert not (tmp_path / "panda").exists() and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("status", [400, 403])
def test_where_the_bundle_is_refused_files_come_one_by_one(kaggle, files, tmp_path, capsys, status):
    _, run = kaggle("bundle", fault=once("bundle", Fault(status)))
    run("--num_slides", "2")
    assert "single files, as fast as Kaggle's rate limit allows" in capsys.readouterr().out
    assert len(list((tmp_path / "panda/train_images").iterdir())) == 2


@pytest.mark.parametrize("content", ["[]", '{"train.csv": null}'])
def test_a_damaged_list_of_files_is_asked_for_again(kaggle, tmp_path, content):
    _, run = kaggle()
    run("--num_slides", "1")
    (tmp_path / "panda" / download.LISTING).write_text(content)
    run("--num_slides", "2")
    assert len(list((tmp_path / "panda/train_images").iterdir())) == 2


FAULTS = {
    "429": Fault(429),
    "429 with a time": Fault(429, "0"),
    "503": Fault(503),
    "expired": Fault(403),
    "reset": Fault(after=100_000, how="reset"),
    "closed": Fault(after=100_000),
    "closed at once": Fault(after=0),
    "stalled": Fault(after=100_000, how="stall", seconds=1.0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAULTS)
def test_passing_faults_cost_nothing_but_time(kaggle, files, tmp_path, way, name):
    target = "bundle" if way == "bundle" else FIRST
    big = [True]

    def fault(request):
        if request.kind == "storage" and request.name == target and request.length > 150_000 and big:
            big.pop()
            return FAULTS[name]
        return None

    server, run = kaggle(way, fault)
    run()
    assert not big
    assert_whole(tmp_path / "panda", files)
    # Beyond the need: the probe, the bundle's directory. A file fetched again would be 197,000 bytes.
    assert wasted(server, files) < 100_000 + (1 << 16)


def test_an_address_that_expires_in_the_middle_is_renewed(kaggle, files, tmp_path):
    servers = []

    def fault(request):
        if request.kind == "storage" and request.length > 150_000 and servers[0].epoch < 3:
            servers[0].expire_addresses()
            return Fault(after=50_000)
        return None

    for way in WAYS:
        server, run = kaggle(way, fault)
        servers[:] = [server]
        run()
        assert server.epoch == 3
        assert_whole(tmp_path / "panda", files)
        shutil.rmtree(tmp_path / "panda")


def test_a_truncated_body_without_length_is_noticed_and_continued(kaggle, files, tmp_path):
    server, run = kaggle(fault=once("storage", Fault(no_length=True, after=120_000), FIRST, times=2))
    run()
    assert_whole(tmp_path / "panda", files)


def test_a_server_without_validators_starts_a_broken_file_anew(kaggle, files, tmp_path):
    server, run = kaggle(fault=once("storage", Fault(after=120_000), FIRST, times=2), validators=False)
    run()
    assert_whole(tmp_path / "panda", files)


@pytest.mark.parametrize("fault", [Fault(after=120_000, whole=True), Fault(after=120_000)])
def test_a_line_that_always_breaks_before_the_end_and_knows_no_parts_is_given_up(kaggle, tmp_path, fault):
    name = "train_images/slide1.tiff"
    server, run = kaggle(
        validators=False, fault=lambda request: fault if request.name == name and request.kind == "storage" else None
    )
    with pytest.raises(UserError, match="1 of 13 files did not arrive"):
        run()
    assert server.count("storage", name) < 40


def test_a_list_that_is_cut_short_is_not_kept(kaggle, files, tmp_path, capsys):
    server, run = kaggle()
    server.files = {}
    with pytest.raises(UserError, match="no train.csv"):
        run()
    server.files = {name: content for name, content in files.items() if "slide5" not in name}
    run()
    assert "1 slides of train.csv are not in Kaggle's file list" in capsys.readouterr().out
    server.files = files
    run()
    assert_whole(tmp_path / "panda", files)


def test_a_corrected_table_stays(kaggle, files, tmp_path, capsys):
    _, run = kaggle()
    run("--num_slides", "2")
    table = tmp_path / "panda" / "train.csv"
    corrected = files["train.csv"].replace(b"negative", b"neg")
    table.write_bytes(corrected)
    run("--num_slides", "4")
    assert table.read_bytes() == corrected and "was changed since it arrived" in capsys.readouterr().out
    table.write_bytes(files["train.csv"].replace(b"slide0,karolinska,0,negative", b"slide0,karolinska,5,5+5"))
    run("--grades", "5", "--dry_run")  # by Kaggle's table no slide would be left
    for content in (corrected, files["train.csv"].replace(b"negative", b"NEGATIVE")):
        table.write_bytes(content)
        run("--verify")
        told = capsys.readouterr().out
        assert "train.csv was changed since it arrived" in told and "other files are what arrived" in told
        run("--num_slides", "4")
        assert table.read_bytes() == content
    table.unlink()
    with pytest.raises(UserError, match="1 of .* no longer what arrived"):
        run("--verify")
    run("--num_slides", "4")
    assert table.read_bytes() == files["train.csv"]


def test_a_bundle_that_gives_no_part_once_is_opened_anew(kaggle, files, tmp_path, capsys):
    for number in (2, 3, 6):  # of the storage's answers for the bundle: the list of contents, the speed, a file
        shutil.rmtree(tmp_path / "panda", ignore_errors=True)
        seen = []

        def fault(request, seen=seen, number=number):
            if request.kind != "storage" or request.name != "bundle":
                return None
            seen.append(request)
            return Fault(whole=True) if len(seen) == number else None

        server, run = kaggle("bundle", fault=fault)
        run()
        assert_whole(tmp_path / "panda", files)
        assert len(seen) > number and server.count("file") <= 2


def test_a_log_that_cannot_be_written_costs_the_log(kaggle, files, tmp_path, capsys):
    _, run = kaggle()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "download.log").symlink_to("/dev/full")
    run()
    assert_whole(tmp_path / "panda", files)
    assert capsys.readouterr().out.count("cannot be written (No space left on device); going on without it") == 1


def test_files_that_are_there_already_need_no_room(kaggle, files, tmp_path, monkeypatch):
    _, run = kaggle()
    for name, content in files.items():
        path = tmp_path / "panda" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(download, "free_disk", lambda folder: 50_000)
    run()
    assert_whole(tmp_path / "panda", files)


@pytest.mark.parametrize("way", WAYS)
def test_a_flipped_bit_is_noticed(kaggle, files, tmp_path, capsys, way):
    flips = [True, True]

    def fault(request):
        due = request.kind == "storage" and request.length > 150_000 and flips
        return Fault(flip=bool(flips.pop())) if due and request.name in (FIRST, "bundle") else None

    _, run = kaggle(way, fault)
    if way == "bundle":  # the last byte of a ranged answer belongs to the member itself where it is continued
        flips[:] = [True]
    run()
    assert_whole(tmp_path / "panda", files)
    assert "checksum" in capsys.readouterr().out or way == "bundle"


def test_a_wrong_checksum_of_the_storage_is_not_taken(kaggle, files, tmp_path):
    server, run = kaggle(wrong_md5=(FIRST,))
    with pytest.raises(UserError, match="1 of .* files did not arrive"):
        run()
    assert not (tmp_path / "panda" / FIRST).exists()
    assert_whole(tmp_path / "panda", files, [name for name in files if name != FIRST])
    server.options.wrong_md5 = ()
    server._objects.clear()
    run()
    assert_whole(tmp_path / "panda", files)


def test_a_zip_wrapped_file_is_unwrapped(kaggle, files, tmp_path):
    _, run = kaggle(wrapped=("train.csv", FIRST), fault=once("storage", Fault(after=90_000), FIRST))
    run()
    assert_whole(tmp_path / "panda", files)


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_leaves_the_folder_is_refused(kaggle, files, tmp_path, way):
    hostile = {**files, "../../evil.tiff": b"x"}
    _, run = kaggle(way, changed=hostile)
    with pytest.raises(UserError, match="not a path inside"):
        run()
    assert not list(tmp_path.parent.glob("evil*")) and not list((tmp_path / "panda").rglob("*.tiff"))


def test_a_missing_file_does_not_stop_the_rest(kaggle, files, tmp_path):
    _, run = kaggle(extra_listing={"train_images/ghost.tiff": 10})
    with pytest.raises(UserError, match="1 of .* files did not arrive"):
        run()
    assert_whole(tmp_path / "panda", files)


def test_rules_not_accepted_stop_it_at_once(kaggle, tmp_path):
    server, run = kaggle(rules_accepted=False)
    with pytest.raises(UserError, match="/rules"):
        run()
    assert server.count("file") == 1 and server.count("storage") == 0


@pytest.mark.parametrize("fault", [Fault(429, "0"), Fault(whole=True)])
def test_without_a_bundle_it_goes_on_with_single_files(kaggle, files, tmp_path, capsys, monkeypatch, fault):
    def broken(request):
        return fault if request.kind == ("bundle" if fault.status else "storage") and request.name == "bundle" else None

    monkeypatch.setattr(script, "Line", partial(script.Line, tries=3))
    _, run = kaggle("bundle", broken)
    run()
    assert "single files, as fast as Kaggle's rate limit allows" in capsys.readouterr().out
    assert_whole(tmp_path / "panda", files)


def test_files_that_are_there_already_are_taken_over(kaggle, files, tmp_path):
    target = tmp_path / "panda" / FIRST
    target.parent.mkdir(parents=True)
    target.write_bytes(files[FIRST])
    half = tmp_path / "panda/train_images/slide1.tiff"
    half.write_bytes(files["train_images/slide1.tiff"][:1000])
    server, run = kaggle()
    run("--workers", "1")
    assert server.count("storage", FIRST) <= 1  # the probe
    assert_whole(tmp_path / "panda", files)


def test_a_foreign_table_is_not_written_over(kaggle, tmp_path):
    (tmp_path / "panda").mkdir()
    (tmp_path / "panda/train.csv").write_text("mine")
    _, run = kaggle()
    with pytest.raises(UserError, match="is not Kaggle's; move it away"):
        run()
    assert (tmp_path / "panda/train.csv").read_text() == "mine"


def test_verify_finds_damage_and_the_next_run_mends_it(kaggle, files, tmp_path, capsys):
    server, run = kaggle()
    run()
    run("--verify")
    assert "all 14 files are what arrived" in capsys.readouterr().out
    folder = tmp_path / "panda"
    damaged = bytearray(files[FIRST])
    damaged[5000] ^= 1
    (folder / FIRST).write_bytes(damaged)
    (folder / "test.csv").unlink()
    seen = len(server.requests)
    with pytest.raises(UserError, match="2 of 14 files"):
        run("--verify")
    shown = capsys.readouterr().out
    assert f"{FIRST}: its checksum has changed" in shown and "test.csv: missing" in shown
    assert len(server.requests) == seen
    run()
    assert_whole(folder, files)


def test_a_torn_ledger_costs_no_bytes(kaggle, files, tmp_path):
    server, run = kaggle()
    run()
    path = tmp_path / "panda/downloads.csv"
    path.write_bytes(path.read_bytes()[:-30])
    before = sum(server.sent.values())
    run()
    assert sum(server.sent.values()) - before <= 1 << 16  # the probe
    assert_whole(tmp_path / "panda", files)


def test_verify_of_nothing(kaggle, tmp_path):
    _, run = kaggle()
    with pytest.raises(UserError, match="nothing has been downloaded"):
        run("--verify")


@pytest.mark.parametrize("way", WAYS)
def test_killed_in_the_middle_it_goes_on_elsewhere_without_loss(kaggle, files, tmp_path, way):
    server, run = kaggle(way)
    run("--num_slides", "1", "--no_masks")  # in the single way the fresh process would choose by itself
    folder = tmp_path / "panda"
    code = (
        f"from data import download; download.FEW_FILES = {download.FEW_FILES}; import download_panda_data as s; s.cli.run(s.main)"
    )
    arguments = command(folder, "--limit_rate", "600kB")[2:]
    there = environment(server, tmp_path) | {"PYTHONPATH": str(SCRIPT.parent)}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=there, cwd=tmp_path)
    wait_for(lambda: max(sizes(folder.rglob("*.part")), default=0) > 60_000, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in {".part", ".tiff"})
    before = sum(server.sent.values())
    assert list(folder.rglob("*.part"))
    elsewhere = shutil.move(folder, tmp_path / "other")
    shutil.copytree(elsewhere, folder)  # other inodes, other times: another machine
    run()
    assert_whole(folder, files)
    needed = sum(map(len, files.values())) - kept
    assert needed * 0.99 < sum(server.sent.values()) - before < needed + 2 * (1 << 16) + 2000  # the probe, the directory, headers


def wait_for(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_soon_and_keeps_the_half(kaggle, files, tmp_path, number):
    server, run = kaggle()
    folder = tmp_path / "panda"
    process = subprocess.Popen(
        command(folder, "--limit_rate", "300kB"),
        env=environment(server, tmp_path),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list(folder.rglob("*.part")), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + number and "Traceback" not in errors
    run()
    assert_whole(folder, files)


def test_two_at_once_share_the_folder(kaggle, files, tmp_path):
    server, _ = kaggle()
    folder = tmp_path / "panda"
    processes = [
        subprocess.Popen(command(folder), env=environment(server, tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    shown = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert_whole(folder, files)
    assert wasted(server, files) < 2 * (1 << 16)
    assert any("everything is there" in text for text in shown)


def test_no_secret_and_no_address_is_written_anywhere(kaggle, files, tmp_path):
    server, _ = kaggle(fault=once("storage", Fault(403)))
    done = subprocess.run(
        command(tmp_path / "panda"), env=environment(server, tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
    log = (tmp_path / "logs/download.log").read_text()
    assert "has expired; trying again" in log and "all 13 files arrived whole" in log
    written = done.stdout + "".join(path.read_text() for path in tmp_path.rglob("*") if path.suffix in {".log", ".csv", ".json"})
    for secret in (SECRET_KEY, SECRET_TOKEN, SECRET_SIGNATURE, "storage.example"):
        assert secret not in written


def test_does_not_start_when_the_disk_is_too_small(kaggle, tmp_path, monkeypatch):
    server, run = kaggle()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 700_000})())
    with pytest.raises(UserError, match=r"700.0 kB free; --num_slides [12] would fit"):
        run()
    assert not list((tmp_path / "panda").rglob("*.tiff"))


def test_a_full_disk_ends_it_with_a_sentence_and_nothing_is_lost(kaggle, files, tmp_path):
    """On a real small file system, filled by somebody else in the middle of the transfer."""
    folder = tmp_path / "panda"
    folder.mkdir()
    once_only = [True]
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting needs root")
    try:

        def fill(request):
            if request.name == "train_images/slide3.tiff" and once_only:
                once_only.pop()
                (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 100_000))

        _, run = kaggle(fault=fill)
        with pytest.raises(UserError, match="no room left for .*make room and run the command again"):
            run("--workers", "1")
        (folder / "filler").unlink()
        run()
        assert_whole(folder, files)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_size_limit_ends_it_with_a_sentence(kaggle, files, tmp_path):
    server, run = kaggle()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    done = subprocess.run(
        command(tmp_path / "panda"),
        env=environment(server, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=limit,  # noqa: PLW1509
    )
    assert done.returncode == 1 and "no room left for" in done.stderr and "Traceback" not in done.stderr
    run()
    assert_whole(tmp_path / "panda", files)


def test_limit_rate(kaggle, files, tmp_path):
    _, run = kaggle()
    start = time.monotonic()
    run("--num_slides", "2", "--no_masks", "--limit_rate", "500kB")
    assert time.monotonic() - start > 2 * len(files[FIRST]) / 500_000 * 0.9


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_fails_one_request_in_five(kaggle, files, tmp_path, way):
    rng, lock = random.Random(5), threading.Lock()
    kinds = [Fault(429, "0"), Fault(503), Fault(403), Fault(after=60_000, how="reset"), Fault(after=60_000), Fault(after=0)]

    def fault(request):
        with lock:
            if rng.random() < 0.2:
                found = rng.choice(kinds)
                return found if request.kind == "storage" or found.status != 403 else Fault(500)
        return None

    server, run = kaggle(way, fault)
    run()
    assert_whole(tmp_path / "panda", files)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_slides", "0"], "--num_slides"),
        (["--limit_rate", "fast"], "not an amount"),
        (["--list", "--verify"], "not allowed with"),
        (["--grades", "6"], "--grades"),
    ],
)
def test_bad_flags_end_with_a_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        script.parse(arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err
