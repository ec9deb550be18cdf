# SPDX-License-Identifier: Apache-2.0
"""The cost of verification: `refmoe verify` of a whole trace against one exact run of its calls, timed in turns.

A trace holds every tap, in the dtype that it declares. Both sides prepare the weights anew, as the commands do.

    python bench/verify_cost.py
    python bench/verify_cost.py --repeats 9 --json bench/results/verify_cost.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.profiles.load import policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import read_case
from refmoe.traces.script import Call, execute, plan
from refmoe.traces.trace import Header, Recorder, Run, Trace, read_trace, write_trace
from refmoe.verifier.findings import CONFORMANT
from refmoe.verifier.verify import verify

ROOT = Path(__file__).parent.parent
MIDDLE = Config(
    dim=512, layers=4, heads=8, kv_heads=2, head_dim=64, hidden_dim=1792, vocab=4096, experts=8, experts_per_token=2
)


def subjects() -> Iterator[tuple[str, Config, Callable[[], Parameters], tuple[Run, ...]]]:
    """The models to verify: name, configuration, parameters, calls."""
    for name in ("walking-skeleton", "mini-8x7b", "token-sweep"):
        case = read_case(ROOT / "golden" / name)
        yield f"golden case {name}", case.config, lambda case=case: case.checkpoint().parameters, case.runs()
    tokens = np.random.default_rng(1).integers(0, MIDDLE.vocab, 64).tolist()
    runs = plan([Call("prefill", 0, tokens)], MIDDLE.vocab)
    middle = "dim 512, 4 layers, hidden 1792, prefill of 64"
    yield middle, MIDDLE, lambda: synthetic_checkpoint(MIDDLE, 1).parameters, runs


def ideal_trace(path: Path, config: Config, parameters: Parameters, runs: tuple[Run, ...], name: str) -> Trace:
    """The trace of an engine that follows the policy exactly."""
    recorder = Recorder()
    execute(PolicyOps(policy(name), recorder), Model(config, parameters, CUT_STEPS), runs, recorder)
    write_trace(path, Header(runs, None, None, name), recorder.arrays)
    return read_trace(path)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for what, config, load, runs in subjects():

            def exact(config: Config = config, load: Any = load, runs: Any = runs) -> None:
                recorder = Recorder()
                execute(ExactOps(recorder), Model(config, load()), runs, recorder)

            for name in ("float32", "bfloat16", "float16", "float64"):
                trace = ideal_trace(Path(folder) / "trace.safetensors", config, load(), runs, name)

                def judge(trace: Trace = trace, config: Config = config, load: Any = load, runs: Any = runs) -> None:
                    report = verify(trace, "bench", config, load(), runs, policy(trace.header.policy))
                    assert report.verdict == CONFORMANT, report.headline

                exact(), judge()
                pairs = [(seconds(judge), seconds(exact)) for _ in range(options.repeats)]
                row = {
                    "what": what, "policy": name, "ratio": statistics.median(a / b for a, b in pairs),
                    "verify_ms": 1e3 * statistics.median(a for a, _ in pairs),
                    "exact_ms": 1e3 * statistics.median(b for _, b in pairs),
                }  # fmt: skip
                results.append(row)
                print(
                    f"{what:48} {name:9} {row['ratio']:5.2f} x  ({row['verify_ms']:.0f} ms / {row['exact_ms']:.0f} ms)",
                    flush=True,
                )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
