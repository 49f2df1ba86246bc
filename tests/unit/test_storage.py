"""Places on this machine and elsewhere: names, listings, whole files there and back, and nothing left lying about."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from common import storage
from common.errors import UserError
from common.storage import MissingError, Remote, place

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["file", "memory"])
def remote(request, tmp_path):
    """An empty folder by its URL."""
    yield Remote(f"{request.param}://{tmp_path}/a b#c")
    if request.param == "memory":
        import fsspec

        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def files(tmp_path):
    """Two files of this machine."""
    for name, content in (("one.txt", "1"), ("two.txt", "22")):
        (tmp_path / name).write_text(content)
    return tmp_path / "one.txt", tmp_path / "two.txt"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize("text", ["datasets/panda", "/data/panda", "s3:/bucket", "C:/slides", ".", "a/s3://b"])
def test_paths_stay_paths(text):
    assert place(text) == Path(text)


def test_urls_lose_nothing_but_the_last_slash():
    assert str(place("S3://bucket/Folder with space/")) == "s3://bucket/Folder with space"
    assert place("file:///data/panda") == Remote("file:///data/panda")


def test_a_remote_has_a_paths_manners():
    slide = Remote("s3://bucket/panda") / "train_images" / "a.b.TIFF"
    assert (slide.name, slide.stem, slide.suffix) == ("a.b.TIFF", "a.b", ".TIFF")
    assert slide.parent.parent == slide.resolve().parent.parent == Remote("s3://bucket/panda")
    assert Remote("file:///patches").parent / "overlays" == Remote("file:///overlays")
    with pytest.raises(UserError, match="whole bucket; name a folder in it, such as s3://bucket/patches"):
        Remote("s3://bucket").parent.resolve()


@pytest.mark.parametrize(
    ("folder", "other", "inside"),
    [
        ("s3://b/patches", "s3://b/patches", True),
        ("s3://b/patches", "s3://b/patches/shards", True),
        ("s3://b/patches", "s3://b/patches_2", False),
        ("s3://b/patches", "patches", False),
        ("patches", "s3://b/patches", False),
        ("patches", "patches/../patches/x", True),
        ("patches", "patches_2", False),
    ],
)
def test_what_lies_in_what(folder, other, inside):
    assert storage.contains(place(folder), place(other)) == inside


def test_there_and_back(remote, files, tmp_path):
    one, two = files
    assert storage.files_in(remote) == storage.files_in(remote, below=True) == {}
    storage.store({one: remote / "one.txt", two: remote / "deep" / "er" / "two.txt"})
    assert list(storage.files_in(remote)) == ["one.txt"]
    there = storage.files_in(remote, below=True)
    assert {name: storage.size_of(file) for name, file in there.items()} == {"deep/er/two.txt": 2, "one.txt": 1}
    assert there["one.txt"].url == f"{remote}/one.txt" and all(file.version for file in there.values())
    back = tmp_path / "back" / "again"
    storage.fetch({there["one.txt"]: back / "1", there["deep/er/two.txt"]: back / "2"})
    assert {path.name: path.read_text() for path in back.iterdir()} == {"1": "1", "2": "22"}
    storage.remove([there["one.txt"], remote / "never.txt"][:1])
    assert list(storage.files_in(remote, below=True)) == ["deep/er/two.txt"]


def test_another_content_is_another_version(remote, files):
    one, two = files
    storage.store({one: remote / "x"})
    before = storage.files_in(remote)["x"]
    storage.store({two: remote / "x"})
    after = storage.files_in(remote)["x"]
    assert (before.size, before.version) != (after.size, after.version)


def test_what_is_gone_or_changed_leaves_nothing_here(remote, files, tmp_path):
    one, two = files
    back = tmp_path / "back"
    storage.store({one: remote / "x", two: remote / "y"})
    listed = storage.files_in(remote)
    storage.store({two: remote / "x"})
    with pytest.raises(UserError, match="/x changed since it was listed; start again"):
        storage.fetch({listed["x"]: back / "x"})
    storage.remove([listed["y"]])
    with pytest.raises(MissingError, match="/y is not there"):
        storage.fetch({listed["y"]: back / "y"})
    assert list(back.iterdir()) == []
    storage.remove([listed["y"]])  # gone already: as wanted


def test_paths_are_used_where_they_are(files, tmp_path):
    one, _ = files
    assert storage.brought(one, tmp_path / "scratch") == one
    assert list(storage.files_in(tmp_path)) == ["one.txt", "two.txt"]
    assert storage.files_in(tmp_path / "nowhere") == {}
    storage.deliver(one, tmp_path / "one.txt")
    assert one.exists()
    storage.remove([one, tmp_path / "never.txt"])
    assert not one.exists()


def test_a_delivered_file_is_no_longer_here(remote, files, tmp_path):
    one, _ = files
    storage.deliver(one, remote / "one.txt")
    assert not one.exists() and storage.brought(remote / "one.txt", tmp_path).read_text() == "1"


def test_a_full_disk_is_not_the_networks_fault(remote, files, tmp_path, monkeypatch):
    storage.store({files[0]: remote / "x"})
    full = type("Full", (), {"get": lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))})
    monkeypatch.setattr(storage, "_filesystem", lambda file: (full(), str(file)))
    with pytest.raises(UserError, match="the disk is full while .*TMPDIR"):
        storage.fetch({remote / "x": tmp_path / "back" / "x"})


def test_scratch_is_gone_after_use_and_after_errors(temporary):
    with pytest.raises(KeyError), storage.scratch() as folder:
        (folder / "slide.tiff").write_bytes(b"x")
        assert folder.parent == temporary
        raise KeyError
    assert not list(temporary.iterdir())


def test_scratch_of_a_killed_process_is_swept_and_of_a_living_one_is_not(temporary):
    code = "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]; from common import storage\n"
    code += "with storage.scratch() as folder: (folder / 'slide').touch(); print(folder, flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(temporary)]
    run = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    folder = Path(run.stdout.readline().strip())
    (temporary / "slides-on-their-way-but-not-ours").mkdir()
    storage.sweep()
    assert (folder / "slide").exists()
    run.kill()
    run.communicate()
    folder.with_name(f"slides-on-their-way-{'0' * 32}.lock").touch()  # killed before it had a folder
    storage.sweep()
    assert [path.name for path in temporary.iterdir()] == ["slides-on-their-way-but-not-ours"]


@pytest.mark.parametrize("url", ["nowhere://x/y", "s3n-but-not://x"])
def test_a_scheme_that_nobody_knows(url):
    with pytest.raises(UserError, match="cannot be used .*such as s3://BUCKET/FOLDER"):
        storage.files_in(Remote(url))
