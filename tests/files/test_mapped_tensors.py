# SPDX-License-Identifier: Apache-2.0
"""Tensors mapped from a file: how many can be held, and what a changed file does to them."""

import os
from pathlib import Path

import numpy as np
import pytest

from refmoe.files.safetensors_file import SMALL, open_safetensors, write_tensors

FEW = 200
LENGTH = SMALL // 4 + 1
"""Elements of float32, so that a tensor is mapped rather than read."""


def written(path: Path, first: int) -> None:
    """A file of `FEW` tensors, each of its own number."""
    arrays = {f"t{n}": np.full(LENGTH, first + n, np.float32) for n in range(FEW)}
    write_tensors(path, {name: (lambda x=x: x) for name, x in arrays.items()}, {})


def descriptors() -> int:
    """The number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the descriptors of a process are counted in /proc")
def test_a_held_tensor_costs_no_descriptor_of_its_own(tmp_path: Path) -> None:
    written(tmp_path / "x.safetensors", 0)
    tensors, _ = open_safetensors(tmp_path / "x.safetensors")
    before = descriptors()
    held = [tensors[f"t{n}"].get() for n in range(FEW)]
    assert descriptors() - before <= 1
    assert [int(x[-1]) for x in held] == [*range(FEW)]
    assert not any(x.flags.writeable for x in held)
    del held
    assert descriptors() == before


def test_a_file_in_the_place_of_another_is_mapped_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written(path, 0)
    old = open_safetensors(path)[0]["t7"].get()
    written(tmp_path / "y", 1000)
    (tmp_path / "y").replace(path)
    new = open_safetensors(path)[0]["t7"].get()
    assert (old[0], new[0]) == (7, 1007)
