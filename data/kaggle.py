"""Kaggle's side of the download: credentials, one check that says what is wrong, the listing, signed addresses.

Uses ``kagglesdk``, the library inside the ``kaggle`` package. The package itself is never imported: it logs in while being
imported, without a time-out, and prints to stdout. Imported lazily, so that ``--help`` and ``--verify`` need neither.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import requests

from common.errors import UserError
from data.panda import COMPETITION
from data.transfer import GaveUpError, Line, TryAgainError, explain, retry_after

PAGE_SIZE = 200  # the most that the server gives
MOST_EMPTY_PAGES = 50
TRIES_BEFORE_OFFLINE = 4  # at the start; a run that has begun is more patient
RULES_PAGE = f"https://www.kaggle.com/competitions/{COMPETITION}/rules"
SETTINGS_PAGE = "https://www.kaggle.com/settings"
NEW_TOKEN = f"make a new API token at {SETTINGS_PAGE}"
RENEWAL_HELPS = 60.0  # seconds: a login that is refused sooner after its renewal is not refused for its age


@dataclass(frozen=True)
class Credential:
    """One way to log in. kind: "token", "key" or "oauth". where: its place, for the user. The secret is never shown."""

    kind: str
    where: str
    username: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)


def find_credentials() -> list[Credential]:
    """Everything on this machine that Kaggle's client would log in with, in the client's order. Raises UserError: broken file."""
    from kagglesdk.kaggle_env import get_access_token_from_env

    found = []
    try:
        token, _ = get_access_token_from_env()
    except (UnicodeError, OSError):  # the message may hold the token
        raise UserError(f"the API token in {_token_place()} cannot be read; make a new one and save it as plain UTF-8") from None
    if token:
        found.append(Credential("token", _token_place(), secret=token.removeprefix("\ufeff")))
    key = _legacy_key()
    if key:
        found.append(key)
    if Path("~/.kaggle/credentials.json").expanduser().exists():
        found.append(Credential("oauth", "~/.kaggle/credentials.json"))
    return found


def _token_place() -> str:
    if os.environ.get("KAGGLE_API_TOKEN"):
        return "the variable KAGGLE_API_TOKEN"
    if Path("~/.kaggle/access_token").expanduser().exists():
        return "~/.kaggle/access_token"
    return "~/.kaggle/access_token.txt" if Path("~/.kaggle/access_token.txt").expanduser().exists() else "this notebook"


def _key_file() -> Path:
    """Where the client looks for kaggle.json."""
    if os.environ.get("KAGGLE_CONFIG_DIR"):
        return Path(os.environ["KAGGLE_CONFIG_DIR"]) / "kaggle.json"
    home = Path("~/.kaggle").expanduser()
    if sys.platform.startswith("linux") and not home.exists():
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "kaggle" / "kaggle.json"
    return home / "kaggle.json"


def _legacy_key() -> Credential | None:
    """Username and key of kaggle.json, each overridden by its variable."""
    username, key = os.environ.get("KAGGLE_USERNAME"), os.environ.get("KAGGLE_KEY")
    if username and key:
        return Credential("key", "the variables KAGGLE_USERNAME and KAGGLE_KEY", username, key)
    path = _key_file()
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        return Credential("key", str(path), username or values["username"], key or values["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as Kaggle's key file ({type(error).__name__}); {NEW_TOKEN} and save it there"
        ) from None


class Pace:
    """Spaces the API calls of all threads: no gap at first, doubling with every 429, shrinking again with every success."""

    def __init__(self, line: Line, longest: float = 60.0):
        self._line, self._longest, self._lock, self._gap, self._next = line, longest, threading.Lock(), 0.0, 0.0

    def wait(self) -> None:
        """Sleep until this thread's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        if turn > now:
            self._line.pause(turn - now)

    def slower(self, told: float | None) -> None:
        """After a 429: all threads hold for as long as the server asked, and keep a wider gap."""
        with self._lock:
            self._gap = min(self._longest, max(self._line.first_wait, 2 * self._gap))
            self._next = max(self._next, time.monotonic() + (told if told is not None else self._gap))

    def faster(self) -> None:
        """After a success."""
        self._gap = self._gap * 0.9 if self._gap > 0.01 else 0.0


