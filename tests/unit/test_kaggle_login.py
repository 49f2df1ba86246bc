"""Logging in and listing, with the real client against a Kaggle of our own."""

import json
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
import requests

from common.errors import UserError
from data.kaggle import Pace, RefusedError, connect, find_credentials
from data.transfer import GaveUpError, Line, TryAgainError, explain, retry_after
from tests.kaggle_server import SECRET_KEY, SECRET_TOKEN, Fault, KaggleServer, Options, once

FILES = {"train.csv": b"image_id\n", "train_images/a.tiff": b"a" * 10, "train_images/b.tiff": b"b" * 20}
fast = partial(Line, first_wait=0.01, longest_wait=0.05, read_timeout=0.5, connect_timeout=1.0)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine without any credentials."""
    for name in (
        "KAGGLE_API_TOKEN",
        "KAGGLE_USERNAME",
        "KAGGLE_KEY",
        "KAGGLE_CONFIG_DIR",
        "XDG_CONFIG_HOME",
        "KAGGLE_KERNEL_RUN_TYPE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def serve(home, monkeypatch):
    """Start a server and point the client at it."""
    with_servers = []

    def start(login="token", fault=None, **options):
        server = KaggleServer(FILES, Options(**options), fault).__enter__()
        with_servers.append(server)
        for name, value in server.environment(login).items():
            monkeypatch.setenv(name, value)
        return server

    yield start
    for server in with_servers:
        server.__exit__()


def refuse(text):
    raise AssertionError(f"no warning was due: {text}")


@pytest.mark.parametrize("login", ["token", "key"])
def test_logs_in_with_every_variable(serve, login):
    serve(login)
    assert connect(fast(), refuse).list_files() == {"train.csv": 9, "train_images/a.tiff": 10, "train_images/b.tiff": 20}


@pytest.mark.parametrize(
    "place", [".kaggle/access_token", ".kaggle/access_token.txt", ".kaggle/kaggle.json", ".config/kaggle/kaggle.json"]
)
def test_logs_in_with_every_file(serve, home, place):
    serve("none")
    path = home / place
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"username": "ada", "key": SECRET_KEY}) if place.endswith("json") else SECRET_TOKEN + "\n")
    assert len(connect(fast(), refuse).list_files()) == 3


def test_config_dir_names_the_folder_of_the_key(serve, home, monkeypatch):
    serve("none")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home))
    (home / "kaggle.json").write_text(json.dumps({"username": "ada", "key": SECRET_KEY}))
    assert find_credentials()[0].where == str(home / "kaggle.json")
    connect(fast(), refuse)


def test_logs_in_as_kaggle_auth_login_left_it(serve, home):
    server = serve("none")
    (home / ".kaggle").mkdir()
    (home / ".kaggle/credentials.json").write_text(json.dumps({"refresh_token": "refresh-5ecret", "username": "ada", "scopes": []}))
    assert len(connect(fast(), refuse).list_files()) == 3
    assert server.count("oauth") == 1


def test_a_login_that_expires_on_the_way_is_renewed(serve, home):
    server = serve("none")
    (home / ".kaggle").mkdir()
    (home / ".kaggle/credentials.json").write_text(json.dumps({"refresh_token": "refresh-5ecret", "username": "ada", "scopes": []}))
    kaggle = connect(fast(), refuse)
    server.options.tokens = ("an0ther-t0ken",)
    assert len(kaggle.list_files()) == 3 and kaggle.sign_file("train.csv")
    assert server.count("oauth") == 2
    server.options.tokens = ("a-third",)
    with pytest.raises(RefusedError, match="401"):  # so soon it is not its age
        kaggle.sign_file("train.csv")


def test_a_login_that_has_expired_since_it_was_stored_is_renewed(serve, home):
    server = serve("none")
    (home / ".kaggle").mkdir()
    login = {"refresh_token": "refresh-5ecret", "username": "ada", "scopes": [], "access_token": "0ld"}
    login["access_token_expiration"] = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()
    (home / ".kaggle/credentials.json").write_text(json.dumps(login))
    assert len(connect(fast(), refuse).list_files()) == 3 and server.count("oauth") == 1


def test_no_credentials_and_no_call(serve):
    server = serve("none")
    with pytest.raises(UserError, match=r"no Kaggle credentials.*kaggle\.com/settings"):
        connect(fast(), refuse)
    assert not server.requests


def test_a_broken_key_file_is_named(serve, home):
    serve("none")
    (home / ".kaggle").mkdir()
    (home / ".kaggle/kaggle.json").write_text("{username: ada}")
    with pytest.raises(UserError, match=r"kaggle\.json cannot be read"):
        connect(fast(), refuse)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_token_as_windows_saves_it(serve, home, encoding):
    serve("none")
    (home / ".kaggle").mkdir()
    (home / ".kaggle/access_token").write_text(SECRET_TOKEN + "\n", encoding=encoding)
    if encoding == "utf-8-sig":
        assert len(connect(fast(), refuse).list_files()) == 3
        return
    with pytest.raises(UserError, match=r"access_token cannot be read; make a new one and save it as plain UTF-8"):
        connect(fast(), refuse)


def test_a_token_that_is_no_path_is_not_shown(serve, monkeypatch):
    serve("none")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "SECRET" * 100)
    with pytest.raises(UserError) as stop:
        find_credentials()
    assert "SECRET" not in str(stop.value) and "KAGGLE_API_TOKEN cannot be read" in str(stop.value)


@pytest.mark.parametrize("content", ["[]", "{", '{"refresh_token": 3, "username": "ada", "access_token_expiration": "x"}'])
def test_a_damaged_login_is_named(serve, home, content):
    serve("none")
    (home / ".kaggle").mkdir()
    (home / ".kaggle/credentials.json").write_text(content)
    with pytest.raises(UserError):
        connect(fast(), refuse)


def test_a_wrong_key(serve):
    server = serve("key", keys=())
    with pytest.raises(UserError, match="does not accept the credentials in the variables KAGGLE_USERNAME and KAGGLE_KEY;"):
        connect(fast(), refuse)
    assert server.count("file") == 1  # no second try


def test_a_stale_token_alone(serve):
    serve("token", tokens=())
    with pytest.raises(UserError, match="token in the variable KAGGLE_API_TOKEN is no longer accepted"):
        connect(fast(), refuse)


def test_a_stale_token_does_not_hide_a_good_key(serve, monkeypatch):
    serve("key")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "an old one")
    warnings = []
    assert len(connect(fast(), warnings.append).list_files()) == 3
    assert "KAGGLE_API_TOKEN is no longer accepted" in warnings[0] and "Remove the token" in warnings[0]


def test_a_stale_token_and_a_wrong_key(serve, monkeypatch):
    serve("key", keys=())
    monkeypatch.setenv("KAGGLE_API_TOKEN", "an old one")
    with pytest.raises(UserError, match="KAGGLE_USERNAME and KAGGLE_KEY .and neither the token in the variable KAGGLE_API_TOKEN"):
        connect(fast(), lambda text: None)


def test_rules_not_accepted(serve):
    server = serve(rules_accepted=False)
    with pytest.raises(UserError, match=r"accept this competition's rules.*https://www\.kaggle\.com/competitions/prostate.*/rules"):
        connect(fast(), refuse)
    assert server.count("file") == 1


def test_offline(serve, monkeypatch):
    serve()
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="Kaggle cannot be reached"):
        connect(fast(), refuse)


def test_a_silent_server_is_not_waited_for_for_ever(serve):
    serve(fault=lambda request: Fault(how="stall", seconds=2.0))
    with pytest.raises(UserError, match="Kaggle cannot be reached: the server fell silent"):
        connect(fast(read_timeout=0.1), refuse)


@pytest.mark.parametrize("kind", ["introspect", "file", "list"])
@pytest.mark.parametrize("fault", [Fault(429), Fault(429, "0"), Fault(503), Fault(how="reset")])
def test_a_passing_fault_is_waited_out(serve, kind, fault):
    server = serve(fault=once(kind, fault, times=2))
    assert len(connect(fast(), refuse).list_files()) == 3
    assert server.count(kind) == 3


def test_retry_after_is_obeyed(serve):
    waits = []
    serve(fault=once("list", Fault(429, "7")))
    line = fast()
    line.pause = waits.append
    connect(line, refuse).list_files()
    assert max(waits) == pytest.approx(7, abs=0.1)


def test_lists_all_pages_and_passes_an_empty_one(serve):
    server = serve(page_size_most=1, empty_pages=(0, 2))
    assert list(connect(fast(), refuse).list_files()) == list(FILES)
    assert server.count("list") == 5


def test_a_list_that_goes_round_in_circles_ends(serve, monkeypatch):
    server = serve(page_size_most=1)
    kaggle = connect(fast(), refuse)
    answer = type("Page", (), {"files": [], "next_page_token": "again"})()
    monkeypatch.setattr(kaggle, "call", lambda *_: answer)
    with pytest.raises(UserError, match="does not end"):
        kaggle.list_files()
    assert server.count("list") == 0


def test_a_missing_file_is_not_asked_for_twice(serve):
    server = serve()
    with pytest.raises(GaveUpError, match="Kaggle has no train_images/z.tiff"):
        connect(fast(), refuse).sign_file("train_images/z.tiff")
    assert server.count("file", "train_images/z.tiff") == 1


def test_no_secret_in_what_is_shown(serve):
    serve("key")
    credential = find_credentials()[0]
    assert SECRET_KEY not in repr(credential)
    assert "s1gnature" not in explain(requests.ConnectionError("Max retries exceeded with url: /x?X-Goog-Signature=s1gnature"))


def test_pace_widens_with_every_refusal_and_narrows_again():
    pauses = []
    line = fast(first_wait=1.0)
    line.pause = pauses.append
    pace = Pace(line, longest=3.0)
    pace.wait()
    assert not pauses
    for _ in range(3):
        pace.slower(0.0)
    pace.wait()
    pace.wait()
    assert pauses[-1] == pytest.approx(3.0, abs=0.1)
    for _ in range(100):
        pace.faster()
    assert pace._gap == 0.0


@pytest.mark.parametrize(
    ("text", "low", "high"), [("120", 120, 120), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("soon", None, None)]
)
def test_retry_after_reads_seconds_and_dates(text, low, high):
    response = requests.Response()
    response.headers["Retry-After"] = text
    assert retry_after(response) == low == high


def test_gives_up_after_the_tries_but_counts_progress():
    line = fast(tries=3)
    seen = []

    def action():
        seen.append(1)
        raise TryAgainError("no", progress=len(seen) < 5)

    with pytest.raises(GaveUpError, match="no, 3 times in a row"):
        line.retrying("x", action)
    assert len(seen) == 6
