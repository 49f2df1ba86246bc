"""Worker processes that die are replaced, their job is tried once more, and the rest goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.workers import WorkerDied, cores, run_jobs

ROOT = Path(__file__).resolve().parents[2]


def double(value):
    return value * 2


def die_on_three(value):
    if value == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return value * 2


def die_once(task):
    value, marker = task
    if value == 3 and not os.path.exists(marker):
        Path(marker).touch()
        os._exit(1)
    return value * 2


def raise_on_two(value):
    if value == 2:
        raise ValueError("two")
    return value


@pytest.mark.parametrize("workers", [0, 2])
def test_every_job_is_done_once(workers):
    assert sorted(run_jobs(double, range(8), workers)) == [(i, 2 * i) for i in range(8)]


def pid_of(_):
    time.sleep(0.2)  # so that one process cannot do all
    return os.getpid()


def test_processes_stay_for_the_next_call_and_are_replaced_when_they_died_meanwhile():
    first = {pid for _, pid in run_jobs(pid_of, range(4), 2)}
    assert {pid for _, pid in run_jobs(pid_of, range(4), 2)} == first
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    _wait_for(lambda: not any(map(_alive, first)))
    assert not first & {pid for _, pid in run_jobs(pid_of, range(4), 2)}


def test_leaving_early_ends_the_processes():
    results = run_jobs(pid_of, range(9), 2)
    _, pid = next(results)
    results.close()
    _wait_for(lambda: not _alive(pid))


def test_a_job_that_kills_its_worker_is_given_up_and_the_others_are_done():
    results = dict(run_jobs(die_on_three, range(8), 2))
    assert isinstance(results.pop(3), WorkerDied)
    assert results == {i: 2 * i for i in range(8) if i != 3}


def test_a_job_whose_worker_died_once_succeeds(tmp_path):
    tasks = [(i, str(tmp_path / "died")) for i in range(5)]
    assert sorted(result for _, result in run_jobs(die_once, tasks, 2)) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_job_is_raised_here(workers):
    with pytest.raises(ValueError, match="two"):
        list(run_jobs(raise_on_two, range(4), workers))


def test_no_orphans_are_left_when_the_main_process_is_killed(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from data.workers import run_jobs\n"
        "def work(task):\n    open(f'{sys.argv[1]}/{os.getpid()}', 'w').close()\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    list(run_jobs(work, range(2), 2))\n"
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(pids)])
    _wait_for(lambda: len(list(pids.iterdir())) == 2)
    process.kill()
    process.wait()
    _wait_for(lambda: not any(_alive(int(path.name)) for path in pids.iterdir()))


def _wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_at_least_one_core_is_known():
    assert cores() >= 1