class Kaggle:
    """A logged-in client of the competition's data. Made by ``connect``. Its methods may be called from any thread."""

    def __init__(self, line: Line, credential: Credential | None):
        from kagglesdk.kaggle_client import KaggleClient

        self._line, self._pace, self._lock = line, Pace(line), threading.Lock()
        self.tries_unreachable = TRIES_BEFORE_OFFLINE
        self.new_token: Callable[[], str | None] | None = None  # of a login that lasts some hours
        self._renewing, self._renewed = threading.Lock(), -math.inf
        token = credential.secret if credential and credential.kind != "key" else None
        self._client = KaggleClient(api_token=token)
        self._client.__enter__()
        # The client offers no way to its session, and without it there is no time-out.
        self._session = line.mount(self._client.http_client()._session)
        if token is None:  # else the client would prefer a stale token of the environment to the key
            self._session.auth = (credential.username, credential.secret) if credential else _anonymous
        # A redirect to the storage is not followed: its address is what we want, and one GET is saved.
        self._session.max_redirects = 0

    def list_files(self) -> dict[str, int]:
        """Name -> size in bytes of every file of the competition, over all pages."""
        from kagglesdk.competitions.types.competition_api_service import ApiListDataFilesRequest

        files, token, seen, empty = {}, "", set(), 0
        while True:
            request = ApiListDataFilesRequest()
            request.competition_name, request.page_size, request.page_token = COMPETITION, PAGE_SIZE, token
            page = self.call("the file list", self._client.competitions.competition_api_client.list_data_files, request)
            files.update({file.name: file.total_bytes for file in page.files or []})
            seen.add(token)
            token, empty = page.next_page_token, 0 if page.files else empty + 1
            if not token:
                return files
            if token in seen or empty > MOST_EMPTY_PAGES:  # the server has been seen to send an empty page now and then
                raise UserError(f"Kaggle's file list does not end (after {len(files)} files); try again in an hour")

    def sign_file(self, name: str) -> str:
        """A signed storage address of one file, good for some minutes to hours."""
        from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFileRequest

        request = ApiDownloadDataFileRequest()
        request.competition_name, request.file_name = COMPETITION, name
        return self._redirect(name, self._client.competitions.competition_api_client.download_data_file, request)

    def sign_bundle(self) -> str:
        """A signed storage address of the one zip file that holds everything."""
        from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFilesRequest

        request = ApiDownloadDataFilesRequest()
        request.competition_name = COMPETITION
        return self._redirect("the bundle", self._client.competitions.competition_api_client.download_data_files, request)

    def introspect(self, token: str) -> bool:
        """Whether Kaggle still accepts an access token."""
        from kagglesdk.security.types.oauth_service import IntrospectTokenRequest

        request = IntrospectTokenRequest()
        request.token = token
        try:
            answer = self.call("the token", self._client.security.oauth_client.introspect_token, request)
        except (RefusedError, AbsentError):
            return False
        return bool(answer.active and answer.username)

    def oauth_token(self, anew: bool = False) -> str | None:
        """The access token of `kaggle auth login`, refreshed when it is old or ``anew``; None when Kaggle refuses it."""
        from kagglesdk.kaggle_creds import KaggleCredentials

        try:
            stored = KaggleCredentials.load(client=self._client)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError("~/.kaggle/credentials.json is damaged; log in again: kaggle auth login") from None
        if stored is None:
            return None
        try:
            if anew:
                self.call("the login", lambda request: stored.refresh_access_token(), None)
            return self.call("the login", lambda request: stored.get_access_token(), None)
        except RefusedError:
            return None

    def _redirect(self, what: str, function: Callable, request) -> str:
        def ask(request):
            try:
                response = function(request)
            except requests.exceptions.TooManyRedirects as error:
                return self._outside(error.response)
            response.close()
            raise TryAgainError("Kaggle sent no storage address")

        return self.call(what, ask, request)

    def _outside(self, response: requests.Response) -> str:
        """Follow redirects inside Kaggle with the credentials; the first address on another host is the storage's."""
        for _ in range(5):
            address = requests.compat.urljoin(response.url, response.headers.get("location", ""))
            if urlsplit(address).hostname != urlsplit(response.url).hostname:
                return address
            response = self._session.get(address, allow_redirects=False, stream=True)
            response.close()
            response.raise_for_status()
        raise TryAgainError("Kaggle sent no storage address")

    def call(self, what: str, function: Callable, request):
        """One API call with patience: waits on 429, 5xx and a broken line. Raises RefusedError or GaveUpError otherwise."""

        def once():
            self._pace.wait()
            begun = time.monotonic()
            try:
                with self._lock:
                    answer = function(request)
            except requests.exceptions.HTTPError as error:
                if error.response.status_code == 401 and self._log_in_again(begun):
                    raise TryAgainError("the login has expired and is renewed", wait=0.0) from None
                raise self._problem(what, error) from None
            except requests.RequestException as error:
                raise TryAgainError(explain(error), unreachable=True) from None
            self._pace.faster()
            return answer

        return self._line.retrying(what, once, self.tries_unreachable)

    def _log_in_again(self, begun: float) -> bool:
        """Put a new access token in the place of one that has expired; whether that was done since ``begun``."""
        with self._renewing:
            if self._renewed > begun:
                return True  # by another thread
            if self.new_token is None or begun - self._renewed < RENEWAL_HELPS or not (token := self.new_token()):
                return False
            self._session.auth = self._client.http_client().BearerAuth(token)
            self._renewed = time.monotonic()
        return True

    def _problem(self, what: str, error: requests.exceptions.HTTPError) -> Exception:
        response = error.response
        if response.status_code == 404:
            return AbsentError(f"Kaggle has no {what}; run with --list to see what there is")
        if response.status_code == 429:
            told = retry_after(response)
            self._pace.slower(told)
            return TryAgainError("Kaggle's rate limit is reached", told)
        if response.status_code in (408, 425) or response.status_code >= 500:
            return TryAgainError(f"Kaggle answered {response.status_code}", retry_after(response))
        return RefusedError(response.status_code, str(error))


