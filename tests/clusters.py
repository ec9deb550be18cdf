# SPDX-License-Identifier: Apache-2.0
"""Dask clusters on this machine, for tests."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

Worker = subprocess.Popen[bytes]


@contextmanager
def cluster(workers: int) -> Iterator[tuple[str, list[Worker]]]:
    """The address of a scheduler, and workers, each in its own process."""
    distributed = pytest.importorskip("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    started = [_start("dask_scheduler", "--host", "127.0.0.1", "--port", port)]
    started += [_start("dask_worker", address, "--nthreads", "1", "--no-nanny") for _ in range(workers)]
    try:
        with distributed.Client(address, timeout="60s") as client:
            if workers:
                client.wait_for_workers(workers, timeout=60)
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


def _start(program: str, *words: str) -> Worker:
    command = [sys.executable, "-m", f"distributed.cli.{program}", *words, "--no-dashboard"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
