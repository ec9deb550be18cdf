# SPDX-License-Identifier: Apache-2.0
"""Pieces in parallel lanes: each piece runs once, errors are raised, and the BLAS gets its threads back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from refmoe.arithmetic.native.lanes import Lanes, lanes
from refmoe.arithmetic.native.ops import SIDE_BY_SIDE, NativeOps
from refmoe.checkpoints.weight import Weight


def blas_threads() -> list[int]:
    """The numbers of threads of NumPy's BLAS, without oneMKL, which another test may have loaded."""
    libraries = ThreadpoolController().select(user_api="blas").info()
    return [library["num_threads"] for library in libraries if library["internal_api"] != "mkl"]


@pytest.fixture
def two() -> Any:
    """Two lanes, whatever the machine has."""
    made = Lanes()
    made.count = 2
    return made


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_each_piece_is_run_once(two: Lanes, count: int) -> None:
    done: list[int] = []
    two.run([partial(done.append, i) for i in range(count)])
    assert sorted(done) == [*range(count)]
    assert two.busy == 1


def test_pieces_run_at_the_same_time_each_with_a_blas_of_one_thread(two: Lanes) -> None:
    before, both, seen = blas_threads(), Barrier(2, timeout=60), []

    def piece() -> None:
        both.wait()  # returns only if the other one runs too
        seen.append((two.busy, set(blas_threads())))

    two.run([piece, piece])
    assert seen == [(2, {1})] * 2
    assert blas_threads() == before


def test_a_single_piece_has_a_blas_of_one_thread(two: Lanes) -> None:
    seen: list[int] = []
    two.run([lambda: seen.extend(blas_threads())])
    assert set(seen) == {1}


def test_pieces_of_a_piece_run_in_its_lane(two: Lanes) -> None:
    done: list[int] = []

    def piece(i: int) -> None:
        two.run([partial(done.append, 10 * i + j) for j in range(3)])

    two.run([partial(piece, i) for i in range(4)])
    assert sorted(done) == sorted(10 * i + j for i in range(4) for j in range(3))


@pytest.mark.parametrize("at", [0, 1, 7])
def test_what_a_piece_raises_is_raised(two: Lanes, at: int) -> None:
    before = blas_threads()

    def piece(i: int) -> None:
        if i == at:
            raise MemoryError(f"piece {i}")

    pieces: list[Callable[[], None]] = [partial(piece, i) for i in range(8)]
    with pytest.raises(MemoryError, match=f"piece {at}"):
        two.run(pieces)
    assert (two.busy, blas_threads()) == (1, before)


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_a_product_in_lanes_is_the_product(two: Lanes, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Products of integers are exact, whichever lane computes which rows of the weight."""
    monkeypatch.setattr("refmoe.arithmetic.native.ops.lanes", lambda: two)
    monkeypatch.setattr("refmoe.arithmetic.native.ops.ALONE", 0)
    rng = np.random.default_rng(rows)
    x = rng.integers(-9, 10, (SIDE_BY_SIDE, 7)).astype(np.float32)
    matrix = rng.integers(-9, 10, (rows, 7)).astype(np.float32)
    weight = Weight(name="w", shape=matrix.shape, dtype=matrix.dtype, source=lambda: matrix, origin="w")
    found = NativeOps(np.float32).linear(x, weight)
    np.testing.assert_array_equal(found, x.astype(int) @ matrix.astype(int).T)


def test_a_streamed_weight_is_multiplied_by_all_threads(two: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight comes block by block and is not divided among lanes, each of which has a BLAS of one thread."""
    monkeypatch.setattr("refmoe.arithmetic.native.ops.lanes", lambda: two)
    monkeypatch.setattr(two, "run", lambda pieces: pytest.fail("in lanes"))
    x, matrix = np.ones((SIDE_BY_SIDE, 7), np.float32), np.arange(35, dtype=np.float32).reshape(5, 7)
    weight = Weight(name="w", shape=matrix.shape, dtype=matrix.dtype, source=lambda: matrix, origin="w")
    np.testing.assert_array_equal(NativeOps(np.float32, upcast_bytes=100).linear(x, weight), x @ matrix.T)


def test_there_are_as_many_as_the_blas_has_threads() -> None:
    assert lanes().count == max(blas_threads())
    code = "from refmoe.arithmetic.native.lanes import lanes; print(lanes().count)"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_makes_its_own() -> None:
    """A forked process inherits no threads, so pieces given to its parent's lanes would wait for ever."""
    code = """if True:
        import os, signal
        from refmoe.arithmetic.native import lanes as here
        made = here.lanes()
        made.count = 2
        made.run([lambda: None] * 4)
        child = os.fork()
        if not child:
            signal.alarm(30)
            again = here.lanes()
            again.count = 2
            done = []
            again.run([lambda i=i: done.append(i) for i in range(4)])
            os._exit(0 if again is not made and sorted(done) == [0, 1, 2, 3] else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0"
