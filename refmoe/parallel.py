# SPDX-License-Identifier: Apache-2.0
"""Work on several items at once: in processes that never outlive this one, or on a Dask cluster."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from time import monotonic
from typing import Any, TypeVar

from refmoe.errors import InputError, require
from refmoe.files.numbers import integer

Item = TypeVar("Item")
Result = TypeVar("Result")
Returned = TypeVar("Returned")
Pairs = Generator[tuple[Item, Result], None, Returned]

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""Variables that make a BLAS library start one thread. A process reads them once, when it loads the library."""
HOPELESS = 3
"""After so many deaths in a row of a worker that had one item to itself, the other items are not tried."""
PATIENCE = 5.0
"""Seconds without a result after which a pool is asked whether it has ended, and a cluster for its workers."""
LONELY = 60.0
"""Seconds for which a cluster may have no worker."""
MOST_WORKERS = 1024
"""The most processes of one machine."""
CLUSTER_DEATHS = ("KilledWorker", "CommClosedError", "FutureCancelledError")
"""The names of Dask's exceptions for a task whose worker died, or whose cluster ended."""
SET_DEATH_SIGNAL = 1
"""The option of Linux's `prctl` that names the signal a process gets when its parent ends (PR_SET_PDEATHSIG)."""

SPAWN = multiprocessing.get_context("spawn")
"""Workers are spawned, not forked: a forked process would keep the threads of a BLAS that is already loaded."""


class WorkerLost(InputError):
    """The error for a task whose worker process died, or whose cluster ended."""


class WorkerDied(InputError):
    """The error for items whose worker process died. All other items have been worked on before it is raised."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = list(items)
        names = [str(getattr(item, "name", item)) for item in items]
        super().__init__(
            f"a worker process died, as if killed for want of memory, while it worked on {', '.join(names)}; what else "
            "was asked for is done; an --executor of fewer processes needs less memory"
        )


def in_background(call: Callable[[], Result]) -> Future[Result]:
    """The result of a call in a thread of its own, with the settings of this one, such as NumPy's errors.

    The thread keeps no process alive. A thread of an executor would: Python waits for it when it ends.
    """
    future: Future[Result] = Future()
    run = copy_context().run

    def work() -> None:
        try:
            future.set_result(run(call))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# ---- the life of a worker


@contextmanager
def lifeline() -> Iterator[Connection]:
    """The end of a pipe to give to a worker, which calls `end_with_parent` with it.

    The other end is closed when the body is left, and by the operating system when this process ends in any way.
    """
    reader, writer = SPAWN.Pipe(duplex=False)
    try:
        yield reader
    finally:
        writer.close()
        reader.close()


def end_with_parent(line: Connection) -> None:
    """Let this worker end as soon as its parent does, or closes the `lifeline`. To be called first in a worker.

    A thread waits on the pipe. It cannot run while a library holds the interpreter's lock, so on Linux the kernel
    kills the worker as well. The keyboard's interrupt is the parent's affair.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # a C library without prctl
            ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)

    def watch() -> None:
        with suppress(EOFError, OSError):
            line.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="refmoe-lifeline").start()


def begin_worker(line: Connection) -> None:
    """Begin the work of a process of a pool. A warning about numbers there would reach nobody who can act on it."""
    end_with_parent(line)
    warnings.simplefilter("ignore", RuntimeWarning)


