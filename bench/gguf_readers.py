# SPDX-License-Identifier: Apache-2.0
"""Readers of GGUF that share no code with llama.cpp: each weight of each file against the numbers that refmoe reads.

    python -m bench.gguf_readers FOLDER --write
    python -m bench.gguf_readers FOLDER --reader tinygrad
    python -m bench.gguf_readers FOLDER --reader candle

The first command needs the packages gguf and xllamacpp. The others need tinygrad and a C compiler, or candle-nn.
Each replaces the rows of its reader in the results.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.checkpoints.ggml_quantise import KINDS
from refmoe.checkpoints.gguf_file import FILE_TYPES, write_gguf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.names import named_weights
from refmoe.files.sentences import one_line
from refmoe.suite import read_case
from tests.checkpoints.gguf_names import canonical

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "gguf_readers.json"
CASE = "production-head-32"
"""The smallest case whose rows are whole blocks of 256."""
Values = dict[str, NDArray[np.float32]]
"""Every tensor of a file by its name in the file."""


def write(folder: Path) -> None:
    """A GGUF file of the case in each format and mixture."""
    case = read_case(RESULTS.parents[2] / "golden" / CASE)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in (*KINDS, *FILE_TYPES):
        write_gguf(folder / f"{CASE}.{kind}.gguf", case.config, case.checkpoint().parameters, kind)


def by_tinygrad(path: Path) -> Values:
    """All tensors as `gguf_load` of tinygrad gives them on a CPU."""
    os.environ["DEV"] = "CPU"
    _, tensors = import_module("tinygrad.llm.gguf").gguf_load(path)
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def by_candle(path: Path) -> Values:
    """All tensors as `load_gguf` of candle, in Rust, gives them."""
    tensors, _ = import_module("candle.utils").load_gguf(str(path))
    return {
        name: np.asarray(tensor.dequantize().values(), np.float32).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


READERS: dict[str, tuple[str, Callable[[Path], Values]]] = {
    "tinygrad": ("tinygrad", by_tinygrad), "candle": ("candle-nn", by_candle),
}  # fmt: skip
"""Per reader its package, and its function."""


def measured(reader: str, path: Path) -> dict[str, Any]:
    """A row of the results: how many weights have the same bits, or why the reader refuses the file."""
    package, read = READERS[reader]
    row = {
        "reader": f"{package} {version(package)}",
        "case": path.name.split(".")[0],
        "format": path.name.split(".")[1],
    }
    loaded = load_checkpoint(path)
    try:
        found = canonical(read(path), loaded.config)
    except Exception as refused:  # whatever a strange reader raises is its answer
        said = one_line(refused).partition(", backtrace")[0]
        return row | {"values": 0, "equal": 0, "zeros": 0, "refused": said}
    values = equal = zeros = 0
    for name, weight in named_weights(loaded.parameters).items():
        ours, theirs = np.asarray(weight.read(), np.float32), found[name]
        if ours.shape != theirs.shape:
            raise RuntimeError(f"{path}: {name} is {ours.shape}, but {theirs.shape} was expected")
        same = ours.view(np.uint32) == np.ascontiguousarray(theirs, np.float32).view(np.uint32)
        values, equal = values + ours.size, equal + int(same.sum())
        zeros += int((~same & (ours == 0) & (theirs == 0)).sum())
    return row | {"values": values, "equal": equal, "zeros": zeros, "refused": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the files")
    do = parser.add_mutually_exclusive_group(required=True)
    do.add_argument("--write", action="store_true", help="write the files: the case in each format and mixture")
    do.add_argument("--reader", choices=READERS)
    options = parser.parse_args()
    if options.write:
        write(options.folder)
        return
    rows = []
    for path in sorted(options.folder.glob("*.gguf")):
        rows.append(measured(options.reader, path))
        print(json.dumps(rows[-1]), flush=True)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    package = READERS[options.reader][0]
    kept = [row for row in kept if row["reader"].split()[0] != package]
    RESULTS.write_text(json.dumps(kept + rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
