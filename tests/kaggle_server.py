"""A Kaggle of our own on 127.0.0.1, for tests and benchmarks: the API calls and the storage that a download meets, with faults.

Stands in as an HTTP proxy, so that the real kaggle client is used unmodified: ``environment()`` holds the variables that send
its calls here. A fault is a function of the request that returns what goes wrong with it, or None.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import itertools
import json
import socket
import struct
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

STORAGE = "storage.example"
SECRET_KEY, SECRET_TOKEN, SECRET_SIGNATURE = "key-5ecret", "KGAT-5ecret", "s1gnature"  # noqa: S105


@dataclass
class Fault:
    """What goes wrong with one answer.

    status, retry_after, message: an error instead of the answer. after: bytes of the body before it happens; how: "close",
    "reset", "stall" (then close after ``seconds``). no_length: neither length nor ranges. flip: one byte of the body is wrong.
    whole: the range is ignored.
    """

    status: int = 0
    retry_after: str | None = None
    message: str = "a fault"
    after: int | None = None
    how: str = "close"
    seconds: float = 30.0
    no_length: bool = False
    flip: bool = False
    whole: bool = False


@dataclass
class Request:
    """What a fault function sees. kind: list, file, bundle, introspect, oauth or storage. name: of the file, or "bundle"."""

    kind: str
    name: str
    first: int = 0
    length: int = 0


@dataclass
class Options:
    """How this Kaggle behaves when nothing is broken."""

    page_size_most: int = 200
    empty_pages: tuple[int, ...] = ()  # numbers of pages that come empty, with a token
    rules_accepted: bool = True
    tokens: tuple[str, ...] = (SECRET_TOKEN,)
    keys: tuple[tuple[str, str], ...] = (("ada", SECRET_KEY),)
    wrapped: tuple[str, ...] = ()  # names that are served as NAME.zip
    md5: bool = True
    wrong_md5: tuple[str, ...] = ()
    validators: bool = True
    deflate: bool = False
    file_calls_before_limit: int | None = None
    rate: float | None = None  # bytes a second of one storage connection
    extra_listing: dict[str, int] = field(default_factory=dict)


class KaggleServer:
    """Serves ``files`` (name -> bytes or Path) as the competition's data. Use as a context manager."""

    def __init__(self, files: dict[str, bytes | Path], options: Options | None = None, fault: Callable | None = None):
        self.files, self.options, self.fault = files, options or Options(), fault or (lambda request: None)
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.epoch = 0  # addresses signed before the present epoch have expired
        self._objects: dict[str, tuple[str, bytes, bytes]] = {}
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.kaggle = self
        self.port = self._http.server_address[1]

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def environment(self, login: str = "token") -> dict[str, str]:
        """Variables under which the kaggle client talks to this server, logged in by "token", "key" or not at all."""
        here = f"http://127.0.0.1:{self.port}"
        secrets = {"token": {"KAGGLE_API_TOKEN": SECRET_TOKEN}, "key": {"KAGGLE_USERNAME": "ada", "KAGGLE_KEY": SECRET_KEY}}
        proxy = {"HTTP_PROXY": here, "http_proxy": here, "NO_PROXY": "", "no_proxy": ""}
        return {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", **proxy, **secrets.get(login, {})}

    def expire_addresses(self) -> None:
        """Every address signed so far is refused from now on."""
        self.epoch += 1

    def count(self, kind: str, name: str | None = None) -> int:
        """Requests of one kind so far."""
        with self.lock:
            return sum(request.kind == kind and name in (None, request.name) for request in self.requests)

    def read(self, name: str) -> bytes:
        """Content of one file."""
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()

    def _zip(self) -> bytes:
        """All files in one zip; stored, or every second one deflated."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for number, name in enumerate(self.files):
                packed = self.options.deflate and number % 2 == 0
                archive.writestr(name, self.read(name), zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
        return buffer.getvalue()

    def content(self, name: str) -> tuple[str, bytes, bytes]:
        """(name in the address, body, MD5 of the body) of a storage object."""
        with self.lock:
            if name not in self._objects:
                shown, body = self._make(name)
                self._objects[name] = shown, body, hashlib.md5(body, usedforsecurity=False).digest()
            return self._objects[name]

    def _make(self, name: str) -> tuple[str, bytes]:
        if name == "bundle":
            return "archive.zip", self._zip()
        if name in self.options.wrapped:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wrapper:
                wrapper.writestr(zipfile.ZipInfo(name.split("/")[-1]), self.read(name), zipfile.ZIP_DEFLATED)
            return f"{name}.zip", buffer.getvalue()
        return name, self.read(name)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def kaggle(self) -> KaggleServer:
        return self.server.kaggle

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        # Through a proxy the client sends head and body of a POST apart, and waits for the kernel's acknowledgement between them.
        if hasattr(socket, "TCP_QUICKACK"):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        super().handle_one_request()

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        method = self.path.rsplit("/", 1)[-1]
        kinds = {
            "ListDataFiles": "list",
            "DownloadDataFile": "file",
            "DownloadDataFiles": "bundle",
            "IntrospectToken": "introspect",
            "GenerateAccessToken": "oauth",
        }
        if method not in kinds:
            return self.error(404, f"no method {method}")
        request = Request(kinds[method], body.get("fileName") or ("bundle" if method == "DownloadDataFiles" else ""))
        if self.stumbles(request):
            return None
        return getattr(self, f"answer_{request.kind}")(body)

    def stumbles(self, request: Request) -> Fault | None:
        """Enter the request; when an error is due, send it and return it."""
        with self.kaggle.lock:
            self.kaggle.requests.append(request)
            fault = self.kaggle.fault(request)
        if fault is None:
            return None
        if fault.status:
            self.error(fault.status, fault.message, fault.retry_after)
            return fault
        if request.kind != "storage":
            self.hang_up(fault.how, fault.seconds)
            return fault
        self.pending = fault
        return None

    def allowed(self) -> bool:
        """Whether the credentials are right; sends the 401 otherwise."""
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        options = self.kaggle.options
        if kind == "Bearer" and value in options.tokens:
            return True
        if kind == "Basic" and tuple(base64.b64decode(value).decode().split(":", 1)) in options.keys:
            return True
        self.error(401, "Unauthenticated")
        return False

    def answer_introspect(self, body):
        if body["token"] not in self.kaggle.options.tokens:
            return self.error(403, "Permission denied")
        return self.json({"active": True, "username": "ada"})

    def answer_oauth(self, body):
        if body.get("refreshToken") != "refresh-5ecret":
            return self.error(401, "Unauthenticated")
        return self.json({"token": self.kaggle.options.tokens[0], "expiresIn": 3600})

    def answer_list(self, body):
        if not self.allowed():
            return None
        options, size = self.kaggle.options, min(int(body.get("pageSize") or 20), self.kaggle.options.page_size_most)
        names = [*((name, len(self.kaggle.read(name))) for name in self.kaggle.files), *options.extra_listing.items()]
        page, empties = (int(part) for part in (body.get("pageToken") or "0.0").split("."))
        if page in options.empty_pages and not empties:
            return self.json({"files": [], "nextPageToken": f"{page}.1"})
        rows = [
            {"ref": "", "name": name, "totalBytes": total, "creationDate": "2020-04-21T17:15:45.4270000Z"}
            for name, total in names[page * size : (page + 1) * size]
        ]
        more = {"nextPageToken": f"{page + 1}.0"} if (page + 1) * size < len(names) else {}
        return self.json({"files": rows, **more})

    def answer_file(self, body):
        if not self.allowed():
            return None
        options, name = self.kaggle.options, body["fileName"]
        if not options.rules_accepted:
            return self.error(403, "You must accept this competition's rules before you'll be able to download files.")
        if name not in self.kaggle.files:
            return self.error(404, "Not found")
        limit = options.file_calls_before_limit
        if limit is not None and self.kaggle.count("file") > limit:
            return self.error(429, "Too many requests", "0")
        return self.redirect(name)

    def answer_bundle(self, body):
        if not self.allowed():
            return None
        if not self.kaggle.options.rules_accepted:
            return self.error(403, "You must accept this competition's rules before you'll be able to download files.")
        return self.redirect("bundle")

    def redirect(self, name: str):
        shown, _, _ = self.kaggle.content(name)
        query = f"object={quote(name, safe='')}&epoch={self.kaggle.epoch}&X-Goog-Signature={SECRET_SIGNATURE}"
        self.send_response(302)
        self.send_header("Location", f"http://{STORAGE}/kaggle-data/{quote(shown)}?{query}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):  # noqa: N802
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if "Authorization" in self.headers:
            return self.error(400, "credentials were sent to the storage")
        if query.get("X-Goog-Signature") != [SECRET_SIGNATURE] or int(query["epoch"][0]) < self.kaggle.epoch:
            return self.error(403, "expired")
        name = unquote(query["object"][0])
        _, body, md5 = self.kaggle.content(name)
        etag = f'"{md5.hex()}"'
        first, last, ranged = self.range(len(body), etag)
        self.pending = None
        if self.stumbles(Request("storage", name, first, last + 1 - first)):
            return None
        fault = self.pending or Fault()
        if fault.whole or fault.no_length:
            first, last, ranged = 0, len(body) - 1, False
        if first >= len(body) and len(body):
            return self.error(416, "beyond the end")
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.storage_headers(name, len(body), etag, first, last, ranged, fault)
        if self.kaggle.options.md5 and name != "bundle":
            told = bytes(16) if name in self.kaggle.options.wrong_md5 else md5
            self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={base64.b64encode(told).decode()}")
        self.end_headers()
        return self.send_body(name, memoryview(body)[first : last + 1], fault)

    def range(self, size: int, etag: str) -> tuple[int, int, bool]:
        """(first, last, whether it is a part) that the Range header asks for."""
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if not asked or (condition and condition != etag):
            return 0, size - 1, False
        first, last = asked.removeprefix("bytes=").split("-")
        if not first:
            return max(0, size - int(last)), size - 1, True
        return int(first), min(int(last) if last else size - 1, size - 1), True

    def storage_headers(self, name, size, etag, first, last, ranged, fault):
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        if fault.no_length:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Accept-Ranges", "bytes")
        if self.kaggle.options.validators:
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", "Tue, 21 Apr 2020 17:15:45 GMT")

    def send_body(self, name: str, view: memoryview, fault: Fault):
        if fault.flip and len(view):
            view = memoryview(bytes(view[:-1]) + bytes([view[-1] ^ 0xFF]))
        began = time.monotonic()
        cut = len(view) if fault.after is None else min(fault.after, len(view))
        for start in range(0, cut, 1 << 16):
            piece = view[start : min(start + (1 << 16), cut)]
            self.wfile.write(piece)
            with self.kaggle.lock:
                self.kaggle.sent[name] += len(piece)
            if self.kaggle.options.rate:
                time.sleep(max(0.0, began + (start + len(piece)) / self.kaggle.options.rate - time.monotonic()))
        if fault.after is not None:
            self.hang_up(fault.how, fault.seconds)
        elif fault.no_length:
            self.close_connection = True

    def hang_up(self, how: str, seconds: float):
        """End the connection in the middle of things."""
        self.wfile.flush()
        self.close_connection = True
        if how == "stall":
            time.sleep(seconds)
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def json(self, values: dict, status: int = 200, retry_after: str | None = None):
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body)

    def error(self, status: int, message: str, retry_after: str | None = None):
        self.json({"code": status, "message": message}, status, retry_after)


def once(kind: str, fault: Fault, name: str | None = None, times: int = 1) -> Callable[[Request], Fault | None]:
    """A fault that strikes the first ``times`` requests of a kind (for one file)."""
    left = itertools.count(times, -1)

    def strike(request: Request) -> Fault | None:
        return fault if request.kind == kind and name in (None, request.name) and next(left) > 0 else None

    return strike
