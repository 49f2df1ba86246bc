"""An S3 server on this machine (moto's) that counts what it is asked, and refuses or breaks off on demand."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "tissue"


class _Silent(WSGIRequestHandler):
    def log(self, *_) -> None:
        pass


class S3Server:
    """requests: (method, path, query) of everything that was asked. failures: how many of the coming requests are answered 503."""

    def __init__(self):
        self.requests: list[tuple[str, str, str]] = []
        self.failures, self.broken = 0, 0
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
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def _answer(self, environ, start_response):
        with self._lock:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]))
            fails = self.failures > 0
            self.failures -= fails
        if fails:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        return self._moto(environ, start_response)

    def listings(self) -> list[str]:
        """Queries of the listings that were asked for."""
        return [query for _, _, query in self.requests if "list-type=2" in query]
