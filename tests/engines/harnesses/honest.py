# SPDX-License-Identifier: Apache-2.0
"""An honest harness in plain Python: refmoe's own specification at the arithmetic of a dtype.

It speaks the protocol without `refmoe.engines`, so that both sides are tested against the document. Other harnesses
import it and give `converse` another function for `answer`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DESCRIPTION = {
    "protocol": "1",
    "name": "honest",
    "version": "1.0",
    "dtypes": ["float32", "bfloat16"],
    "taps": ["embedding", "moe_norm", "router.experts", "residual", "logits"],
    "abilities": ["chunk", "decode", "sequences", "unread"],
    "policies": {},
    "layouts": ["hf"],
}
Arrays = dict[str, np.ndarray[Any, Any]]
loaded: dict[str, Any] = {}


def load(checkpoint: Path, dtype: str) -> None:
    from refmoe.checkpoints.load import load_checkpoint

    loaded.update(checkpoint=load_checkpoint(checkpoint), dtype=dtype, case=checkpoint.name)


def run(runs: list[dict[str, Any]], taps: list[str]) -> Arrays:
    from refmoe.profiles.load import policy
    from refmoe.spec.model import Model
    from refmoe.steps.policy_ops import PolicyOps
    from refmoe.steps.rounding import CUT_STEPS
    from refmoe.traces.script import execute
    from refmoe.traces.trace import Recorder, Run

    checkpoint, recorder = loaded["checkpoint"], Recorder()
    calls = [Run(**{**each, "tokens": tuple(each["tokens"]), "positions": tuple(each["positions"])}) for each in runs]
    model = Model(checkpoint.config, checkpoint.parameters, CUT_STEPS)
    execute(PolicyOps(policy(loaded["dtype"]), recorder), model, calls, recorder)
    return {key: array for key, array in recorder.arrays.items() if without_layer(key) in taps}


def without_layer(key: str) -> str:
    tap = key.rpartition("/")[2]
    return tap.split(".", 2)[2] if tap.startswith("layers.") else tap


def answer(request: dict[str, Any]) -> dict[str, Any]:
    from safetensors.numpy import save_file

    if request["command"] == "start":
        return DESCRIPTION
    if request["command"] == "load":
        load(Path(request["checkpoint"]), request["dtype"])
    if request["command"] == "run":
        arrays = run(request["runs"], request["taps"])
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, request["out"])
    return {"ok": True}


def converse(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request)), flush=True)
        if request["command"] == "stop":
            return


if __name__ == "__main__":
    converse(answer)
