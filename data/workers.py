"""Worker processes that may die: a job that kills its worker is tried once more alone, then given up, and the rest goes on."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from common.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
MAX_IDLE_DEATHS = 3
SECONDS_TO_CONNECT = 20
JOBS_A_THREAD = 4  # under way or waiting on the cluster: enough that no worker idles, few enough for the scheduler


class WorkerDied:
    """The result of a job whose worker died twice: a crash in a decoder, or killed for want of memory."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, Result | WorkerDied]]:
    """Yield (task, function(task)) as they are done, from ``workers`` processes; 0 runs them in this process, for debugging.

    ``function`` must be importable; what it raises is raised here. Leaving the iteration early ends the processes at once,
    and so does the death of this process; otherwise they stay for the next call: to start one takes most of a second.
    """
    if workers == 0:
        for task in tasks:
            yield task, function(task)
        return
    waiting, suspects, idle_deaths = deque(tasks), [], 0
    while waiting or suspects:
        if idle_deaths > MAX_IDLE_DEATHS:
            raise UserError("worker processes end before they do anything; try --workers 1, or free some memory")
        # After a death nobody knows whose job it was: each job under way then is tried once more alone.
        alone = bool(suspects)
        batch = deque([suspects.pop()]) if alone else waiting
        idle_deaths += 1
        with contextlib.closing(_one_pool(function, batch, 1 if alone else workers)) as results:
            for task, result in results:
                idle_deaths = 0
                if result is not WorkerDied:
                    yield task, result
                elif alone:
                    yield task, WorkerDied()
                else:
                    suspects.append(task)


def run_on_cluster(
    function: Callable[[Task], Result], tasks: Iterable[Task], address: str
) -> Iterator[tuple[Task, Result | WorkerDied]]:
    """As ``run_jobs``, on the workers of a Dask cluster whose scheduler is at ``address`` (tcp://HOST:8786).

    Dask itself gives the jobs of a worker that dies to others; a job that has brought down several is given up. The workers must
    see the same folders and import this package. Raises UserError when there is no such cluster, it has no worker or not our
    code, or it is lost on the way.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise UserError(f"--scheduler needs Dask ({error}); pip install -r requirements-scale.txt") from error
    try:
        client = Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(f"no Dask cluster with workers at {address} ({error}); start one, see docs/scaling.md") from error
    waiting, running = iter(tasks), {}
    with client:
        done = as_completed(loop=client.loop)

        def submit(count: int) -> None:
            for task in itertools.islice(waiting, count):
                future = client.submit(function, task, pure=False)
                running[future.key] = task
                done.add(future)

        submit(JOBS_A_THREAD * max(1, sum(client.nthreads().values())))
        for future in done:
            task = running.pop(future.key)
            try:
                yield task, future.result()
            except KilledWorker:
                yield task, WorkerDied()
            except CancelledError as error:
                raise UserError(
                    f"the cluster at {address} is lost ({error}); start it and this again, it goes on from here"
                ) from error
            except (ModuleNotFoundError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "deserialization" not in str(error):
                    raise
                raise UserError(
                    f"the cluster at {address} cannot load this program; start scheduler and workers in this folder with "
                    "PYTHONPATH=. in front, see docs/scaling.md"
                ) from error
            submit(1)


def _one_pool(function: Callable, waiting: deque, workers: int) -> Iterator:
    """As ``run_jobs`` until a worker dies: then (task, WorkerDied) for each task under way, the others stay in ``waiting``."""
    pool = _idle.pop() if _idle else _Pool(workers)
    if pool.workers != workers:
        pool.end()
        pool = _Pool(workers)
    running: dict[Future, object] = {}
    broken = False
    try:
        while running or (waiting and not broken):
            while waiting and not broken and len(running) < 2 * workers:
                try:
                    with _signals_wait():
                        running[pool.executor.submit(function, waiting[0])] = waiting[0]
                except BrokenProcessPool:
                    broken = True
                else:
                    waiting.popleft()
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                task = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    broken = True
                    yield task, WorkerDied
                else:
                    yield task, future.result()
    finally:
        if broken or running:  # or the iteration is left early: nobody waits for what they are doing
            pool.end()
        else:
            _idle.append(pool)


class _Pool:
    """Worker processes, started as jobs come."""

    def __init__(self, workers: int):
        self.workers, self._others = workers, set(multiprocessing.active_children())
        self.executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)

    def end(self) -> None:
        """End the processes at once, whatever they are doing."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()
        self.executor.shutdown(cancel_futures=True)


_idle: list[_Pool] = []  # the processes of the last call, for the next one


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold signals back while a process is being started: half-started ones print tracebacks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def start_worker() -> None:
    """Leave signals of the terminal to the main process, and leave when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