class AbsentError(GaveUpError):
    """Kaggle has no such file (404). Trying again is useless."""


class RefusedError(UserError):
    """Kaggle says no: wrong credentials (401), rules not accepted (403), or a bad request. Trying again is useless."""

    def __init__(self, status: int, message: str):
        self.status = status
        words = "" if "for url" in message else f": {message.rstrip('.')}"
        if status == 401:
            super().__init__(f"Kaggle does not accept the credentials (401); {NEW_TOKEN}")
        elif status == 403:
            way_out = f"log in at {RULES_PAGE}, press Late Submission or Join, accept the rules, and run this again"
            super().__init__(f"Kaggle refuses the download (403){words}; {way_out}")
        else:
            super().__init__(f"Kaggle does not understand this program ({status}){words}; a newer version of it may be needed")


def _anonymous(request):
    return request


def connect(line: Line, warn: Callable[[str], None]) -> Kaggle:
    """Log in and make sure that files may be fetched, before any transfer.

    ``warn`` receives a sentence when a stale credential was passed over for a good one. Raises UserError that tells apart: no
    credentials, wrong ones, a stale token, rules not accepted, and no way to reach Kaggle.
    """
    found = find_credentials()
    if not found:
        raise UserError(
            f"no Kaggle credentials on this machine; {NEW_TOKEN} and save it as ~/.kaggle/access_token or in KAGGLE_API_TOKEN "
            "(username and key in ~/.kaggle/kaggle.json or in KAGGLE_USERNAME and KAGGLE_KEY work as well)"
        )
    stale = []
    for credential in found:
        kaggle = _log_in(line, credential)
        if kaggle is None:
            stale.append(credential.where)
            continue
        if stale:
            warn(f"the token in {' and in '.join(stale)} is no longer accepted; going on with {credential.where}. "
                 "Remove the token, it also blocks Kaggle's own client")  # fmt: skip
        _check_access(kaggle, credential, stale)
        return kaggle
    raise UserError(f"the token in {' and in '.join(stale)} is no longer accepted by Kaggle; {NEW_TOKEN} and put it there")


def _log_in(line: Line, credential: Credential) -> Kaggle | None:
    """A client with this credential; None when it is a token that Kaggle no longer accepts."""
    if credential.kind == "key":
        return Kaggle(line, credential)
    anonymous = Kaggle(line, None)
    with _offline_named():
        token = anonymous.oauth_token() if credential.kind == "oauth" else credential.secret
        if not token or (credential.kind == "token" and not anonymous.introspect(token)):
            return None
    kaggle = Kaggle(line, Credential(credential.kind, credential.where, secret=token))
    if credential.kind == "oauth":
        kaggle.new_token = lambda: anonymous.oauth_token(anew=True)
    return kaggle


def _check_access(kaggle: Kaggle, credential: Credential, stale: list[str]) -> None:
    try:
        with _offline_named():
            kaggle.sign_file("train.csv")
    except RefusedError as refusal:
        if refusal.status != 401:
            raise
        way_out = "log in again: kaggle auth login" if credential.kind == "oauth" else f"{NEW_TOKEN} and put it there"
        too = f" (and neither the token in {' and in '.join(stale)})" if stale else ""
        raise UserError(f"Kaggle does not accept the credentials in {credential.where}{too}; {way_out}") from None
    kaggle.tries_unreachable = None


class _offline_named:  # noqa: N801 - reads as a statement
    """Says that Kaggle cannot be reached, where a first call gives up."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, GaveUpError) and isinstance(error.__cause__, TryAgainError):
            raise UserError(
                f"Kaggle cannot be reached: {error.__cause__}; check the network and any proxy, then run again"
            ) from None
