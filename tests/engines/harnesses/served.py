# SPDX-License-Identifier: Apache-2.0
"""A harness of an engine behind a server: logits, or the largest log-probabilities, of the last position alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np
from safetensors.numpy import save_file

from tests.engines.harnesses import honest

GIVEN = {"logits": ["logits"], "logprobs": ["logprobs"], "top": ["logprobs", "logprobs.ids"]}
LARGEST = 4


def answer(request: dict[str, Any]) -> dict[str, Any]:
    given = sys.argv[1]
    if request["command"] == "start":
        return honest.DESCRIPTION | {"name": "served", "dtypes": ["float32"], "taps": ["residual", *GIVEN[given]]}
    if request["command"] != "run":
        return honest.answer(request)
    arrays = honest.run(request["runs"], ["residual", "logits"])
    for run in (each["run"] for each in request["runs"]):
        logits = arrays.pop(f"{run}/logits")[-1:].astype(np.float64)
        shifted = logits - logits.max()
        values = shifted - np.log(np.exp(shifted).sum())
        ids = np.argsort(values)[:, -LARGEST:]
        found = {"logits": logits[0], "logprobs": values, "logprobs.ids": ids}
        if given == "top":
            found["logprobs"] = np.take_along_axis(values, ids, -1)
        arrays |= {
            f"{run}/{tap}": found[tap].astype("int64" if tap.endswith("ids") else "float32") for tap in GIVEN[given]
        }
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, request["out"])
    return {"ok": True}


if __name__ == "__main__":
    honest.converse(answer)
