"""The two ways to PANDA's files: members of the competition's one zip file, and single files.

``Bundle`` reads members by HTTP range requests: one signed address for all of them, no rate limit per file, no room for the zip.
``SingleFiles`` asks Kaggle for every file, which meets a rate limit after about a hundred. Both fill a ``PartFile`` with the
raw bytes and a note that says what they must become; ``settle`` checks that and gives the file its name.

Format: PKWARE APPNOTE 6.3 (local header, 4.3.7). The directory at the zip's end is read by the remotezip library.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from remotezip import PartialBuffer, RemoteFetcher, RemoteZip, RemoteZipError

from data.transfer import (
    CHUNK,
    Address,
    DamagedError,
    GaveUpError,
    Line,
    PartFile,
    TryAgainError,
    content_range,
    disk_errors,
    read_some,
    stated_md5,
    validator,
)

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class NotRangedError(Exception):
    """The bundle cannot be read in parts; single files are the way."""


@dataclass(frozen=True)
class Member:
    """One file in the zip: where it begins and what it must become. limit: first byte after it. crc: CRC-32 of the content."""

    offset: int
    limit: int
    packed_size: int
    size: int
    crc: int
    method: int


class Bundle:
    """The remote zip file. ``members``: name -> Member. Its methods may be called from any thread."""

    def __init__(self, line: Line, address: Address):
        """Read the directory (about 3 MB for PANDA). Raises NotRangedError, GaveUpError or UserError."""
        self._line, self._address, self._etag = line, address, None
        try:
            with RemoteZip("", fetcher=lambda *_, **__: _Fetcher(self)) as remote:
                infos, end = remote.infolist(), remote.start_dir
        except (zipfile.BadZipFile, RemoteZipError) as error:
            raise NotRangedError(f"the bundle's directory cannot be read ({error})") from error
        starts = sorted(info.header_offset for info in infos) + [end]
        following = dict(zip(starts, starts[1:], strict=False))
        self.members = {
            info.filename: Member(
                info.header_offset, following[info.header_offset], info.compress_size, info.file_size, info.CRC, info.compress_type
            )
            for info in infos
            if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 0x1
        }

    def pull(self, name: str, size: int, part: PartFile) -> None:
        """Fetch the packed bytes of one member into ``part``, from where it stands, until all are there."""
        member = self.members[name]
        identity = {"from": "bundle", "crc32": member.crc, "packed_size": member.packed_size, "method": member.method}

        def once():
            note, have = part.note(), part.size
            start = note.pop("start", None)
            if note != identity or start is None or not 0 < have <= member.packed_size:
                self._pull_from_header(member, identity, part)
            elif have < member.packed_size:
                part.append(self._open(start + have, start + member.packed_size), member.packed_size - have, self._line)

        self._line.retrying(name, once)

    def _pull_from_header(self, member: Member, identity: dict, part: PartFile) -> None:
        """First request for a member: its own header tells where the data begins."""
        response = self._open(member.offset, member.limit)
        header = _LOCAL_HEADER.unpack(_read_exactly(response, _LOCAL_HEADER.size, self._line))
        if header[0] != b"PK\x03\x04":
            raise GaveUpError("the bundle's directory points to no file; run again later")
        extra = header[-2] + header[-1]
        _read_exactly(response, extra, self._line)
        part.begin({**identity, "start": member.offset + _LOCAL_HEADER.size + extra})
        part.path.touch()
        part.append(response, member.packed_size, self._line)

    def _open(self, first: int, limit: int) -> requests.Response:
        return self.read_range(f"bytes={first}-{limit - 1}", first)

    def read_range(self, asked: str, first: int | None = None) -> requests.Response:
        """GET one range of the bundle; status 206. Raises TryAgainError, or NotRangedError when the whole bundle would come."""
        headers = {"Range": asked, **({"If-Range": self._etag} if self._etag else {})}
        response = self._address.open(self._line, headers)
        if response.status_code != 206:
            response.close()
            raise NotRangedError("the storage does not send parts of the bundle, or the bundle has changed")
        self._etag = self._etag or validator(response)
        if first is not None and content_range(response)[0] != first:
            response.close()
            raise TryAgainError("the storage sent another part than asked for")
        return response

    def probe(self, name: str, size: int) -> None:
        """Receive about ``size`` bytes of a member and throw them away, to be timed."""
        first = self.members[name].offset if name in self.members else 0
        self._line.retrying(name, lambda: _swallow(self._open(first, first + size), size, self._line))


class _Fetcher(RemoteFetcher):
    """Gives remotezip our time-outs, waits and renewed addresses."""

    def __init__(self, bundle: Bundle):
        super().__init__("")
        self._bundle, self._line = bundle, bundle._line

    def fetch(self, data_range, stream=False):
        """The bytes of ``data_range``, whole."""

        def once():
            response = self._bundle.read_range(self.build_range_header(*data_range))
            first, _ = content_range(response)
            return first, _read_exactly(response, int(response.headers["Content-Length"]), self._line)

        first, body = self._line.retrying("the bundle's directory", once)
        return PartialBuffer(io.BytesIO(body), first, len(body), stream=False)


def _read_exactly(response: requests.Response, size: int, line: Line) -> bytes:
    parts, missing = [], size
    while missing:
        chunk = read_some(response, missing)
        if not chunk:
            response.close()
            raise TryAgainError(f"the connection ended {missing} bytes early")
        line.count(len(chunk))
        parts.append(chunk)
        missing -= len(chunk)
    return b"".join(parts)


class SingleFiles:
    """Files asked for one by one. ``sign``: name -> signed address. Its methods may be called from any thread."""

    def __init__(self, line: Line, sign: Callable[[str], str]):
        self._line, self._sign = line, sign

    def pull(self, name: str, size: int, part: PartFile) -> None:
        """Fetch the raw bytes of one file into ``part``, from where it stands, until all are there. ``size``: as listed."""
        address, furthest = Address(lambda: self._sign(name)), part.size

        def once():
            nonlocal furthest
            try:
                self._once(address, name, size, part)
            except TryAgainError as problem:  # where every try starts from nothing, bytes alone are no progress
                problem.progress = part.size > furthest
                furthest = max(furthest, part.size)
                raise

        self._line.retrying(name, once)

    def _once(self, address: Address, name: str, size: int, part: PartFile) -> None:
        note = part.note()
        have = part.size if note.get("from") == "file" and note.get("validator") else 0
        if have and have == note.get("length"):
            return
        headers = {"Range": f"bytes={have}-", "If-Range": note["validator"]} if have else {}
        response = address.open(self._line, headers)
        if response.status_code == 416 or (response.status_code == 206 and content_range(response)[0] != have):
            response.close()
            part.drop()
            raise TryAgainError("the half file does not fit the storage's; starting it anew")
        if response.status_code == 200:  # a first request, or the file has changed, or the storage knows no ranges
            have, note = 0, _note_of(response, name, size)
            part.begin(note)
            part.path.touch()
        part.append(response, None if note["length"] is None else note["length"] - have, self._line)

    def probe(self, name: str, size: int) -> None:
        """Receive ``size`` bytes of a file and throw them away, to be timed."""
        address = Address(lambda: self._sign(name))
        headers = {"Range": f"bytes=0-{size - 1}"}
        self._line.retrying(name, lambda: _swallow(address.open(self._line, headers), size, self._line))


def _swallow(response: requests.Response, size: int, line: Line) -> None:
    while size > 0 and (chunk := read_some(response, min(CHUNK, size))):
        line.count(len(chunk))
        size -= len(chunk)
    response.close()


def _note_of(response: requests.Response, name: str, size: int) -> dict:
    """What an answer with a whole file says about it. length: None only for a zip-wrapped file of unstated length."""
    wrapped = urlsplit(response.url).path.endswith(".zip") and not name.endswith(".zip")
    length = response.headers.get("Content-Length")
    length = int(length) if length else None if wrapped else size
    return {"from": "file", "validator": validator(response), "length": length, "md5": stated_md5(response), "wrapped": wrapped}


def settle(part: PartFile, name: str, size: int) -> str:
    """Check a fully fetched ``part`` against everything that is known, unpack it, give it its name; return its checksum.

    Known are the listed ``size``, the CRC-32 of the zip's directory, the MD5 of the storage; a TIFF is opened once. Raises
    DamagedError, with the half file removed, when something disagrees.
    """
    note = part.note()
    unpacked = part.path.with_suffix(".unpacked")
    stated = f"md5:{note['md5']}" if note.get("md5") else f"crc32:{note['crc32']:08x}" if "crc32" in note else None
    try:
        packed = note.get("method") == zipfile.ZIP_DEFLATED or note.get("wrapped") or _looks_wrapped(part, size)
        if packed:
            if note["from"] == "file":  # the storage's checksum is that of the wrapper, which holds another
                check_checksum(part.path, stated)
                stated = None
            _write(unpacked, _inflated(part.path) if note["from"] == "bundle" else _unwrapped(part.path), size)
        checksum = check_content(unpacked if packed else part.path, name, size, stated)
        part.commit(unpacked if packed else None)
    except DamagedError:
        part.drop()
        raise
    finally:
        unpacked.unlink(missing_ok=True)
    return checksum


def check_content(path: Path, name: str, size: int, stated: str | None) -> str:
    """Checksum of a file. Raises DamagedError for another size, another checksum than ``stated``, or a TIFF that does not open."""
    if path.stat().st_size != size:
        raise DamagedError(f"{path.stat().st_size} bytes arrived where Kaggle lists {size}")
    found = check_checksum(path, stated)
    if name.endswith((".tiff", ".tif")):
        import openslide

        try:
            openslide.OpenSlide(path).close()
        except openslide.OpenSlideError as error:
            raise DamagedError(f"it arrived, but OpenSlide cannot open it ({error})") from error
    return found


def check_checksum(path: Path, stated: str | None) -> str:
    """Checksum of a file in the kind of ``stated``, which it must agree with (DamagedError); a CRC-32 where nothing is stated."""
    found = checksum(path, stated.split(":")[0] if stated else "crc32")
    if stated and found != stated:
        raise DamagedError("the bytes that arrived do not have the checksum that Kaggle states")
    return found


def checksum(path: Path, kind: str) -> str:
    """``crc32:`` or ``md5:`` and the checksum of a file's bytes in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        if kind == "md5":
            return f"md5:{hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()}"
        value = 0
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
        return f"crc32:{value:08x}"


