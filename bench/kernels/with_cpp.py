# SPDX-License-Identifier: Apache-2.0
"""RMS norm in C++, compiled by the system's compiler and called through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MISTAKES = ("", "tail", "eps outside", "half sum")
SOURCE = """
#include <cmath>
extern "C" void rms_norm(const float* x, const float* gain, float* y, long rows, long size, float eps, int mistake) {
  for (long r = 0; r < rows; ++r, x += size, y += size) {
    float lanes[8] = {0};
    long end = mistake == 1 ? size / 8 * 8 : size;             // 1: the last size % 8 elements do not count
    for (long i = 0; i < end; ++i) lanes[i % 8] += x[i] * x[i];
    float sum = 0;
    for (float lane : lanes) sum += lane;
    if (mistake == 3) { _Float16 h = 0; for (long i = 0; i < size; ++i) h += (_Float16)(x[i] * x[i]); sum = h; }
    float mean = sum / size;
    float scale = mistake == 2 ? 1 / (std::sqrt(mean) + eps) : 1 / std::sqrt(mean + eps);
    for (long i = 0; i < size; ++i) y[i] = x[i] * scale * gain[i];
  }
}
"""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernel."""
    folder = Path(tempfile.mkdtemp(prefix="refmoe-kernel-"))
    source, binary = folder / "norm.cpp", folder / "norm.so"
    source.write_text(SOURCE)
    subprocess.run(["c++", "-O2", "-shared", "-fPIC", "-o", str(binary), str(source)], check=True)
    loaded = ctypes.CDLL(str(binary))
    for path in (source, folder / "norm.so"):
        path.unlink()
    folder.rmdir()
    return loaded


def rms_norm(x: Any, gain: Any, eps: float, mistake: str = "") -> Any:
    """x: float32 [T, D]   gain: float32 [D]   returns: [T, D]"""
    found = np.empty_like(x)
    pointers = [ctypes.c_void_p(each.ctypes.data) for each in (x, gain, found)]
    sizes = [ctypes.c_long(each) for each in x.shape]
    library().rms_norm(*pointers, *sizes, ctypes.c_float(eps), MISTAKES.index(mistake))
    return found
