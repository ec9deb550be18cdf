# SPDX-License-Identifier: Apache-2.0
"""Harnesses to begin with: they run unchanged, obey the protocol, and show how a tap is written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.process import Process
from refmoe.engines.scaffold import SCAFFOLDS, write_scaffold
from tests.command_line import Refmoe
from tests.engines.running import LIMIT, case_named
from tests.engines.test_protocol import valid

COMPILER = shutil.which("cc")


def built(language: str, path: Path) -> list[str]:
    """The command of a scaffold that has been written."""
    if language == "python":
        return [sys.executable, str(path)]
    if COMPILER is None:
        pytest.skip("there is no C compiler, cc")
    subprocess.run(compile_line(path), cwd=path.parent, shell=True, check=True)
    return [str(path.with_suffix(""))]


def compile_line(path: Path) -> str:
    """The compiler line in the harness's own first comment."""
    (line,) = re.findall(r"^ +(cc .*) && refmoe conform -- ./harness ", path.read_text(), re.MULTILINE)
    return str(line)


@pytest.fixture(params=SCAFFOLDS)
def command(request: pytest.FixtureRequest, refmoe: Refmoe, tmp_path: Path) -> list[str]:
    path = tmp_path / SCAFFOLDS[request.param]
    status, out, _ = refmoe("conform", "--scaffold", request.param, path)
    assert status == 0
    assert "refmoe conform -- " in out
    return built(request.param, path)


def test_it_runs_as_it_is_and_skips_every_case(command: list[str], refmoe: Refmoe) -> None:
    golden = Path(__file__).parents[2] / "golden"
    status, out, err = refmoe("conform", "--golden", golden, "--case", "one-pair", "--case", "top-1", "--", *command)
    assert status == 3, err
    assert "skipped: not written yet: one-pair" in out
    assert "skipped: needs decode" in out
    assert "2 outcomes: 2 skipped" in out
    assert "note" not in out, "it stops when it is told to"


def test_its_example_is_the_embedding(command: list[str], tmp_path: Path) -> None:
    """A conversation by hand, with paths that JSON escapes, and invalid requests in between."""
    case, checkpoint, out = case_named("top-1"), tmp_path / 'mödel "x"', tmp_path / "öut.safetensors"
    parameters = case.checkpoint().parameters
    write_checkpoint(checkpoint, case.config, parameters, "bfloat16")
    process = Process(command)
    assert valid(process.ask({"command": "start", "protocol": "1"}, LIMIT), "description")
    assert valid(
        process.ask({"command": "dance", "x": [1, -2.5e3, None, True, {"y": "\u20ac\U0001f600"}]}, LIMIT), "error"
    )
    run = {"run": "prefill", "op": "prefill", "sequence": 0, "tokens": [3, 0, 52], "positions": [0, 1, 2], "past": 0}
    runs = {"command": "run", "runs": [run, {**run, "run": "again"}], "taps": ["embedding", "logits"], "out": str(out)}
    assert valid(process.ask(runs, LIMIT), "error"), "nothing is loaded"
    missing = process.ask({"command": "load", "checkpoint": "/no/such", "dtype": "float32"}, LIMIT)
    assert valid(missing, "error")
    assert process.ask({"command": "load", "checkpoint": str(checkpoint), "dtype": "float32"}, LIMIT) == {"ok": True}
    assert valid(process.ask({**runs, "taps": ["logits"]}, LIMIT), "skipped")
    few = list(load_file(out))
    answer = process.ask(runs, LIMIT)
    assert valid(answer, "skipped")
    assert answer["skipped"] == "not written yet"
    assert process.stop() is None
    arrays = load_file(out)
    assert sorted(arrays) == ["again/embedding", "prefill/embedding"]
    assert few == [], "no tap but those asked for"
    table = np.asarray(parameters.embedding.read(), np.float32)
    assert arrays["prefill/embedding"].dtype == np.float32
    assert np.array_equal(arrays["prefill/embedding"], table[[3, 0, 52]])