def _looks_wrapped(part: PartFile, size: int) -> bool:
    return part.note().get("from") == "file" and part.size != size and zipfile.is_zipfile(part.path)


def _inflated(path: Path) -> Iterable[bytes]:
    """Content of a raw deflate stream."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield inflater.decompress(chunk)
        yield inflater.flush()
    except zlib.error as error:
        raise DamagedError(f"what arrived cannot be unpacked ({error})") from error


def _unwrapped(path: Path) -> Iterable[bytes]:
    """Content of the one file in a zip that Kaggle wrapped around it."""
    try:
        with zipfile.ZipFile(path) as wrapper:
            names = [info for info in wrapper.infolist() if not info.is_dir()]
            if len(names) != 1:
                raise DamagedError(f"it arrived wrapped with {len(names)} files in one zip, where one is expected")
            with wrapper.open(names[0]) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DamagedError(f"what arrived cannot be unwrapped ({error})") from error


def _write(path: Path, chunks: Iterable[bytes], size: int) -> None:
    """Write ``chunks``, and stop beyond ``size`` bytes: a damaged or hostile zip must not fill the disk."""
    written = 0
    with open(path, "wb") as file:
        for chunk in chunks:
            written += len(chunk)
            if written > size:
                raise DamagedError(f"it unpacks to more than the {size} bytes that Kaggle lists")
            with disk_errors(path):
                file.write(chunk)
        with disk_errors(path):
            file.flush()
