"""Folders on other file systems: s3://BUCKET/FOLDER, file:///FOLDER, and what else fsspec has a package for.

A place is a ``Path`` on this machine or a ``Remote``. Whole files are brought here, worked on, and whole files are sent back.
Where a service is and who may use it is told by the environment, which its own package reads (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL ... for s3://, see docs/scaling.md). Failed requests are repeated by s3fs and botocore: what is raised here has
failed for good. fsspec is imported with the first Remote that is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from common.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_SCRATCH = "slides-on-their-way-"


class MissingError(UserError):
    """A file that a listing had named is no longer there."""


@dataclass(frozen=True)
class Remote:
    """A file or folder on another file system, with as much of Path's manners as the stages need.

    Of a listed file, size: bytes; version: changes when its content does (an ETag, or a time).
    """

    url: str
    size: int = 0
    version: str = ""

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rsplit("/", 1)[1]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the last part, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Remote:
        """The folder around it. Raises UserError for a whole bucket, which has none."""
        above, _, name = self.url.rpartition("/")
        if not name or above.endswith((":/", ":")):
            raise UserError(f"{self.url} is a whole bucket; name a folder in it, such as {self.url.rstrip('/')}/patches")
        return Remote(above)

    def resolve(self) -> Remote:
        """Itself: a URL does not depend on the working directory."""
        return self


Place = Path | Remote


def place(text: str) -> Place:
    """Argument type: a path of this machine, or the URL of a folder elsewhere."""
    match = _SCHEME.fullmatch(text)
    return Remote(f"{match[1].lower()}://{match[2].rstrip('/')}") if match else Path(text)


def contains(folder: Place, other: Place) -> bool:
    """Whether ``other`` is ``folder`` or lies in it."""
    if isinstance(folder, Remote) or isinstance(other, Remote):
        return f"{other}/".startswith(f"{folder}/")
    return folder.resolve() in (other.resolve(), *other.resolve().parents)


# ------------------------------------------------------------------------------------------------------------- listing, moving


def files_in(folder: Place, below: bool = False) -> dict[str, Place]:
    """What lies in a folder, by name in alphabetical order; with ``below`` all files under it, by their relative paths.

    {} where there is no such folder. A remote one is listed with one call (S3 answers with up to 1,000 names each); objects that
    only stand for a folder, as S3's console makes them, are no files.
    """
    if isinstance(folder, Path):
        found = (folder.rglob("*") if below else folder.iterdir()) if folder.is_dir() else ()
        return dict(sorted((path.relative_to(folder).as_posix() if below else path.name, path) for path in found))
    with _in_one_sentence(folder):
        files, root = _filesystem(folder)
        try:
            entries = files.find(root, detail=True).values() if below else files.ls(root, detail=True)
        except FileNotFoundError:
            return {}
    names = ((entry["name"].removeprefix(root.rstrip("/")).lstrip("/"), entry) for entry in entries if entry["type"] != "directory")
    there = [(name, entry) for name, entry in sorted(names, key=str) if name and not name.endswith("/")]
    return {name: Remote(f"{folder}/{name}", entry["size"], _version(entry)) for name, entry in there}


def _version(entry: dict) -> str:
    return str(next((entry[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if entry.get(key)), ""))


def fetch(files: Mapping[Remote, Path]) -> None:
    """Copy files of one file system here, many at a time; each comes whole or not at all.

    Raises MissingError where one is gone, UserError where it is not as it was listed or the disk is full.
    """
    if not files:
        return
    coming = {source: target.with_name(f".{target.name[:200]}.{os.getpid()}.tmp") for source, target in files.items()}
    any_of_them = next(iter(files))
    for folder in {target.parent for target in files.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _in_one_sentence(any_of_them, len(files)):
            system, _ = _filesystem(any_of_them)
            system.get([_path(source) for source in coming], [str(path) for path in coming.values()])
        for source, path in coming.items():
            if source.version and path.stat().st_size != source.size:
                raise UserError(f"{source} changed since it was listed; start again")
            path.replace(files[source])
    finally:
        for path in coming.values():
            path.unlink(missing_ok=True)


def store(files: Mapping[Path, Remote]) -> None:
    """Copy files of this machine to one file system, many at a time. On an object store each appears whole or not at all."""
    if files:
        any_of_them = next(iter(files.values()))
        with _in_one_sentence(any_of_them, len(files)):
            system, _ = _filesystem(any_of_them)
            system.put([str(source) for source in files], [_path(target) for target in files.values()])


def remove(files: Iterable[Place]) -> None:
    """Delete files; those that are gone already are passed over."""
    remote = [file for file in files if isinstance(file, Remote) or file.unlink(missing_ok=True)]
    if remote:
        with _in_one_sentence(remote[0]), contextlib.suppress(FileNotFoundError):
            _filesystem(remote[0])[0].rm([_path(file) for file in remote])


def size_of(file: Place) -> int:
    """Bytes of a file."""
    return file.size if isinstance(file, Remote) else file.stat().st_size


def brought(file: Place, folder: Path) -> Path:
    """A file of this machine: itself, or a copy in ``folder`` of one that is elsewhere."""
    if isinstance(file, Path):
        return file
    fetch({file: folder / file.name})
    return folder / file.name


def deliver(file: Path, target: Place) -> None:
    """Send a finished file to ``target`` and remove it here, unless it was made in its place."""
    if isinstance(target, Remote):
        store({file: target})
        file.unlink()


# ------------------------------------------------------------------------------------------------------------------- scratch


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for files on their way, in the system's temporary folder (TMPDIR names another), gone when the block ends.

    Those that killed processes have left behind are removed first.
    """
    sweep()
    folder = Path(tempfile.gettempdir(), f"{_SCRATCH}{uuid.uuid4().hex}")
    with FileLock(_owner(folder)):  # before there is a folder: one without an owner is swept
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            _discard(folder)