def test_nothing_is_written_over(refmoe: Refmoe, tmp_path: Path) -> None:
    path = tmp_path / "harness.c"
    path.write_text("mine")
    status, _, err = refmoe("conform", "--scaffold", "c", path)
    assert status == 2
    assert "is there already" in err
    assert path.read_text() == "mine"


def test_the_line_by_which_it_is_compiled_is_the_same_everywhere(refmoe: Refmoe, tmp_path: Path) -> None:
    """It shows every warning, and links libm, which an engine in C needs."""
    path = tmp_path / "harness.c"
    _, out, _ = refmoe("conform", "--scaffold", "c", path)
    line = compile_line(path)
    assert line == "cc -std=c11 -Wall -Wextra -Werror -O2 -o harness harness.c -lm"
    assert f"    {line.replace('harness', str(tmp_path / 'harness'))} && refmoe conform -- " in out


def test_the_part_that_both_c_programs_share_is_the_same() -> None:
    """A fix in one of them would otherwise miss the other."""
    root = Path(__file__).parents[2]
    parts = []
    for name in ("refmoe/engines/scaffold/harness.c", "examples/mixtral.c"):
        lines = (root / name).read_bytes().splitlines(keepends=True)
        (start,) = [i for i, line in enumerate(lines) if line.startswith(b"/* ==== shared part: ")]
        (end,) = [i for i, line in enumerate(lines) if line == b"/* ==== end of the shared part */\n"]
        parts.append(lines[start:end])
    assert parts[0] == parts[1]
    assert len(parts[0]) > 100


DRIVER = """
#define main harness_main
#include "harness.c"
#undef main

int main(int count, char **words) { /* a folder, and names: of each the shape and the values */
    for (int i = 2; i < count; i++) {
        Tensor tensor;
        if (!read_tensor(words[1], words[i], &tensor)) { puts("none"); continue; }
        for (size_t k = 0; k < tensor.rank; k++) printf("%zu ", tensor.shape[k]);
        fputs("|", stdout);
        for (size_t k = 0; k < elements(&tensor); k++) printf(" %.9g", (double)tensor.values[k]);
        puts("");
        free(tensor.values);
    }
    return (void)harness_main, 0;
}
"""
NUMBERS = [0.0, -0.0, 1.0, -2.5, 1.5e-7, -(2.0**-24), 6.1e-5, 65504.0, np.inf, -np.inf, np.nan, 3.14159]


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler, cc")
def test_the_c_harness_reads_tensors_of_any_rank_and_dtype(tmp_path: Path) -> None:
    write_scaffold("c", tmp_path / "harness.c")
    (tmp_path / "driver.c").write_text(DRIVER)
    line = compile_line(tmp_path / "harness.c").replace("-o harness harness.c", "-o driver driver.c")
    subprocess.run(line, cwd=tmp_path, shell=True, check=True)
    shapes = [(), (12,), (3, 4), (2, 3, 2), (2, 1, 3, 2), (1, 2, 1, 3, 2), (0, 5)]
    with np.errstate(over="ignore"):
        arrays = {
            f"{shape} {dtype}": np.ones((), dtype) if shape == () else np.resize(np.array(NUMBERS), shape).astype(dtype)
            for shape in shapes
            for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16)
        }
    odd = {"integers": np.arange(3), "nine": np.ones((1,) * 9, np.float32)}
    save_file(arrays | odd, tmp_path / "model.safetensors")
    words = [str(tmp_path / "driver"), str(tmp_path), *arrays, *odd, "missing"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[-3:] == ["none"] * 3
    for (name, array), text in zip(arrays.items(), said[:-3], strict=True):
        shape, _, values = text.partition("|")
        assert tuple(map(int, shape.split())) == array.shape, name
        found = np.array([float(value) for value in values.split()], np.float32)
        assert np.array_equal(found, array.reshape(-1).astype(np.float32), equal_nan=True), name
