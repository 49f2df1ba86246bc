"""Slides, patches and shards on S3: the files of one machine, whoever is killed, and one sentence where it cannot be."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from common import storage
from common.errors import UserError
from common.storage import Remote
from data import copies, patches, shards, staging
from data.journal import NAME as JOURNAL
from data.manifest import read_manifest
from data.patches import ExtractSettings, extract, overlay_folder
from tests.conftest import write_panda_folder
from tests.scripts import run_script
from training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIDE, PATCH = 256, 96  # pixels of a slide and of a patch: four patches a slide
SLIDES, PATCHES = 6, 24


@pytest.fixture(scope="module")
def panda(tmp_path_factory):
    return write_panda_folder(tmp_path_factory.mktemp("drawn") / "panda", SIDE, PATCH)


@pytest.fixture(scope="module")
def alone(panda, tmp_path_factory):
    """What the extraction makes of files of this machine, with shards."""
    settings = ExtractSettings(panda, tmp_path_factory.mktemp("alone") / "patches", PATCH, workers=0)
    extract(settings)
    shards.pack(settings.output_dir, settings.output_dir.parent / "shards")
    return settings


@pytest.fixture(scope="module")
def uploaded(s3, panda):
    """The slides on S3. Tests that change them take a copy."""
    put(panda, Remote("s3://tissue/panda"))
    return Remote("s3://tissue/panda")


@pytest.fixture
def there(s3, uploaded, tmp_path, monkeypatch):
    """Settings that read slides from S3 and write patches there; scratch folders lie in tmp_path/scratch."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    s3.requests.clear()
    return ExtractSettings(uploaded, Remote(f"s3://tissue/{tmp_path.name}/patches"), PATCH, workers=0)


@pytest.fixture
def mutable(there, panda):
    """The same with slides of its own."""
    changed = replace(there, data_dir=there.output_dir.parent / "panda")
    put(panda, changed.data_dir)
    return changed


