# SPDX-License-Identifier: Apache-2.0
"""The CPU runner detects the errors of a device: one small wrong kernel for each kind of bug."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tests.cuda.on_cpu import needs_compiler
from tests.cuda.runner.compile import CHECKED, PLAIN, CompileError
from tests.cuda.runner.module import EVERY_ORDER, Conditions, LaunchError, Module

pytestmark = needs_compiler
PLAINLY = Conditions()

WRONG = r"""
__global__ void past_the_end(const float* x, float* y, int n) { int i = threadIdx.x; if (i <= n) y[i] = x[i]; }
__global__ void before_the_start(float* y) { y[(int)threadIdx.x - 1] = 1.0f; }
// 32 TiB away, where nothing is mapped: nearer could be memory of the test itself
__global__ void far_away(float* y) { y[-(1ll << 43)] = 1.0f; }
__global__ void no_barrier(const int* x, int* y) {
  __shared__ int s[64];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void race_between_warps(int* y) {
  __shared__ int s;
  if (threadIdx.x == 0) s = 1;
  __syncwarp();
  y[threadIdx.x] = s;
}
__global__ void two_barriers(int* y) {
  if (threadIdx.x < 7) { y[threadIdx.x] = 1; __syncthreads(); }
  else { y[threadIdx.x] = 2;
    __syncthreads(); }
}
__global__ void early_exit(int* y, int n) { if ((int)threadIdx.x >= n) return; __syncthreads(); y[threadIdx.x] = 1; }
__global__ void exited_lanes(int* y, int n) {
  if ((int)threadIdx.x < n) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, (int)threadIdx.x, 1);
}
__global__ void not_in_mask(int* y) { y[threadIdx.x] = __shfl_sync(0xfffffffeu, (int)threadIdx.x, 1); }
__global__ void barrier_or_shuffle(int* y) {
  if (threadIdx.x % 32 == 0) __syncthreads();
  else y[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 1);
}
__global__ void unwritten(float* y) {
  __shared__ float s[32];
  if (threadIdx.x != 5) s[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void lane_outside(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}
__global__ void scaled(float* y, float factor) { y[threadIdx.x] *= factor; }
__global__ void divided(int* y, int by) { y[threadIdx.x] = (int)threadIdx.x / by; }
__global__ void deep(float* y, int i) { volatile float big[1 << 16]; big[i] = 1.0f; y[0] = big[i]; }
__global__ void endless(volatile int* y) { while (y[0] == 0) {} }
struct alignas(16) Four { float element[4]; };
__global__ void misaligned(const float* x, float* y) { *(Four*)y = *(const Four*)(x + 1); }
__global__ void past_shared(float* y, int n) {
  __shared__ float s[32];
  for (int i = 0; i <= n; i++) s[i] = 1.0f;
  y[0] = s[0];
}
__global__ void overflowing(const int* x, int* y) { y[0] = x[0] * x[0]; }
"""
RIGHT = r"""
__global__ void lanes(int* up, int* down, int* across, unsigned* even, unsigned* same) {
  const int lane = threadIdx.x;
  up[lane] = __shfl_up_sync(0xffffffffu, lane, 3);
  down[lane] = __shfl_down_sync(0xffffffffu, lane, 3);
  across[lane] = __shfl_xor_sync(0xffffffffu, lane, 5);
  even[lane] = __ballot_sync(0xffffffffu, lane % 2 == 0);
  same[lane] = __match_any_sync(0xffffffffu, lane / 8);
}
__global__ void half_warps(int* y) {
  const int lane = threadIdx.x;
  if (lane >= 16) y[lane] = __shfl_sync(0xffff0000u, __shfl_sync(0xffff0000u, lane, 20), 17);
  else y[lane] = __shfl_sync(0x0000ffffu, lane, 3);
  y[lane] += __shfl_xor_sync(0xffffffffu, lane, 31);
}
__global__ void where_am_i(int* y) {
  const int thread = threadIdx.x + blockDim.x * threadIdx.y, block = blockIdx.x + gridDim.x * blockIdx.y;
  y[block * 6 + thread] = block * 100 + thread;
}
template <typename T> __global__ void reversed(T* y) {
  __shared__ T s[64];
  s[threadIdx.x] = (T)threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
"""


def launch(text: str, name: str, block: int, *arguments: Any, how: Conditions = PLAINLY, flags: Any = PLAIN) -> None:
    expressions = sorted(set(re.findall(r"void (\w+)\(", text)) - {"reversed"})
    expressions += ["reversed<double>", "reversed<int>"] if text is RIGHT else []
    Module(text, expressions, flags).under(how)(name)((1,), (block,), arguments)


def floats(n: int) -> Any:
    return np.ones(n, np.float32)


def ints(n: int) -> Any:
    return np.ones(n, np.int32)


CAUGHT: dict[str, tuple[int, tuple[Any, ...], str]] = {
    "past_the_end": (
        64,
        (floats(60), floats(60), np.int32(60)),
        r"memory fault in block \(0, 0, 0\), thread 60: .* 240 of 240",
    ),
    "before_the_start": (32, (floats(60),), r"wrote outside argument 0"),
    "far_away": (1, (floats(60),), r"memory fault"),
    "two_barriers": (64, (ints(64),), r"line \d+: thread \d+ waits at a barrier, but thread \d+ at that of line \d+"),
    "early_exit": (64, (ints(64), np.int32(50)), r"waits at a barrier, but thread \d+ has exited"),
    "exited_lanes": (64, (ints(64), np.int32(50)), r"waits for lane \d+, which has exited"),
    "not_in_mask": (32, (ints(32),), r"thread 0 is not in the mask of its own collective"),
    "barrier_or_shuffle": (32, (ints(32),), r"waits for lanes that wait elsewhere"),
    "divided": (32, (ints(32), np.int32(0)), r"integer division by zero"),
    "deep": (1, (floats(1), np.int32(3)), r"memory fault"),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_bug_is_an_error(name: str) -> None:
    block, arguments, sentence = CAUGHT[name]
    with pytest.raises(LaunchError, match=sentence):
        launch(WRONG, name, block, *arguments)
    launch(WRONG, "scaled", 32, floats(32), np.float32(2))  # the next launch is not affected


def test_a_write_before_the_start_is_a_fault_on_that_side() -> None:
    with pytest.raises(LaunchError, match="argument 0, byte -4 of 240"):
        launch(WRONG, "before_the_start", 32, floats(60), how=Conditions(guard="start"))


@pytest.mark.parametrize("name", ["no_barrier", "race_between_warps"])
def test_a_race_shows_between_orders(name: str) -> None:
    results = []
    for how in EVERY_ORDER:
        found = np.zeros(64, np.int32)
        arguments = (np.arange(64, dtype=np.int32), found) if name == "no_barrier" else (found,)
        launch(WRONG, name, 64, *arguments, how=how)
        results.append(found.tolist())
    assert any(result != results[0] for result in results)


def test_what_is_undefined_is_poison() -> None:
    y = floats(32)
    launch(WRONG, "unwritten", 32, y)
    assert y[4] == 1
    assert y[5] < -1e8
    launch(WRONG, "lane_outside", 32, y)
    assert np.isnan(y[:16]).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("misaligned", (floats(64), floats(64))),
        ("past_shared", (floats(1), np.int32(32))),
        ("overflowing", (np.full(1, 1 << 16, np.int32), ints(1))),
    ],
)
def test_undefined_behaviour_traps_in_the_checked_build(name: str, arguments: Any) -> None:
    with pytest.raises(LaunchError, match="undefined behaviour"):
        launch(WRONG, name, 1, *arguments, flags=CHECKED)


def test_an_endless_kernel_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cuda.runner.module.SECONDS", 1)
    with pytest.raises(LaunchError, match="does not end"):
        launch(WRONG, "endless", 1, np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((floats(32), 2.0), "argument 1 is f8, but the kernel wants f4"),
        ((floats(32), np.int32(2)), "argument 1 is i4, but the kernel wants f4"),
        ((np.ones(32), np.float32(2)), "argument 0 is array of f8, but the kernel wants array of f4"),
        ((ints(32), np.float32(2)), "argument 0 is array of i4, but the kernel wants array of f4"),
        ((floats(32),), "1 arguments, but the kernel has 2"),
        ((floats(64)[::2], np.float32(2)), "not contiguous"),
    ],
)
def test_a_wrong_argument_is_an_error(arguments: Any, sentence: str) -> None:
    with pytest.raises(LaunchError, match=sentence):
        launch(WRONG, "scaled", 32, *arguments)


def test_text_that_is_not_cpp_is_an_error() -> None:
    with pytest.raises(CompileError, match=r"kernel\.cu:7"):
        Module('#line 7 "kernel.cu"\n__global__ void f() { itn i; }', ["f"])


@pytest.mark.parametrize("how", EVERY_ORDER, ids=lambda how: how.order)
def test_collectives_mean_what_cuda_says(how: Conditions) -> None:
    lane = np.arange(32)
    up, down, across, even, same = (np.zeros(32, kind) for kind in ("i4", "i4", "i4", "u4", "u4"))
    launch(RIGHT, "lanes", 32, up, down, across, even, same, how=how)
    assert up.tolist() == np.where(lane < 3, lane, lane - 3).tolist()
    assert down.tolist() == np.where(lane > 28, lane, lane + 3).tolist()
    assert across.tolist() == (lane ^ 5).tolist()
    assert set(even.tolist()) == {0x55555555}
    assert same.tolist() == [0xFF << 8 * (i // 8) for i in range(32)]
    y = np.zeros(32, np.int32)
    launch(RIGHT, "half_warps", 32, y, how=how)
    assert y.tolist() == [(20 if i >= 16 else 3) + (i ^ 31) for i in range(32)]


def test_indices_and_shared_memory_of_templates() -> None:
    y = np.zeros(6 * 6, np.int32)
    Module(RIGHT, ["where_am_i"]).under(Conditions("random"))("where_am_i")((3, 2), (2, 3), (y,))
    assert y.tolist() == [100 * block + thread for block in range(6) for thread in range(6)]
    for dtype, name in ((np.float64, "double"), (np.int32, "int")):
        z = np.zeros(64, dtype)
        launch(RIGHT, f"reversed<{name}>", 64, z)
        assert z.tolist() == list(range(63, -1, -1))
