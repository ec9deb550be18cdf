# SPDX-License-Identifier: Apache-2.0
"""Builds of llama.cpp on quantised files of golden cases: no product of a healthy engine may fail.

    python -m bench.quantised --write FOLDER
    python -m bench.quantised FOLDER --build xllamacpp
    python -m bench.quantised FOLDER --build npm-sse42 --library BUILD/libllama.so --policy llama.cpp-quantised-sse42

The first command needs the packages gguf and xllamacpp. The others run each file once, with all taps, and replace the
rows of their build in the results. A build is a library with the libraries of its backends beside it. One file of a
backend alone, such as `libggml-cpu-sse42.so`, forces that variant.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from refmoe.checkpoints.ggml_quantise import KINDS
from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.profiles.cut_points import PROJECTIONS
from refmoe.profiles.load import policy
from refmoe.suite import Case, read_case
from refmoe.traces.trace import Header, read_trace, write_trace
from refmoe.verifier.findings import FAIL, Report
from refmoe.verifier.verify import verify

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "quantised.json"
CASES = ("production-first", "production-sequences")
"""Cases whose rows are whole blocks of 256, with calls of 1 to 12 tokens."""


def case(name: str) -> Case:
    return read_case(ROOT / "golden" / name)


def write(folder: Path) -> None:
    """A GGUF file of each case in each format and mixture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        for kind in KINDS:
            write_gguf(folder / f"{name}.{kind}.gguf", case(name).config, case(name).checkpoint().parameters, kind)


def measured(path: Path, name: str, report: Report) -> dict[str, Any]:
    """A row of the results."""
    products = [check for check in report.checks if check.step in PROJECTIONS and check.step != "router.logits"]
    return {
        "case": path.name.split(".")[0], "format": path.name.split(".")[1], "policy": name, "verdict": report.verdict,
        "values": sum(check.values for check in products), "outside": sum(check.outside for check in products),
        "failed": sorted({check.step for check in report.checks if check.verdict == FAIL}),
        "worst_error": round(max(check.worst_error for check in products), 4),
        "excess": round(max(check.excess for check in products), 3),
    }  # fmt: skip


def run(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one build."""
    from refmoe.engines.adapters.llama_cpp import Adapter

    settings = {"cache": options.cache, "flash": options.flash, "threads": options.threads, "library": options.library}
    adapter, rows = Adapter(**settings), []
    for path in sorted(folder.glob("*.gguf")):
        runs = case(path.name.split(".")[0]).runs()
        adapter.load(path, "float32")
        name, model = options.policy or adapter.policies["float32"], load_checkpoint(path)
        with tempfile.TemporaryDirectory() as scratch:
            trace = Path(scratch) / "trace.safetensors"
            write_trace(trace, Header(runs, path.name, policy=name), adapter.run(runs, adapter.taps))
            began = time.perf_counter()
            report = verify(read_trace(trace), path.name, model.config, model.parameters, runs, policy(name))
        row = {"build": options.build, **measured(path, name, report)}
        print(json.dumps(row), f"{time.perf_counter() - began:.1f} s", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the files")
    parser.add_argument("--write", action="store_true", help="write the files")
    parser.add_argument("--build", help="the name of the build")
    parser.add_argument("--library", default="xllamacpp", help="its libllama")
    parser.add_argument("--policy", help="none: the policy that the adapter gives")
    parser.add_argument("--cache", default="float16")
    parser.add_argument("--flash", default="on")
    parser.add_argument("--threads", default="1")
    options = parser.parse_args()
    if options.write:
        write(options.folder)
        return
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    rows = [row for row in kept if row["build"] != options.build] + run(options.folder, options)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