def put(folder, remote):
    files = {path: remote / path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    storage.store(files)


def got(remote, tmp_path):
    """A local copy of everything below ``remote``."""
    folder = tmp_path / f"got_{remote.name}_{time.monotonic_ns()}"
    storage.fetch({file: folder / name for name, file in storage.files_in(remote, below=True).items()})
    return folder


def contents(folder):
    """Every file but the journal, which tells how the run went, and where the slides lay."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop(JOURNAL)
    made_with = json.loads(found.pop(staging.SETTINGS_NAME))
    made_with["settings"].pop("data_dir")
    return found | {"settings": made_with}


def assert_same(settings, alone, tmp_path):
    assert contents(got(settings.output_dir, tmp_path)) == contents(alone.output_dir)
    overlays = got(overlay_folder(settings.output_dir), tmp_path)
    drawn = {path.name: path.read_bytes() for path in overlay_folder(alone.output_dir).iterdir()}
    assert {path.name: path.read_bytes() for path in overlays.iterdir()} == drawn


def assert_rows_have_files(settings, tmp_path):
    """What is published agrees, whenever one looks."""
    folder = got(settings.output_dir, tmp_path)
    if (folder / "patches.csv").exists():
        assert all((folder / row.path).stat().st_size for row in read_manifest(folder))


def command(settings, *more):
    folders = ["--data_dir", settings.data_dir, "--output_dir", settings.output_dir]
    return [str(word) for word in (sys.executable, "extract_patches.py", "--patch_size", PATCH, "--workers", 1, *folders, *more)]


def fetched(s3):
    """The slides that were asked for, masks left out."""
    return [request for request in s3.asked("GET ") if "train_images/" in request and request.endswith(".tiff?")]


def test_the_files_are_those_of_one_machine_and_each_slide_travels_twice(there, alone, s3, tmp_path):
    result = extract(there)
    assert len(result.patches) == PATCHES and not result.failed
    assert len(s3.asked("prefix=panda")) == 3, "one listing each of slides, masks and what lies beside them"
    assert len(s3.asked("list-type=2")) < 4 * SLIDES and not s3.asked("prefix=panda%2Ftrain_images%2Fa"), "none a slide"
    assert len(fetched(s3)) == 2 * SLIDES
    assert not list((tmp_path / "scratch").iterdir())
    assert_same(there, alone, tmp_path)
    s3.requests.clear()
    assert extract(there).made == 0
    assert not s3.asked(".tiff") and not s3.asked(".png"), "running again changes nothing"
    assert_same(there, alone, tmp_path)


def test_only_slides_or_only_patches_may_be_elsewhere(there, alone, panda, tmp_path):
    here = replace(there, output_dir=tmp_path / "mixed" / "patches")
    extract(here)
    assert contents(here.output_dir) == contents(alone.output_dir)
    other = replace(there, data_dir=panda, output_dir=there.output_dir.parent / "mixed" / "patches")
    extract(other)
    assert_same(other, alone, tmp_path)


def test_a_url_of_this_machine_works_without_any_server(alone, tmp_path):
    home = Remote(f"file://{tmp_path}")
    extract(replace(alone, data_dir=Remote(f"file://{alone.data_dir}"), output_dir=home / "patches", workers=1))
    assert contents(tmp_path / "patches") == contents(alone.output_dir)
    assert shards.pack(home / "patches", home / "shards") == PATCHES
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"patches.parquet", "test-000000.tar", "train-000000.tar"}
    assert not list(shards.open_shards(tmp_path / "shards").faults())


def test_killed_in_the_middle_another_machine_goes_on_to_the_same_files(there, alone, s3, tmp_path):
    """The first process publishes after each slide, so that there is something to go on from."""
    eager = "import sys, extract_patches; from common import cli; from data import staging; staging.SECONDS_BETWEEN = 0; "
    eager += "staging.LARGEST_SHARE = 1e9; cli.run(extract_patches.main)"
    words = [sys.executable, "-c", f"if __name__ == '__main__': {eager}", *command(there)[2:]]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while len(s3.asked(".png")) < 10 and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it was killed in the middle"
    for lock in (tmp_path / "scratch").glob("*.lock"):
        FileLock(lock).acquire(timeout=200).lock.release()  # its worker is gone too
    assert 0 < len([name for name in storage.files_in(there.output_dir, below=True) if name.endswith(".png")]) < PATCHES
    assert_rows_have_files(there, tmp_path)
    s3.requests.clear()
    extract(there)
    assert_same(there, alone, tmp_path)
    assert len(fetched(s3)) <= SLIDES, "scans that were published are not made again"
    assert not list((tmp_path / "scratch").iterdir()), "what the killed ones left behind is swept"


def test_a_signal_publishes_what_is_known(there, s3, tmp_path, monkeypatch):
    """Before the fifteen seconds are over: scanned slides are not scanned again, and a row without its file is never seen."""
    cuts = []

    def interrupted(*task):
        cuts.append(task)
        if len(cuts) == 3:
            raise KeyboardInterrupt
        return staging_cut(*task)

    staging_cut = staging.cut
    monkeypatch.setattr(staging, "cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(there)
    assert_rows_have_files(there, tmp_path)
    monkeypatch.setattr(staging, "cut", staging_cut)
    s3.requests.clear()
    extract(there)
    assert len(fetched(s3)) == SLIDES - 2


def test_vanished_patches_and_changed_slides_are_put_right(mutable, alone, tmp_path):
    extract(replace(mutable, max_patches=10))
    pictures = [name for name in storage.files_in(mutable.output_dir, below=True) if name.endswith(".png")]
    storage.remove([mutable.output_dir / pictures[0]])
    slide = tmp_path / "aaa1.tiff"
    slide.write_bytes((alone.data_dir / "train_images" / "aaa1.tiff").read_bytes() + b"\0")  # another version, the same picture
    storage.store({slide: mutable.data_dir / "train_images" / "aaa1.tiff"})
    extract(mutable)
    assert_same(mutable, alone, tmp_path)


def test_shares_that_shrink_are_given_up_rows_first(there, tmp_path, s3, monkeypatch):
    """Patches beyond the share, as a run with fewer slides had made them: the manifest without them comes before they go."""
    share_out = patches.Run.share_out

    def more(run):
        short = share_out(run)
        run.quotas = dict.fromkeys(run.quotas, 3)
        return [name for name in run.quotas if name in short]

    monkeypatch.setattr(patches.Run, "share_out", more)
    monkeypatch.setattr(patches.Run, "trim", lambda run: None)
    extract(replace(there, max_patches=10))
    monkeypatch.undo()
    s3.requests.clear()
    extract(replace(there, max_patches=10))
    assert len(read_manifest(got(there.output_dir, tmp_path))) == 10
    order = [request.split()[0] for request in s3.requests if "patches.csv" in request or "delete" in request]
    assert order.index("PUT") < order.index("POST")


def test_a_cluster_without_common_folders_gives_the_same_files_also_when_a_worker_is_killed(
    there, alone, s3, tmp_path, monkeypatch
):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = {"dashboard_address": None, "silence_logs": 50, "local_directory": str(tmp_path / "dask")}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **options) as cluster:
        killed = []

        def kill_one():
            deadline = time.monotonic() + 200
            while len(s3.asked(".png")) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            killed.append(next(iter(cluster.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

        murder = threading.Thread(target=kill_one)
        murder.start()
        result = extract(replace(there, scheduler=cluster.scheduler_address))
        murder.join()
        with distributed.Client(cluster) as client:  # a cluster that is closed while it starts a worker anew stumbles
            client.wait_for_workers(2, timeout=100)
    assert killed and not result.failed
    assert_same(there, alone, tmp_path)


def test_busy_servers_and_broken_lines_are_borne(there, alone, s3, tmp_path):
    s3.busy, s3.breaks = 1, [20_000, 100]
    extract(there)
    assert s3.busy == 0 and not s3.breaks
    assert_same(there, alone, tmp_path)


def test_a_slide_that_goes_before_its_turn_is_recorded(mutable, tmp_path, monkeypatch):
    def find_then_lose(*arguments):
        jobs = find_slides(*arguments)
        storage.remove([mutable.data_dir / "train_images" / "aaa1.tiff"])
        return jobs

    find_slides = patches.find_slides
    monkeypatch.setattr(patches, "find_slides", find_then_lose)
    result = extract(mutable)
    assert [(failure.slide_id, failure.stage) for failure in result.failed] == [("aaa1", "fetch")]
    assert len(result.patches) == PATCHES - 4
    assert "aaa1" in (got(mutable.output_dir, tmp_path) / staging.FAILED_NAME).read_text()


def test_changes_of_the_manifest_by_hand_survive_the_next_extraction(there, tmp_path):
    extract(replace(there, max_patches=12))
    rows = (got(there.output_dir, tmp_path) / "patches.csv").read_text().splitlines()
    moved = next(row.split(",")[1] for row in rows if row.endswith(",train"))
    changed = [row.removesuffix(",train") + ",test" if row.split(",")[1] == moved else row for row in rows]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "patches.csv").write_text(
        "".join(f"{row},{'own' if number else 'note'}\n" for number, row in enumerate(changed))
    )
    put(tmp_path / "mine", there.output_dir)
    extract(there)
    folder = got(there.output_dir, tmp_path / "then")
    assert {row.split for row in read_manifest(folder) if row.slide_id == moved} == {"test"}
    assert sum(line.endswith(",own") for line in (folder / "patches.csv").read_text().splitlines()) == 12


def test_two_runs_that_write_to_one_place_are_noticed(there):
    with pytest.raises(UserError, match="another extraction is writing to s3://"), staging.Output(there.output_dir) as late:
        extract(there)
        late.publish()


# ------------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def packed(there, alone, tmp_path, monkeypatch):
    """Shards on S3; copies of what is read lie in tmp_path/copies."""
    monkeypatch.setattr(copies, "HOME", tmp_path / "copies")
    put(alone.output_dir.parent / "shards", there.output_dir.parent / "shards")
    return there.output_dir.parent / "shards"


def test_shards_are_those_of_one_machine_and_packed_once(there, alone, s3, tmp_path):
    target, here = there.output_dir.parent / "shards", alone.output_dir.parent / "shards"
    said = run_script("extract_patches", *command(there, "--workers", 0, "--shards", target)[2:])
    assert f"{PATCHES} patches in shards in {target}" in said
    packed = got(target, tmp_path)
    assert {path.name: path.read_bytes() for path in packed.glob("*.tar")} == {p.name: p.read_bytes() for p in here.glob("*.tar")}
    assert shards.open_shards(packed).rows() == shards.open_shards(here).rows()
    assert shards.checksums(packed) == shards.checksums(here) != {}
    s3.requests.clear()
    assert shards.pack(there.output_dir, target) == PATCHES
    assert not s3.asked("PUT") and not s3.asked(".png")


def test_training_from_them_gives_the_bits_of_shards_of_this_machine(packed, alone, s3, tmp_path):
    for name, folder in (("here", alone.output_dir.parent / "shards"), ("there", packed)):
        words = ["--patches", folder, "--model", "dcgan", "--image_size", 64, "--epochs", 1, "--batch_size", 8, "--workers", 0]
        words += ["--device", "cpu", "--eval_every", 0, "--checkpoint_dir", tmp_path / name, "--log_dir", tmp_path / f"log_{name}"]
        run_script("train", *words)
        assert bool(s3.asked("GET /tissue/")) == (name == "there")
    one, other = (checkpoint.load(tmp_path / name / "G_final.pt")["ema"] for name in ("here", "there"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_check_data_reads_both_and_moves_neither(there, packed, alone, tmp_path):
    put(alone.output_dir, there.output_dir)
    for folder in (packed, there.output_dir):
        said = run_script("check_data", "--patches", folder, "--out", tmp_path / "check", "--workers", 0)
        assert f"{PATCHES} patches of {SLIDES} slides" in said
        refused = run_script("check_data", "--patches", folder, "--quarantine", expect=1)
        assert refused.count("\n") == 1 and "copy the folder here" in refused


def test_evaluate_measures_against_them(packed, monkeypatch):
    monkeypatch.setattr("data.holdout.MIN_PATCHES", 10**6)  # as far as the reading goes
    said = run_script("evaluate", "--images", "x", "--patches", packed, expect=1)
    assert f"{PATCHES - 4} training and 4 held-out patches" in said


def test_a_copy_follows_what_changes_there(packed, s3, tmp_path):
    here = copies.at_hand(packed)
    (here / "train-000000.tar").unlink()
    (tmp_path / "new.txt").write_text("new")
    storage.store({tmp_path / "new.txt": packed / "new.txt"})
    s3.requests.clear()
    assert copies.at_hand(packed) == here
    asked = s3.asked("GET /tissue/")
    assert len(asked) == 2 and (here / "new.txt").read_text() == "new" and shards.is_sharded(here)
    storage.remove([packed / "new.txt"])
    s3.requests.clear()
    copies.at_hand(packed)
    assert not (here / "new.txt").exists() and len(s3.requests) == 1


def test_a_copy_that_was_cut_short_is_fetched_again(packed):
    here = copies.at_hand(packed)
    whole = (here / "train-000000.tar").read_bytes()
    (here / "train-000000.tar").write_bytes(whole[:1000])
    with open(here.with_name(f"{here.name}.jsonl"), "a") as journal:
        journal.write("5\n")  # as odd as a crash may leave it
    assert (copies.at_hand(packed) / "train-000000.tar").read_bytes() == whole


def test_objects_that_stand_for_folders_are_no_files(packed):
    before = storage.files_in(packed, below=True).keys()
    files, root = storage._filesystem(packed)
    files.pipe_file(f"{root}/benign/", b"")
    assert storage.files_in(packed, below=True).keys() == before


def test_those_who_want_the_same_copy_wait_for_it(packed, s3):
    s3.requests.clear()
    wanting = [threading.Thread(target=copies.at_hand, args=(packed,)) for _ in range(3)]
    for thread in wanting:
        thread.start()
    for thread in wanting:
        thread.join()
    assert len(s3.asked("GET /tissue/")) == len(storage.files_in(packed)) > 2


def test_a_shard_that_is_not_what_was_packed_is_refused_until_it_is(packed, tmp_path):
    whole = got(packed, tmp_path) / "train-000000.tar"
    wrong = bytearray(whole.read_bytes())
    wrong[5000] ^= 1
    (tmp_path / "wrong.tar").write_bytes(wrong)
    storage.store({tmp_path / "wrong.tar": packed / whole.name})
    for _ in range(2):
        with pytest.raises(UserError, match="train-000000.tar is not the shard that was packed"):
            copies.at_hand(packed)
    storage.store({whole: packed / whole.name})
    assert (copies.at_hand(packed) / whole.name).read_bytes() == whole.read_bytes()


def test_shards_without_an_index_are_not_copied(packed, s3):
    storage.remove([packed / shards.NAME])
    s3.requests.clear()
    with pytest.raises(UserError, match="without their index"):
        copies.at_hand(packed)
    assert not s3.asked(".tar")


# ------------------------------------------------------------------------------------------------------------- what cannot be


def sentence(name, *words):
    """The one line that a script says before it leaves with 1."""
    said = run_script(name, *words, expect=1)
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def forget_connections():
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_that_is_not_there(there, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "HOME", tmp_path / "copies")
    monkeypatch.chdir(tmp_path)  # train.py writes its error to logs/train.log
    nowhere = Remote("s3://no-such-bucket/patches")
    assert "no slides in s3://no-such-bucket/patches" in sentence("extract_patches", "--data_dir", nowhere)
    said = sentence("extract_patches", *command(there, "--output_dir", nowhere)[2:])
    assert "no-such-bucket" in said and "bucket does not exist" in said
    assert "no patches in s3://no-such-bucket/patches" in sentence("train", "--patches", nowhere)
    assert "no patches in s3://no-such-bucket/patches" in sentence("evaluate", "--images", "x", "--patches", nowhere)


def test_wrong_keys_no_keys_and_no_server(there, s3, monkeypatch):
    words = command(there)[2:]
    s3.only_known_people(True)
    try:
        said = sentence("extract_patches", *words)
        assert "access was refused" in said and "AWS_SECRET_ACCESS_KEY" in said
    finally:
        s3.only_known_people(False)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    forget_connections()
    assert "Unable to locate credentials" in sentence("extract_patches", *words)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_connections()
    assert "AWS_ENDPOINT_URL" in sentence("extract_patches", *words)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio.example.org:9000")
    forget_connections()
    assert "begins with http:// or https://" in sentence("extract_patches", *words)
    monkeypatch.undo()
    forget_connections()


def test_a_refusal_in_the_middle_is_one_sentence_from_a_worker_process(there, s3):
    run = subprocess.Popen(command(there), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not fetched(s3) and time.monotonic() < deadline:
        time.sleep(0.005)
    s3.only_known_people(True)
    try:
        _, errors = run.communicate(timeout=200)
    finally:
        s3.only_known_people(False)
    assert run.returncode == 1 and errors.count("\n") == 1 and "access was refused" in errors, errors


@pytest.mark.parametrize(("url", "says"), [("s3://tissue", "whole bucket"), ("nowhere://tissue/patches", "cannot be used")])
def test_urls_that_cannot_be_meant(there, url, says):
    assert says in sentence("extract_patches", *command(there, "--output_dir", url)[2:])


def test_s3_without_its_package_names_it():
    code = "import sys; sys.modules['s3fs'] = None; sys.argv = ['x', '--data_dir', 's3://tissue/panda']; "
    code += "import extract_patches; from common import cli; cli.run(extract_patches.main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "requirements-scale.txt" in done.stderr, done.stderr