@contextmanager
def process_pool(jobs: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes with one BLAS thread each. They end with the body, and with this process however it ends.

    jobs: the number of processes; None: one per core. When the body raises, running tasks end at once.
    A process starts as a task is handed in, and Linux ends it with the thread that has done so: that thread must last.
    """
    executor: ProcessPoolExecutor | None = None
    try:
        with environment(ONE_THREAD), lifeline() as line:
            executor = ProcessPoolExecutor(jobs or os.cpu_count(), SPAWN, begin_worker, (line,))
            yield executor
            executor.shutdown(wait=True, cancel_futures=True)
    finally:
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)


# ---- executors


def parse_executor(spec: str) -> tuple[str, str]:
    """The kind of an executor and the text after the colon. Raises InputError when `spec` names no executor.

    spec: ``processes``, ``processes:N`` or ``dask:ADDRESS``, as ``--executor`` takes them
    """
    kind, _, rest = spec.partition(":")
    if kind == "dask" and rest:
        return kind, rest
    if kind == "processes" and (not rest or 0 < (integer(rest) or 0) <= MOST_WORKERS):
        return kind, rest
    raise InputError(
        f"--executor is '{spec}', but processes, processes:N with N up to {MOST_WORKERS}, or dask:ADDRESS was expected"
    )


@contextmanager
def open_executor(spec: str) -> Iterator[Executor]:
    """The executor that ``--executor`` names: ``processes``, ``processes:N`` or ``dask:ADDRESS``. Raises InputError."""
    kind, rest = parse_executor(spec)
    if kind == "processes":
        with process_pool(integer(rest)) as pool, worker_deaths():
            yield pool
    else:
        with cluster(rest) as client, worker_deaths(), ByTurns(client) as turns:
            yield turns


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """A client of a Dask cluster that has a worker. Raises InputError where none answers or comes."""
    distributed = require("distributed", "cluster", f"--executor dask:{address}")
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(f"--executor dask:{address}: no scheduler answers there: {error}") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=LONELY)
        except TimeoutError:
            raise _no_worker(address) from None
        yield client


def _workers(client: Any, address: str) -> int:
    """The number of workers that a cluster has now. Raises InputError where its scheduler has ended."""
    try:
        return len(client.nthreads())
    except OSError as error:
        raise InputError(f"--executor dask:{address}: the scheduler answers no more: {error}") from None


def _no_worker(address: str) -> InputError:
    return InputError(f"--executor dask:{address}: the cluster had no worker for {LONELY:g} seconds")


class ByTurns(Executor):
    """Calls on a cluster: as many at a time as its workers have threads, and the next as soon as one has ended.

    A cluster gives all calls to its workers at once, and does not know how long each takes. So some workers would wait.
    Leaving the context drops the calls that have not begun.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._inner = client, client.get_executor(pure=False)
        self._waiting: SimpleQueue[tuple[Future[Any], Callable[[], Future[Any]]] | None] = SimpleQueue()
        self._running = 0
        self._ended = threading.Condition()
        self._left = False
        in_background(self._deal)

    def submit(self, function: Callable[..., Result], /, *given: Any, **named: Any) -> Future[Result]:
        future: Future[Result] = Future()
        self._waiting.put((future, partial(self._inner.submit, function, *given, **named)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop the calls that have not begun."""
        self._left = True
        self._waiting.put(None)
        with self._ended:
            self._ended.notify()

    def _deal(self) -> None:
        """Hand calls to the cluster, in a thread of its own: the one that gets results cannot ask for workers."""
        while (each := self._waiting.get()) is not None:
            future, begin = each
            self._wait_for_a_thread()
            if self._left:
                future.cancel()
            if future.set_running_or_notify_cancel():
                try:
                    begin().add_done_callback(partial(self._hand_over, future))
                except BaseException as error:
                    future.set_exception(error)
                    self._one_less()
            else:
                self._one_less()

    def _wait_for_a_thread(self) -> None:
        """Return when the cluster can begin another call, which counts from now on, or the context has been left."""
        while True:
            threads = self._threads()  # without the lock: the thread that brings the answer may wait for it
            with self._ended:
                if self._left or self._running < threads:
                    self._running += 1
                    return
                self._ended.wait(PATIENCE)  # and then ask again: a worker may have come

    def _threads(self) -> int:
        """How many calls the cluster can work on now, at least one: a worker may come for it."""
        try:
            threads: int = sum(self._client.nthreads().values())
        except Exception:  # of the connection; the call that is handed in next has the same one and raises it
            threads = 1
        return max(1, threads)

    def _hand_over(self, future: Future[Any], inner: Future[Any]) -> None:
        """Give the result of a call to who waits for it."""
        self._one_less()
        if inner.cancelled():
            future.set_exception(CancelledError())
        elif (error := inner.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(inner.result())

    def _one_less(self) -> None:
        with self._ended:
            self._running -= 1
            self._ended.notify()


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Turn the exceptions that a dead worker causes, when a task is handed in or fetched, into WorkerLost."""
    try:
        yield
    except (BrokenExecutor, CancelledError) as error:
        raise _lost(error) from None
    except Exception as error:
        if type(error).__name__ in CLUSTER_DEATHS:
            raise _lost(error) from None
        raise


def _lost(error: BaseException) -> WorkerLost:
    return WorkerLost(
        f"--executor: a worker process died while it computed ({type(error).__name__}); start the same command again: "
        "finished layers of an emission are kept"
    )


# ---- items and their results


@contextmanager
def results(
    function: Callable[[Item], Result], items: Sequence[Item], workers: str | int | None = None
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Yield an iterator over pairs (item, its result), in the order in which they finish.

    function, items: must be importable or picklable, as other processes receive them.
    workers: an executor, as `parse_executor` reads it, or a number of processes with one BLAS thread each; None: one
    process per core. With one process or one item, all work happens in this process.
    The iterator raises the exception of a call when it reaches that item. When a worker dies, the others go on: items
    that may have ended it are tried once more, each alone. The iterator raises WorkerDied, at its end, for those that
    end their worker again. A cluster tries such items by its own rules.
    """
    kind, rest = parse_executor(workers) if isinstance(workers, str) else ("processes", str(workers or ""))
    jobs = min(integer(rest) or os.cpu_count() or 1, len(items)) if kind == "processes" else 0
    if kind == "processes" and jobs <= 1:
        yield ((item, function(item)) for item in items)
        return
    pairs = _spread(function, list(items), jobs) if jobs else _on_cluster(function, list(items), rest)
    try:
        yield pairs
    finally:
        pairs.close()


def _on_cluster(function: Callable[[Item], Result], items: list[Item], address: str) -> Pairs[Item, Result, None]:
    """The pairs of `results`, from a cluster. Its scheduler gives the items of a dead worker to others, a few times."""
    dead: list[Item] = []
    with cluster(address) as client, ByTurns(client) as executor:
        futures = {executor.submit(function, item): item for item in items}
        left, alone_since = {*futures}, monotonic()
        while left:
            done, left = wait(left, PATIENCE, FIRST_COMPLETED)
            for future in done:
                if type(future.exception()).__name__ == "KilledWorker":
                    dead.append(futures[future])
                    continue
                with worker_deaths():
                    result = future.result()
                yield futures[future], result
            if done or _workers(client, address):
                alone_since = monotonic()
            elif monotonic() - alone_since > LONELY:
                raise _no_worker(address)
    if dead:
        raise WorkerDied(dead)


def _spread(function: Callable[[Item], Result], items: list[Item], jobs: int) -> Pairs[Item, Result, None]:
    """The pairs of `results`, from processes."""
    dead: list[Item] = []
    in_a_row = 0
    while items and in_a_row < HOPELESS:
        suspects, items = yield from _until_a_death(function, items, jobs)
        for item in suspects:
            if in_a_row == HOPELESS:
                dead.append(item)
                continue
            again, _ = yield from _until_a_death(function, [item], 1)
            in_a_row = in_a_row + 1 if again else 0
            dead += again
    if dead:
        raise WorkerDied([*dead, *items])


def _until_a_death(
    function: Callable[[Item], Result], items: list[Item], jobs: int
) -> Pairs[Item, Result, tuple[list[Item], list[Item]]]:
    """Yield pairs until all items are done, or a worker dies. Returns items it may have had, and those not begun."""
    futures: dict[Future[Result], Item] = {}
    with process_pool(jobs) as executor:
        with suppress(BrokenProcessPool):  # a worker may die before all items are handed in
            for item in items:
                futures[executor.submit(function, item)] = item
        for future in _ended(executor, futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield futures[future], future.result()
    # items are handed out in their order, so the first ones without a result were being worked on
    lost = [item for future, item in futures.items() if not future.done() or future.exception() is not None]
    lost += items[len(futures) :]
    return lost[:jobs], lost[jobs:]


def _ended(executor: Executor, futures: Iterable[Future[Result]]) -> Iterator[Future[Result]]:
    """The futures as they end.

    A worker can die at the moment in which an item is handed in. Then the pool of Python 3.11 can forget the item. So
    after `PATIENCE` seconds without a result, the pool is asked whether it has ended. If so, no more are waited for.
    """
    left = {*futures}
    while left:
        done, left = wait(left, PATIENCE, FIRST_COMPLETED)
        yield from done
        if not done and _has_ended(executor):
            yield from wait(left, 0).done
            return


def _has_ended(executor: Executor) -> bool:
    """Whether a pool takes no more work, as one of its workers has died."""
    try:
        executor.submit(int)
    except BrokenProcessPool:
        return True
    return False


# ---- the environment


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore their old values at the end."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
