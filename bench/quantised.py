# SPDX-License-Identifier: Apache-2.0
"""Engines on quantised files of golden cases: no product of a healthy engine may fail, nor what its cache gives.

    python -m bench.quantised --write FOLDER
    python -m bench.quantised FOLDER --build xllamacpp
    python -m bench.quantised FOLDER --build npm-sse42 --option library=BUILD/libllama.so \\
        --policy llama.cpp-quantised-sse42
    python -m bench.quantised FOLDER --build "xllamacpp, cache q8_0" --formats F32,Q8_0 \\
        --option cache=q8_0 --other llama.cpp-quantised
    python -m bench.quantised FOLDER --build ik_llama --engine bench/ik_llama.py --case production-head-32 \\
        --other llama.cpp-quantised
    python -m bench.quantised FOLDER --engine vllm --build "vLLM, cache fp8_e4m3" --dtype bfloat16 \\
        --formats int8-channel:attention --option cache=fp8_e4m3 --other vllm-cpu-bfloat16

The first command needs the packages gguf and xllamacpp. `--formats` names some formats, for it too. The others run
each file once, with all taps, and replace the rows of their build in the results. A build of llama.cpp is a library
with the libraries of its backends beside it. One file of a backend alone, such as `libggml-cpu-sse42.so`, forces that
variant. The same trace is judged by the policy `--other` too, by which the engine does not compute.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refmoe.checkpoints.ggml_quantise import KINDS
from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.quantise import NAMES, write_quantised
from refmoe.engines.adapter import Arrays, Skipped, adapter_class
from refmoe.engines.options import options_of
from refmoe.errors import InputError
from refmoe.files.sentences import one_line
from refmoe.profiles.cut_points import PROJECTIONS
from refmoe.profiles.load import policy
from refmoe.suite import Case, read_case
from refmoe.traces.trace import Header, Run, read_trace, write_trace
from refmoe.verifier.findings import FAIL, Report
from refmoe.verifier.verify import verify

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "quantised.json"
CASES = ("production-first", "production-sequences")
"""Cases whose rows are whole blocks of 256, with calls of 1 to 12 tokens. `--case` names others."""
FIRST = {"llama_cpp": {"cache": "float16", "flash": "on"}}
"""Options of an adapter, for the defaults of its engine."""


def case(name: str) -> Case:
    return read_case(ROOT / "golden" / name)


def write(folder: Path, cases: Sequence[str], formats: str | None, dtype: str) -> None:
    """A GGUF file and a folder of safetensors of each case in each format and mixture.

    formats: some, with commas; None: all   dtype: of what a folder leaves unquantised
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [*KINDS, "F32", *NAMES] if formats is None else formats.split(",")
    for name in cases:
        model = (case(name).config, case(name).checkpoint().parameters)
        for kind in wanted:
            if kind in NAMES:
                write_quantised(folder / f"{name}.{kind}", *model, kind, dtype)
            else:
                write_gguf(folder / f"{name}.{kind}.gguf", *model, "float32" if kind == "F32" else kind)


def files(folder: Path, engine: str, formats: str | None, cases: Sequence[str]) -> list[Path]:
    """The files that an engine reads.   formats: some, with commas; None: all but float32"""
    wanted = [*KINDS, *NAMES] if formats is None else formats.split(",")
    end = ".gguf" if "llama" in engine else ""
    return [path for name in cases for kind in wanted if (path := folder / f"{name}.{kind}{end}").exists()]


def measured(path: Path, name: str, report: Report) -> dict[str, Any]:
    """A row of the results."""
    products = [check for check in report.checks if check.step in PROJECTIONS and check.step != "router.logits"]
    contexts = [check for check in report.checks if check.step == "attention.context"]
    return {
        "case": path.name.split(".")[0], "format": path.name.split(".")[1], "policy": name, "verdict": report.verdict,
        "values": sum(check.values for check in products), "outside": sum(check.outside for check in products),
        "failed": sorted({check.step for check in report.checks if check.verdict == FAIL}),
        "worst_error": round(max(check.worst_error for check in products), 4),
        "excess": round(max(check.excess for check in products), 3),
        "contexts": sum(check.values for check in contexts),
        "contexts_outside": sum(check.outside for check in contexts),
    }  # fmt: skip


def runs_of(engine: str, adapter: Any, path: Path) -> tuple[tuple[Run, ...], Arrays]:
    """What an engine makes of a case: its runs, and their taps.

    A request of vLLM is a prefill and then decodes. Of each sequence it makes the runs up to the first other one.
    """
    runs = case(path.name.split(".")[0]).runs()
    if engine == "vllm":
        requests: dict[int, list[Run]] = {}
        over = set()
        for run in runs:
            request = requests.setdefault(run.sequence, [])
            follows = run.past == sum(len(before.tokens) for before in request) == run.positions[0]
            if not follows or (request and len(run.tokens) > 1):
                over.add(run.sequence)
            if run.sequence not in over:
                request.append(run)
        runs = tuple(run for run in runs if run in requests[run.sequence])
    return runs, adapter.run(runs, adapter.taps)


def run(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one build."""
    settings = {**FIRST.get(options.engine, {}), **options_of(options.option)}
    adapter, rows = adapter_class(options.engine)(**settings), []
    for path in files(folder, options.engine, options.formats, options.case or CASES):
        try:
            adapter.load(path, options.dtype)
        except (InputError, Skipped, NotImplementedError) as refused:
            print(f"{path}: not run: {one_line(refused)}", flush=True)
            continue
        runs, arrays = runs_of(options.engine, adapter, path)
        name, model = options.policy or adapter.policies.get(options.dtype, options.dtype), load_checkpoint(path)

        def judged(name: str, trace: Any = (path, runs, arrays, model)) -> dict[str, Any]:
            path, runs, arrays, model = trace
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "trace.safetensors"
                write_trace(file, Header(runs, path.name, policy=name), arrays)
                report = verify(read_trace(file), path.name, model.config, model.parameters, runs, policy(name))
            return measured(path, name, report)

        row = {"build": options.build, "engine": options.engine, "dtype": options.dtype, **judged(name)}
        if options.other is not None:
            kept = ("policy", "verdict", "outside", "contexts_outside")
            row["other"] = {key: value for key, value in judged(options.other).items() if key in kept}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the files")
    parser.add_argument("--write", action="store_true", help="write the files")
    parser.add_argument("--build", help="the name of the build")
    parser.add_argument("--engine", default="llama_cpp", help="the adapter")
    parser.add_argument("--dtype", default="float32", help="of the engine, and of what is not quantised in a folder")
    parser.add_argument("--case", action="append", default=[], help="a golden case; none: two of the production family")
    parser.add_argument("--formats", help="formats of files, with commas; none: all")
    parser.add_argument("--option", action="append", default=[], help="of the adapter, KEY=VALUE")
    parser.add_argument("--policy", help="none: the policy that the adapter gives")
    parser.add_argument("--other", help="a policy by which the engine does not compute")
    options = parser.parse_args()
    if options.write:
        write(options.folder, options.case or CASES, options.formats, options.dtype)
        return
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    rows = [row for row in kept if row["build"] != options.build] + run(options.folder, options)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
