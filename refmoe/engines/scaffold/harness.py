#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A harness for refmoe: it answers requests about your engine, a line of JSON each (refmoe/engines/PROTOCOL.md).

It needs NumPy, ml_dtypes and safetensors. Unchanged, it writes one tap, `embedding`, as an example, and skips every
case. Write your engine where it says HERE.

    refmoe conform -- python harness.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (so that NumPy knows bfloat16)
import numpy as np
from safetensors.numpy import load_file, save_file


class Skipped(Exception):
    """The engine does not support a request. Arguments: a reason, and the URL of an issue or None."""


DESCRIPTION = {  # HERE: describe the engine
    "protocol": "1",
    "name": "my-engine",
    "version": "0",
    "dtypes": ["float32"],  # of float64, float32, bfloat16, float16
    "taps": ["embedding", "logits"],  # of golden/FORMAT.md, without layer; the more, the sharper the verdicts
    "abilities": [],  # of chunk, decode, sequences, unread
    "policies": {},  # per dtype one of `refmoe policies`; without, the generic one of the dtype's name
    "layouts": ["hf"],
}

weights: dict[str, Any] = {}
config: dict[str, Any] = {}


def load(checkpoint: Path, dtype: str) -> None:
    """HERE: load the model into the engine. The checkpoint is a Hugging Face directory."""
    config.update(json.loads((checkpoint / "config.json").read_text()))
    weights.update(load_file(checkpoint / "model.safetensors"))


def run(runs: list[dict[str, Any]], taps: list[str]) -> dict[str, Any]:
    """HERE: the activations of all runs, in order. Keys are `<run>/<tap>`, such as `prefill/layers.0.moe_norm`.

    Each run has `run` (its name), `op`, `sequence`, `tokens`, `positions` and `past`. Cut the cache of its sequence to
    `past` tokens first. Where `read` is false, only the cache is filled, and nothing is given.
    """
    arrays = {}
    for each in read(runs) if "embedding" in taps else []:
        table = np.asarray(weights["model.embed_tokens.weight"], np.float32)
        arrays[f"{each['run']}/embedding"] = table[each["tokens"]]
    return arrays


def read(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs whose outputs are read."""
    return [each for each in runs if each.get("read", True)]


FIELDS = {"start": {"protocol"}, "load": {"checkpoint", "dtype"}, "run": {"runs", "taps", "out"}, "stop": set()}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    command = request.get("command")
    if command not in FIELDS or request.keys() - {"command"} != FIELDS[command]:
        return {"error": "the command or one of its fields is unknown, or one is missing"}
    if command == "start":
        return DESCRIPTION
    if command == "load":
        load(Path(request["checkpoint"]), request["dtype"])
    if command == "run":
        arrays = run(request["runs"], request["taps"])
        # safetensors writes the memory of an array in its order, so a transposed view would be garbage
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, request["out"])
        if not all(f"{each['run']}/logits" in arrays for each in read(request["runs"])):
            raise Skipped("not written yet", None)
    return {"ok": True}


def main() -> None:
    # the engine may print, but not between the answers: from here on its output goes to standard error
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        stopping = False
        try:
            request = json.loads(line)
            stopping = request.get("command") == "stop"
            reply = answer(request)
        except Skipped as skipped:
            reply = {"skipped": skipped.args[0], "issue": skipped.args[1]}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]}
        print(json.dumps(reply), file=answers)
        if stopping:
            return


if __name__ == "__main__":
    main()
