# SPDX-License-Identifier: Apache-2.0
"""Speed against other engines on the CPU: float32, with equal weights, tokens and numbers of threads.

The weights are numbers of bfloat16. refmoe stores them in bfloat16, as published checkpoints do, or in float32
(`--stored`). The other engines store them in float32.

Prefill is one call that returns the logits of all tokens. Decode reads one token at a time after it. Each engine is a
process of its own, its weights loaded and converted before any clock starts. Each round times all engines one after
another, with the median of several prefills and decode steps. A ratio is the median over rounds of the ratio in a
round, so that a change of the machine's speed affects both sides. An engine whose logits differ from refmoe's stops the
run, so that no engine is fast by computing less. The middle model's engines stay in memory and take turns. Those of the
full-size layer, 5.8 GB each, are started anew every round.

With one thread the clock counts the CPU time of the engine's process, which allows a comparison on a busy machine. With
more threads, waiting for an interrupted thread counts too, so the machine should be idle.

    python -m bench.peers --llama-python /path/to/venv/bin/python --json bench/results/peers.json
    python -m bench.peers --only middle --stored float32
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.spec.config import PRESETS, Config

ROOT = Path(__file__).parent.parent
MIDDLE = Config(
    dim=512, layers=4, heads=8, kv_heads=2, head_dim=64, hidden_dim=1792, vocab=4096, experts=8, experts_per_token=2
)
LAYER = replace(PRESETS["mixtral-8x7b"], layers=1, vocab=4096)
MODELS = {"middle": MIDDLE, "8x7B layer": LAYER}
OURS = ("refmoe numpy", "refmoe mkl")
"""refmoe with NumPy's own BLAS, and with oneMKL (extra `mkl`)."""
PEERS = ("transformers eager", "transformers grouped_mm", "llama.cpp")
TIMED = {name: f"{name} timed" for name in OURS}
"""Both again with a clock around every matrix product, for the share of time in products."""
GOALS = {"prefill": 1.2, "decode": 1.0}
AGREEMENT = 1e-3
"""The largest allowed difference of a logit from refmoe's, relative to the largest logit.

It is hundreds of times the error of float32, and far below the effect of a skipped expert or layer.
"""

Call = Any
Rounds = dict[str, dict[str, list[float]]]
"""By phase and engine, the seconds of each round: of the whole prefill, or of one decoded token."""


# ---- measuring


@contextmanager
def started(name: str, task: dict[str, Any], python: str) -> Iterator[Call]:
    """Start an engine's process. Yields a function from an action and its arguments to the answer."""
    threads = str(task["threads"])
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    command = [python, "-m", "bench.peer_worker", name, json.dumps(task)]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | limits, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def call(*action: str) -> dict[str, Any]:
            if action:
                print(json.dumps(action), file=asked, flush=True)
            line = answers.readline()
            if not line:
                raise RuntimeError(f"{name} ended without an answer; what it says is on standard error")
            found: dict[str, Any] = json.loads(line)
            return found

        call()
        try:
            yield call
        finally:
            asked.close()


def time_round(call: Call, repeats: int) -> dict[str, Any]:
    """By phase, seconds and seconds in matrix products: medians of `repeats` prefills, and of all steps after them."""
    prefills = [call("prefill") for _ in range(repeats)]
    steps = call("decode")
    return {
        "prefill": {key: statistics.median(one[key] for one in prefills) for key in ("seconds", "matmul")},
        "decode": {key: statistics.median(steps[key]) for key in ("seconds", "matmul")},
    }


def measure(config: Config, options: argparse.Namespace, folder: Path, together: bool) -> dict[str, Any]:
    """Measure all engines on one model. together: all are in memory at once, else one after another in each round."""
    tokens = np.random.default_rng(1).integers(0, config.vocab, options.prefill + options.decode).tolist()
    task = {"config": asdict(config), "threads": options.threads, "tokens": tokens, "prompt": options.prefill}
    task["stored"] = options.stored
    task["clock"] = "cpu" if options.threads == 1 else "wall"
    task["gguf"] = str(folder / "model.gguf")
    pythons = {name: sys.executable for name in (*OURS, *TIMED.values(), *PEERS)} | {"llama.cpp": options.llama_python}
    names = [name for name, python in pythons.items() if python]
    if options.llama_python:
        written = [options.llama_python, "-m", "bench.peer_worker", "write", json.dumps(task)]
        subprocess.run(written, cwd=ROOT, check=True)
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        calls = {}
        if together:
            calls = {name: stack.enter_context(started(name, task, pythons[name])) for name in names}
        for i in range(options.rounds):
            found.append({})
            # the engine that comes first changes from round to round
            for name in names[i % len(names) :] + names[: i % len(names)]:
                with ExitStack() as short:
                    call = calls.get(name) or short.enter_context(started(name, task, pythons[name]))
                    if i == 0:
                        call("save", str(folder / f"{name}.npy"))
                    elif not together:
                        call("prefill"), call("decode")
                    found[i][name] = time_round(call, options.repeats)
            print(f"round {i + 1} of {options.rounds}", *shown(found[i]), sep="  ", file=sys.stderr, flush=True)
    logits = {name: np.load(folder / f"{name}.npy") for name in names}
    return summary(names, found, {name: distance(logits[OURS[0]], logits[name]) for name in names[1:]})


