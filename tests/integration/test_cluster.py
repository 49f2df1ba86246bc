"""Extraction on a Dask cluster: the files of one machine, also when a worker is killed on the way."""

import os
import signal
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from data.patches import ExtractSettings, extract
from data.workers import WorkerDied, run_on_cluster
from tests.conftest import write_panda_folder

distributed = pytest.importorskip("distributed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """Two worker processes of one thread."""
    options = {"dashboard_address": None, "silence_logs": 50, "local_directory": str(tmp_path_factory.mktemp("dask"))}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **options) as cluster:
            yield cluster


@pytest.fixture
def cluster(two_workers):
    """The two, both at work when a test begins; a cluster that is closed while it starts a worker anew stumbles."""
    yield two_workers
    with distributed.Client(two_workers) as client:
        client.wait_for_workers(2, timeout=100)


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".csv"))
    return {path.relative_to(folder): path.read_bytes() for path in files}


def kill_a_worker_after_the_first_patches(cluster, folder, killed):
    deadline = time.monotonic() + 200
    while len(list(folder.rglob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    worker = next(iter(cluster.workers.values()))
    killed.append(worker.pid)
    os.kill(worker.pid, signal.SIGKILL)


def test_a_cluster_that_loses_a_worker_gives_the_files_of_one_machine(cluster, tmp_path):
    slides = write_panda_folder(tmp_path / "panda", 1024, 128)
    settings = ExtractSettings(data_dir=slides, output_dir=tmp_path / "here" / "patches", patch_size=64, workers=0)
    alone = extract(settings)
    there, killed = replace(settings, output_dir=tmp_path / "there" / "patches", scheduler=cluster.scheduler_address), []
    murder = threading.Thread(target=kill_a_worker_after_the_first_patches, args=(cluster, there.output_dir, killed))
    murder.start()
    result = extract(there)
    murder.join()
    assert killed and len(result.patches) == len(alone.patches) > 50
    assert not result.failed
    assert contents(there.output_dir) == contents(settings.output_dir)


def test_a_cluster_that_lacks_this_program_or_is_lost_is_one_sentence(cluster, monkeypatch):
    class Broken:
        key = "k"

        def __init__(self, error):
            self.error = error

        def result(self):
            raise self.error

    graph = RuntimeError("Error during deserialization of the task graph. This frequently occurs if ...")
    for error, says in ((graph, "PYTHONPATH=. in front"), (CancelledError("scheduler-connection-lost"), "is lost")):
        monkeypatch.setattr(distributed.Client, "submit", lambda self, *_, error=error, **__: Broken(error))
        monkeypatch.setattr(distributed.as_completed, "add", lambda self, future: None)
        monkeypatch.setattr(distributed.as_completed, "__iter__", lambda self, error=error: iter([Broken(error)]))
        with pytest.raises(UserError, match=says):
            list(run_on_cluster(print, [1], cluster.scheduler_address))


def test_a_job_that_kills_every_worker_is_given_up(cluster):
    assert [isinstance(result, WorkerDied) for _, result in run_on_cluster(os._exit, [1], cluster.scheduler_address)] == [True]


def test_no_cluster_is_one_sentence(monkeypatch):
    monkeypatch.setattr("data.workers.SECONDS_TO_CONNECT", 0.5)
    with pytest.raises(UserError, match="no Dask cluster with workers at tcp://127.0.0.1:9"):
        list(run_on_cluster(len, ["a"], "tcp://127.0.0.1:9"))
