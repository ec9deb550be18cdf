# SPDX-License-Identifier: Apache-2.0
"""Experts spread over processes and over a Dask cluster give the same bytes, even if a worker dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from refmoe.checkpoints.write import write_checkpoint
from refmoe.errors import InputError
from refmoe.jobs import job as scale
from refmoe.jobs.source import Folder, Formula
from refmoe.parallel import open_executor
from refmoe.spec.config import Config
from refmoe.traces.script import plan
from refmoe.traces.trace import Header, Recorder
from tests.clusters import cluster

CONFIG = Config(
    dim=256, layers=4, heads=4, kv_heads=2, head_dim=64, hidden_dim=1024, vocab=64, experts=8, experts_per_token=2
)


def job(source: Any, arithmetic: str = "exact", executor: str | None = None) -> scale.Job:
    runs = plan([("prefill", 0, (1, 2, 3, 4, 5, 6)), ("decode", 0, (7,))], CONFIG.vocab)
    return scale.Job(source, Header(runs), arithmetic, range(CONFIG.layers), executor=executor)


def values(parts: Any) -> dict[str, bytes]:
    return {key: tensor.map().tobytes() for key, tensor in parts.tensors().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, CONFIG, Formula(CONFIG, 3).load().parameters)
    return path


@pytest.mark.parametrize("arithmetic", ["exact", "float64"])
def test_processes_compute_the_same_bytes(tmp_path: Path, folder: Path, arithmetic: str) -> None:
    """Exact bytes never depend on the executor. Native bytes do not here, as the blocks are equal."""
    alone = values(scale.compute(job(Folder(folder), arithmetic), tmp_path / "alone", Recorder()))
    spread = values(scale.compute(job(Folder(folder), arithmetic, "processes:2"), tmp_path / "spread", Recorder()))
    assert spread.keys() == alone.keys()
    if arithmetic == "exact":
        assert spread == alone
        formula = values(scale.compute(job(Formula(CONFIG, 3), executor="processes:1"), tmp_path / "f", Recorder()))
        assert formula == alone


def test_what_a_worker_cannot_read_is_told_by_the_worker(tmp_path: Path, folder: Path) -> None:
    """A file vanishes after the run began: the worker's error reaches the command as one sentence."""
    write_checkpoint(tmp_path / "ck", CONFIG, Formula(CONFIG, 3).load().parameters)
    work = job(Folder(tmp_path / "ck"), "exact", "processes:1")

    def vanish() -> None:
        (tmp_path / "ck" / "model.safetensors").rename(tmp_path / "away")

    class After(Recorder):
        def __call__(self, name: str, x: Any) -> None:
            if name == "layers.1.router.weights":
                vanish() if (tmp_path / "ck" / "model.safetensors").exists() else None
            super().__call__(name, x)

    with pytest.raises(InputError, match=r"model\.safetensors: tensor '.*' can no longer be read: .*No such file"):
        scale.compute(work, tmp_path / "parts", After())
    (tmp_path / "away").rename(tmp_path / "ck" / "model.safetensors")
    assert scale.Parts(tmp_path / "parts", work.identity(), work.part_names()).finished == 2
    expected = values(scale.compute(job(Folder(folder)), tmp_path / "alone", Recorder()))
    assert values(scale.compute(work, tmp_path / "parts", Recorder())) == expected


def test_a_process_that_dies_is_one_sentence_and_loses_nothing(tmp_path: Path, folder: Path) -> None:
    """The only worker is killed. The same command, started again, goes on."""
    work, killed = job(Folder(folder), "exact", "processes:1"), []

    class Killer(Recorder):
        def __call__(self, name: str, x: Any) -> None:
            if name == "layers.2.router.weights" and not killed:
                import multiprocessing

                killed.append([os.kill(child.pid or 0, signal.SIGKILL) for child in multiprocessing.active_children()])
            super().__call__(name, x)

    with pytest.raises(InputError, match=r"a worker process died .* start the same command again"):
        scale.compute(work, tmp_path / "parts", Killer())
    assert scale.Parts(tmp_path / "parts", work.identity(), work.part_names()).finished == 3
    expected = values(scale.compute(job(Folder(folder)), tmp_path / "alone", Recorder()))
    assert values(scale.compute(work, tmp_path / "parts", Recorder())) == expected


def test_a_dask_cluster_of_which_one_worker_is_killed(tmp_path: Path, folder: Path) -> None:
    """Of two workers one dies; the other computes its tasks."""
    expected = values(scale.compute(job(Folder(folder)), tmp_path / "alone", Recorder()))
    with cluster(2) as (address, workers):
        killed: list[int] = []

        class Killer(Recorder):
            def __call__(self, name: str, x: Any) -> None:
                if name == "layers.1.router.weights" and not killed:
                    killed.append(workers[0].pid)
                    # the kill falls into the tasks that are submitted next
                    threading.Timer(0.05, workers[0].kill).start()
                super().__call__(name, x)

        found = values(scale.compute(job(Folder(folder), "exact", f"dask:{address}"), tmp_path / "p", Killer()))
        assert killed
        assert workers[0].wait(10) != 0
        assert workers[1].poll() is None
    assert found == expected


def test_no_scheduler_is_one_sentence() -> None:
    pytest.importorskip("distributed")
    began = time.monotonic()
    with pytest.raises(InputError, match="no scheduler answers there"), open_executor("dask:tcp://127.0.0.1:9"):
        raise AssertionError
    assert time.monotonic() - began < 60


def test_without_dask_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'refmoe\[cluster\]'"), open_executor("dask:tcp://x:1"):
        raise AssertionError