def shown(found: dict[str, Any]) -> Iterator[str]:
    """A round in short: milliseconds of prefill and decode."""
    for name, phases in found.items():
        yield f"{name} {1e3 * phases['prefill']['seconds']:.1f} / {1e3 * phases['decode']['seconds']:.2f}"


# ---- arithmetic


def distance(ours: Any, theirs: Any) -> float:
    """The largest difference of two arrays, relative to the largest value."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def summary(names: Sequence[str], found: Sequence[dict[str, Any]], distances: dict[str, float]) -> dict[str, Any]:
    """Medians, and for each of `OURS` the ratios of every peer's time to its own: above 1, refmoe is faster.

    found: per round, the seconds by engine and phase.   distances: of an engine's logits from those of the first of
    `OURS`.
    """
    result: dict[str, Any] = {"rounds": len(found), "distance": distances}
    peers = [name for name in names if name in PEERS]
    for phase, goal in GOALS.items():
        seconds = {name: [each[name][phase]["seconds"] for each in found] for name in names}
        result[phase] = {
            "milliseconds": {name: 1e3 * statistics.median(seconds[name]) for name in (*OURS, *peers)},
            "goal": goal,
        }
        for ours in OURS:
            speed = {name: ratio(seconds[name], seconds[ours]) for name in peers}
            # each round counts the fastest peer of that round, which is the hardest comparison
            best = [min(seconds[name][i] for name in peers) for i in range(len(found))] if peers else []
            timed = [each[TIMED[ours]][phase] for each in found]
            result[phase][ours] = {
                "speed_against": speed,
                "speed_against_best": min(speed.values(), default=None),
                "speed_against_best_of_round": ratio(best, seconds[ours]) if best else None,
                "share_of_matmul": statistics.median(each["matmul"] / each["seconds"] for each in timed),
            }
    return result


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def table(results: dict[str, Any]) -> Iterator[str]:
    """The lines of the table."""
    yield (
        f"{'':12}{'':9}{'engine':26}{'ms':>10}"
        + "".join(f"{ours + ' is':>20}" for ours in OURS)
        + f"{'difference':>13}"
    )
    for model, result in results.items():
        for phase, goal in GOALS.items():
            found = result[phase]
            for name, ms in found["milliseconds"].items():
                speeds = (found[ours]["speed_against"].get(name) for ours in OURS)
                cells = "".join(f"{'' if speed is None else f'{speed:.2f} x':>20}" for speed in speeds)
                far = f"{result['distance'][name]:13.1e}" if name in result["distance"] else ""
                yield f"{model:12}{phase:9}{name:26}{ms:10.2f}{cells}{far}".rstrip()
            for ours in OURS:
                best = found[ours]["speed_against_best"]
                if best is not None:
                    reached = "reached" if best >= goal else "missed"
                    yield f"{model:12}{phase:9}{ours} against the best {best:.2f} x, goal {goal:.1f} x: {reached}"
                yield f"{model:12}{phase:9}share of its time in matrix products {found[ours]['share_of_matmul']:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", help="a Python that has refmoe[llama-cpp]; without it llama.cpp is left out")
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layer-rounds", type=int, default=5, help="rounds of the full-size layer")
    parser.add_argument("--repeats", type=int, default=3, help="prefills of an engine in a round")
    parser.add_argument("--prefill", type=int, default=256, help="tokens")
    parser.add_argument("--decode", type=int, default=16, help="tokens")
    parser.add_argument(
        "--stored", choices=("bfloat16", "float32"), default="bfloat16",
        help="dtype of refmoe's weights; the others hold the same numbers in float32",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args()
    results = {}
    for model, config in MODELS.items():
        if options.only in (None, model):
            rounds = options.rounds if model == "middle" else options.layer_rounds
            chosen = argparse.Namespace(**vars(options) | {"rounds": rounds})
            with tempfile.TemporaryDirectory() as folder:
                results[model] = measure(config, chosen, Path(folder), together=model == "middle")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        what = {"threads": options.threads, "stored": options.stored, "load": os.getloadavg()[0]}
        what |= {"prefill": options.prefill, "decode": options.decode}
        options.json.write_text(json.dumps(what | results, indent=1) + "\n")
    print(*table(results), sep="\n")
    for model, result in results.items():
        for name, far in result["distance"].items():
            if not far < AGREEMENT:
                raise SystemExit(
                    f"{model}: the logits of {name} differ from those of NumPy's BLAS by {far:.1e} of the largest"
                )


if __name__ == "__main__":
    main()
