"""Bytes over a bad line: time-outs on every request, waiting as told, ranged resumption inside a half file.

Nothing here knows Kaggle. A storage address is only ever named by its file, never by its query, which is a secret.
HTTP semantics of Range, If-Range and Retry-After: RFC 9110.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import requests
import urllib3
from requests.adapters import HTTPAdapter

from common.errors import UserError
from common.files import replacing, write_all

CHUNK = 1 << 20
LONGEST_TOLD_WAIT = 3600.0
Result = TypeVar("Result")


class TryAgainError(Exception):
    """Something that may go away: the line, the server's load, an expired address.

    wait: seconds the server asked for. progress: bytes came before it broke. unreachable: no answer at all.
    """

    def __init__(self, reason: str, wait: float | None = None, progress: bool = False, unreachable: bool = False):
        super().__init__(reason)
        self.wait, self.progress, self.unreachable = wait, progress, unreachable


class DamagedError(TryAgainError):
    """All bytes arrived, and they are not the file."""


class GaveUpError(UserError):
    """A file that did not arrive in all its tries; the others may."""


class StoppedError(Exception):
    """The run is being stopped; half files stay for the next one."""


class _TimeoutAdapter(HTTPAdapter):
    """Gives every request a time-out, also those of libraries that set none."""

    def __init__(self, timeout: tuple[float, float]):
        self.timeout = timeout
        super().__init__()

    def send(self, request, stream=False, timeout=None, verify=True, cert=None, proxies=None):
        return super().send(request, stream, timeout or self.timeout, verify, cert, proxies)


@dataclass
class Line:
    """The line to the outside and how patient to be with it; one for all threads of a run.

    connect_timeout, read_timeout: seconds until a silent server counts as gone. first_wait doubles up to longest_wait (seconds)
    over ``tries`` failures in a row without a new byte. limit_rate: bytes a second of all threads together, None for no limit.
    """

    connect_timeout: float = 10.0
    read_timeout: float = 60.0
    first_wait: float = 1.0
    longest_wait: float = 300.0
    tries: int = 12
    limit_rate: float | None = None
    log: Callable[[str], None] = lambda text: None
    on_bytes: Callable[[int], None] = lambda count: None
    stop: threading.Event = field(default_factory=threading.Event)
    received: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)
    _free_at: float = 0.0

    def mount(self, session: requests.Session) -> requests.Session:
        """Put the time-outs under every request of ``session``."""
        for scheme in ("https://", "http://"):
            session.mount(scheme, _TimeoutAdapter((self.connect_timeout, self.read_timeout)))
        return session

    def get(self, url: str, headers: dict[str, str]) -> requests.Response:
        """GET with a streamed body, over this thread's kept connection, without credentials. Raises TryAgainError."""
        if not hasattr(self._local, "session"):
            self._local.session = self.mount(requests.Session())
            self._local.session.auth = _no_credentials
        try:
            return self._local.session.get(url, headers={"Accept-Encoding": "identity", **headers}, stream=True)
        except requests.RequestException as error:
            raise TryAgainError(explain(error), unreachable=True) from None

    def pause(self, seconds: float) -> None:
        """Sleep, or raise StoppedError as soon as the run is being stopped."""
        if self.stop.wait(seconds):
            raise StoppedError

    def count(self, number: int) -> None:
        """Enter ``number`` received bytes; sleeps where a rate limit asks for it."""
        with self._lock:
            self.received += number
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + (number / self.limit_rate if self.limit_rate else 0.0)
            wait = self._free_at - now
        self.on_bytes(number)
        self.pause(wait if self.limit_rate else 0.0)

    def retrying(self, what: str, action: Callable[[], Result], tries_unreachable: int | None = None) -> Result:
        """Call ``action`` until it does not raise TryAgainError.

        Raises GaveUpError after ``tries`` failures without a new byte, or ``tries_unreachable`` without an answer.
        """
        failures = 0
        while True:
            try:
                return action()
            except TryAgainError as problem:
                failures = 1 if problem.progress else failures + 1
                if failures >= (tries_unreachable if problem.unreachable and tries_unreachable else self.tries):
                    raise GaveUpError(
                        f"{what}: {problem}, {failures} times in a row; run the command again later to go on"
                    ) from problem
                wait = 0.0 if failures == 1 and isinstance(problem, ExpiredError) else problem.wait
                if wait is None:
                    wait = min(self.longest_wait, self.first_wait * 2 ** (failures - 1)) * random.uniform(0.8, 1.2)
                self.log(f"{what}: {problem}; trying again in {wait:.0f} s")
            self.pause(min(wait, LONGEST_TOLD_WAIT))


def _no_credentials(request):
    """Keeps requests from sending a password of ~/.netrc to the storage."""
    return request


def explain(error: Exception) -> str:
    """What is wrong with the line, in a few words and without any address."""
    text = str(error)
    kinds = (
        (requests.exceptions.SSLError, "the server's certificate is not trusted (behind a company proxy set REQUESTS_CA_BUNDLE)"),
        (requests.exceptions.ProxyError, "the proxy named in HTTPS_PROXY cannot be reached"),
        (requests.exceptions.ConnectTimeout, "no connection in time"),
        ((requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError), "the server fell silent"),
    )
    for kind, words in kinds:
        if isinstance(error, kind):
            return words
    if "resolve" in text or "getaddrinfo" in text or "Name or service" in text:
        return "the server's name cannot be resolved"
    if "Read timed out" in text:
        return "the server fell silent"
    if isinstance(error, requests.exceptions.JSONDecodeError):
        return "the answer is not Kaggle's (a login page of the network in between?)"
    return "the connection broke" if "refused" not in text else "the connection was refused"


