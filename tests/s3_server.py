"""An S3 server on this machine (moto's) that counts what it is asked, and refuses or breaks off on demand."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import requests
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

BUCKET = "tissue"


class _Silent(MotoRequestHandler):
    def log(self, *_) -> None:
        pass


class S3Server:
    """requests: "METHOD /path?query" of everything that was asked. busy: how many of the next requests are answered "slow down".
    breaks: after how many bytes the next answers to GETs of objects break off."""

    def __init__(self):
        self.requests: list[str] = []
        self.busy, self.breaks = 0, []
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Silent)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[S3Server]:
        """Answer until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            requests.put(f"{self.url}/{BUCKET}", timeout=60)  # the first one imports moto's S3, long on a busy machine
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def only_known_people(self, answer: bool) -> None:
        """Refuse (or no longer refuse) keys that nobody was given, as all are here."""
        requests.post(f"{self.url}/moto-api/reset-auth", data=b"0" if answer else b"inf", timeout=10)

    def asked(self, what: str) -> list[str]:
        """The requests so far that hold ``what``."""
        return [request for request in self.requests if what in request]

    def _answer(self, environ, start_response):
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        with self._lock:
            self.requests.append(request)
            busy = self.busy > 0 and not request.startswith("POST /moto")
            self.busy -= busy
            breaks = self.breaks.pop() if self.breaks and request.startswith("GET") and request.endswith("?") else None
        if busy:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        answer = self._moto(environ, start_response)
        return answer if breaks is None else [b"".join(answer)[:breaks]]
