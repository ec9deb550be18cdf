# SPDX-License-Identifier: Apache-2.0
"""A harness that computes nothing: it returns the golden's values, rounded once to the dtype that is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import ml_dtypes
from safetensors.numpy import load_file, save_file

from tests.engines.harnesses import honest

GOLDEN = Path(__file__).parents[3] / "golden"
DTYPES = {"float64": "float64", "float32": "float32", "bfloat16": ml_dtypes.bfloat16}
loaded: dict[str, Any] = {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if request["command"] == "start":
        return honest.DESCRIPTION | {"name": "echo", "dtypes": [*DTYPES], "taps": ["embedding", "residual", "logits"]}
    if request["command"] == "load":
        loaded.update(case=Path(request["checkpoint"]).name, dtype=DTYPES[request["dtype"]])
    if request["command"] == "run":
        (golden,) = (GOLDEN / loaded["case"]).glob("trace-*.safetensors")
        wanted = {f"{run['run']}/" for run in request["runs"]}
        arrays = {
            key: array.astype(loaded["dtype"])
            for key, array in load_file(golden).items()
            if key.startswith(tuple(wanted)) and honest.without_layer(key) in request["taps"]
        }
        save_file(arrays, request["out"])
    return {"ok": True}


if __name__ == "__main__":
    honest.converse(answer)