def retry_after(response: requests.Response) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date); None without a readable one."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def refuse_storage_error(response: requests.Response) -> None:
    """Raise for an answer of the storage that holds no data; a refused address counts as expired (TryAgainError with wait 0)."""
    status = response.status_code
    if status in (200, 206):
        return
    response.close()
    if status in (400, 401, 403):
        raise ExpiredError("the signed address has expired")
    if status in (408, 416, 425, 429) or status >= 500:
        raise TryAgainError(f"the storage answered {status}", retry_after(response))
    raise GaveUpError(f"the storage answered {status}, and trying again does not help; run with --list to see what Kaggle offers")


class ExpiredError(TryAgainError):
    """The storage refuses a signed address: ask for a new one."""


class Address:
    """One signed address shared by threads, renewed when the storage refuses it."""

    def __init__(self, sign: Callable[[], str]):
        self._sign, self._lock, self._url = sign, threading.Lock(), None

    def get(self) -> str:
        """The present address; asks for one when there is none."""
        with self._lock:
            if self._url is None:
                self._url = self._sign()
            return self._url

    def expire(self, url: str) -> None:
        """Forget ``url``, unless another thread already has a newer one."""
        with self._lock:
            if self._url == url:
                self._url = None

    def open(self, line: Line, headers: dict[str, str]) -> requests.Response:
        """GET the present address; status 200, 206 or 416. Raises TryAgainError, also when the address has just expired."""
        url = self.get()
        response = line.get(url, headers)
        if response.status_code == 416:
            return response
        try:
            refuse_storage_error(response)
        except ExpiredError:
            self.expire(url)
            raise
        return response


class PartFile:
    """A half file ``NAME.part`` and the note ``NAME.part.json`` that says of what it is the half."""

    def __init__(self, final: Path):
        self.final = Path(final)
        self.path = self.final.with_name(self.final.name + ".part")
        self._note = self.final.with_name(self.final.name + ".part.json")

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """All that may lie there: the whole file, the half one, its note."""
        return self.final, self.path, self._note

    @property
    def size(self) -> int:
        """Bytes there are."""
        return self.path.stat().st_size if self.path.exists() else 0

    def note(self) -> dict:
        """What the half file is of; empty when unknown."""
        try:
            note = json.loads(self._note.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def begin(self, note: dict) -> None:
        """Start from nothing: the old half goes before the new note comes, so that they never disagree."""
        self.path.unlink(missing_ok=True)
        self.final.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(self.path), replacing(self._note, "w", durable=False) as file:
            file.write(json.dumps(note, sort_keys=True))

    def drop(self) -> None:
        """Remove the half file and its note."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def commit(self, unpacked: Path | None = None) -> None:
        """Flush the whole file (or its ``unpacked`` content) to the disk and give it its name."""
        source = unpacked or self.path
        with disk_errors(self.path):
            descriptor = os.open(source, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(source, self.final)
        self.drop()

    def append(self, response: requests.Response, wanted: int | None, line: Line) -> None:
        """Append the body of ``response`` until ``wanted`` more bytes have come (None: until its end).

        What came before a break stays. Raises TryAgainError when the body ends early.
        """
        got = 0
        with open(self.path, "ab", buffering=0) as file:
            while wanted is None or got < wanted:
                try:
                    chunk = read_some(response, CHUNK if wanted is None else min(CHUNK, wanted - got))
                except TryAgainError as problem:
                    raise TryAgainError(str(problem), progress=got > 0) from None
                if not chunk:
                    break
                with disk_errors(self.path):
                    write_all(file, chunk)
                got += len(chunk)
                line.count(len(chunk))
        if wanted is not None and got < wanted:
            raise TryAgainError(f"the connection ended {wanted - got} bytes early", progress=got > 0)
        drain(response)


def drain(response: requests.Response) -> None:
    """Read the few bytes that may follow, so that the connection can be used again; drop it when there are many."""
    with contextlib.suppress(TryAgainError):
        for _ in range(4):
            if not read_some(response, 1 << 10):
                return
        response.close()


def read_some(response: requests.Response, limit: int) -> bytes:
    """What is there of a streamed body, at most ``limit`` bytes; empty at its end. Raises TryAgainError when the line breaks."""
    try:
        return response.raw.read1(limit, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        response.close()
        raise TryAgainError(explain(error)) from None


class disk_errors:  # noqa: N801 - reads as a statement
    """Turns a full disk, a quota or a forbidden folder into one sentence for the user."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if not isinstance(error, OSError):
            return
        way_out = "what has arrived is kept; make room and run the command again to go on"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"no room left for {self.path} ({error.strerror}); {way_out}") from error
        raise UserError(f"{self.path} cannot be written ({error.strerror or error}); mend that and run again") from error


def validator(response: requests.Response) -> str | None:
    """What If-Range may carry: a strong ETag, else Last-Modified, else None."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def stated_md5(response: requests.Response) -> str | None:
    """MD5 of the whole object in hexadecimal, as Google's storage states it in x-goog-hash; None when it does not."""
    found = re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", response.headers.get("x-goog-hash", ""))
    return base64.b64decode(found[1]).hex() if found else None


def content_range(response: requests.Response) -> tuple[int, int | None]:
    """(first byte, size of the whole object or None) of a 206 answer. Raises TryAgainError when it does not say."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None:
        response.close()
        raise TryAgainError("the storage sent a part without saying which")
    return int(found[1]), None if found[2] == "*" else int(found[2])
