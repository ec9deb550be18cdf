# SPDX-License-Identifier: Apache-2.0
"""Known bugs of engines with quantised matrices: which usual checks they pass, and what refmoe says of each.

    python -m bench.quantised_bugs --left-out --json bench/results/quantised_bugs.json
    python -m bench.quantised_bugs --only quantised-fp8 --every-model

Each bug runs in the ideal engine of a quantised policy, on a golden case in the first format that shows the bug. Rows
and blocks of its matrices are given different sizes, as trained ones have, so that a scale of another place shows. The
usual checks compare it with the same engine without the bug: the normalised error of each product from the same input,
the cosine and the KL divergence of the logits of all calls, and 32 tokens that are generated greedily.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.bugs.quantised.bug import CODED, QuantisedBug
from refmoe.bugs.quantised.catalogue import QUANTISED
from refmoe.bugs.quantised.engine import ideal_ops
from refmoe.spec.model import Model, forward
from refmoe.spec.taps import step_of
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.script import execute
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.findings import NOT_CONFORMANT
from tests.bugs.quantised_models import computes, explained, judged, left_out, models_of, setting, traced

LIMITS = {"product": 5e-4, "cosine": 0.999, "divergence": 0.1}
"""The limits of the usual checks: llama.cpp's test-backend-ops, and common tests of logits."""
TOKENS = 32


@cache
def honest(model: str) -> Trace:
    return traced(None, model)


def engine(bug: QuantisedBug | None, model: str, tap: Any = None) -> tuple[Any, Model]:
    """The arithmetic and the model of an engine with a bug, or without."""
    at = setting(model)
    if bug is None:
        return ideal_ops(at.rules, tap), Model(at.config, at.parameters, CUT_STEPS)
    return ideal_ops(bug.policy(at.rules), tap), bug.model(at.config, at.parameters)


class Given:
    """A tap that keeps an engine's own values, and lets it go on with those of another trace."""

    def __init__(self, given: Trace) -> None:
        self.given, self.run = given, ""
        self.own: dict[str, Any] = {}

    def begin(self, run: Run) -> None:
        self.run = run.run

    def __call__(self, name: str, x: Any) -> Any:
        key = f"{self.run}/{name}"
        self.own[key] = np.array(x, np.float64)
        return self.given.tensors[key].get()


def product_error(bug: QuantisedBug, model: str) -> float:
    """The largest normalised error of a product from the honest engine's own input: |y - y'|^2 / |y|^2."""
    tap: Any = Given(honest(model))
    execute(*engine(bug, model, tap), setting(model).runs, tap)
    errors = []
    for key, own in tap.own.items():
        if step_of(key.partition("/")[2]) in CODED:
            right = np.asarray(honest(model).tensors[key].get(), np.float64)
            errors.append(float(((own - right) ** 2).sum() / (right**2).sum()))
    return max(errors)


def logits(trace: Trace) -> Any:
    """The logits of all tokens of all calls: float64 [T, V]"""
    found = [np.asarray(each.get(), np.float64) for key, each in trace.tensors.items() if key.endswith("/logits")]
    return np.concatenate(found)


def log_softmax(x: Any) -> Any:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cosine(right: Any, found: Any) -> float:
    """The smallest cosine of the logits of a token."""
    return float(((right * found).sum(-1) / np.linalg.norm(right, axis=-1) / np.linalg.norm(found, axis=-1)).min())


def divergence(right: Any, found: Any) -> float:
    """The mean KL divergence of the next token."""
    one, two = log_softmax(right), log_softmax(found)
    return float((np.exp(one) * (one - two)).sum(-1).mean())


@cache
def greedy(bug: str, model: str) -> tuple[int, ...]:
    """The tokens that an engine generates after the prompt of the case.   bug: empty for none"""
    ops, made = engine(QUANTISED[bug] if bug else None, model)
    new, start, caches, found = setting(model).runs[0].tokens, 0, None, list[int]()
    for _ in range(TOKENS):
        positions = np.arange(start, start + len(new))
        out, caches = forward(ops, made, np.asarray(new), positions, caches)
        start, new = start + len(new), (int(out[-1].argmax()),)
        found += new
    return tuple(found)


@np.errstate(all="ignore")
def measured(bug: QuantisedBug, model: str, leave_out: bool) -> dict[str, Any]:
    """A row of the results."""
    trace, began = traced(bug, model), time.process_time()
    report = judged(trace, model)
    found = explained(trace, model, report) if report.verdict == NOT_CONFORMANT else []
    seconds = time.process_time() - began
    names = [each.name for each in found]
    right, own = logits(honest(model)), logits(trace)
    row = {
        "bug": bug.id, "about": bug.about, "model": model, "policy": setting(model).rules.name,
        "product": product_error(bug, model), "cosine": cosine(right, own), "divergence": divergence(right, own),
        "same_tokens": greedy(bug.id, model) == greedy("", model),
        "killed": report.verdict == NOT_CONFORMANT,
        "first_wrong": report.first_wrong[1] if report.first_wrong else "", "named": names[0] if names else "",
        "right": bool(names) and (names[0] == bug.id or computes(names[0], trace, model)), "all_names": names,
        "seconds": round(seconds, 1),
    }  # fmt: skip
    if leave_out:
        left = left_out(bug.id, model)
        row |= {"left_out": left.named, "left_out_wrong": left.wrong, "alike": list(left.alike)}
    return row


def passes(row: dict[str, Any]) -> dict[str, bool]:
    """The usual checks that a bug passes."""
    return {
        "product": row["product"] <= LIMITS["product"], "cosine": row["cosine"] >= LIMITS["cosine"],
        "divergence": row["divergence"] <= LIMITS["divergence"], "tokens": row["same_tokens"],
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a file of results, in the order of the catalogue. Rows of other bugs in it stay."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    again = {(row["bug"], row["model"]) for row in rows}
    every = [row for row in before if (row["bug"], row["model"]) not in again and row["bug"] in QUANTISED] + rows
    order = {name: i for i, name in enumerate(QUANTISED)}
    every.sort(key=lambda row: order[row["bug"]])
    path.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="bugs whose name begins so")
    parser.add_argument("--every-model", action="store_true", help="each bug in every format that shows it")
    parser.add_argument("--left-out", action="store_true", help="diagnose each bug without its own entry as well")
    parser.add_argument("--json", type=Path, help="replace the rows of these bugs in a file of results")
    options = parser.parse_args()
    rows = []
    for bug in QUANTISED.values():
        models = models_of(bug) if bug.id.startswith(options.only) else []
        for model in models if options.every_model else models[:1]:
            row = measured(bug, model, options.left_out)
            rows.append(row)
            passed = [name for name, done in passes(row).items() if done]
            wrong = "" if row["right"] else "  NOT NAMED" if not row["named"] else "  WRONG"
            wrong += "  WRONG LEFT OUT" if row.get("left_out_wrong") else ""
            print(
                f"{bug.id:42} {model:14} {row['first_wrong'] or 'CONFORMANT':26} {row['named']:42} "
                f"{row['seconds']:5.1f} s  {' '.join(passed)}{wrong}", flush=True,
            )  # fmt: skip
    print(f"{len(rows)} bugs, {sum(r['killed'] for r in rows)} killed, {sum(r['right'] for r in rows)} named first")
    if options.json:
        write(options.json, rows)


if __name__ == "__main__":
    main()