def sweep() -> None:
    """Remove the scratch folders whose process is no more: a lock is made before its folder and removed after it."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}{'?' * 32}.lock"):
        with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):  # a process that dies lets go of its lock
            _discard(lock.with_suffix(""))


def _owner(folder: Path) -> Path:
    """The lock that the process holds to which a scratch folder belongs."""
    return folder.with_name(f"{folder.name}.lock")


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _owner(folder).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------------- fsspec


def _filesystem(remote: Remote):
    """(file system, path on it) by fsspec, listings not cached: other processes write there too."""
    import fsspec

    scheme = remote.url.partition("://")[0]
    folders_first = {"auto_mkdir": True} if scheme in ("file", "local") else {}  # object stores have no folders to make
    try:
        return fsspec.core.url_to_fs(remote.url, use_listings_cache=False, **folders_first)
    except ImportError as error:
        hint = "pip install -r requirements-scale.txt" if scheme == "s3" else "pip install that package"
        raise UserError(f"{remote} needs a package that is missing ({error}); {hint}") from error
    except ValueError as error:
        raise UserError(f"{remote} cannot be used ({error}); name a path, or a URL such as s3://BUCKET/FOLDER") from error


def _path(remote: Remote) -> str:
    return _filesystem(remote)[1]


@contextlib.contextmanager
def _in_one_sentence(remote: Remote, files: int = 1) -> Iterator[None]:
    """What the packages raise when they have given up on ``remote`` or others with it, as one sentence with the way out."""
    try:
        yield
    except FileNotFoundError as error:
        which = f"{remote} is" if files == 1 else f"{remote}, or one of {files - 1} other file(s) that belong to it, is"
        raise MissingError(f"{which} not there ({_text(error)}); check the names of bucket and folder") from error
    except _failures() as error:
        if isinstance(error, PermissionError) or "credential" in str(error).lower():
            way_out = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to those of someone who may" if _is_s3(remote) else "log in"
            raise UserError(f"{remote}: access was refused ({_text(error)}); {way_out}, see docs/scaling.md") from error
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = f"{tempfile.gettempdir()} or the patch folder"
            raise UserError(f"the disk is full while {remote} is copied; free space in {where}, or set TMPDIR") from error
        way_out = "check the network and AWS_ENDPOINT_URL" if _is_s3(remote) else "check the network"
        raise UserError(
            f"{remote} cannot be reached ({_text(error)}); {way_out}, then start again: it goes on from here"
        ) from error
    except (ValueError, TypeError) as error:
        way_out = "AWS_ENDPOINT_URL, if set, begins with http:// or https://" if _is_s3(remote) else "see docs/scaling.md"
        raise UserError(f"{remote} cannot be opened ({_text(error)}); check the address: {way_out}") from error


def _is_s3(remote: Remote) -> bool:
    return remote.url.startswith(("s3://", "s3a://"))


def _failures() -> tuple[type[Exception], ...]:
    """OSError and its like in the packages that have been imported by now."""
    like = {"botocore.exceptions": "BotoCoreError", "aiohttp": "ClientError"}
    return (OSError, *(getattr(sys.modules[module], name) for module, name in like.items() if module in sys.modules))


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
