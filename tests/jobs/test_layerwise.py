# SPDX-License-Identifier: Apache-2.0
"""A script run layer by layer has the bits of the script run call by call, and reads each weight once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.errors import InputError
from refmoe.jobs.layerwise import Script, States, Tap, check_states
from refmoe.spec.model import Model, Steps
from refmoe.suite import compute, read_case
from refmoe.traces.trace import Recorder
from tests.models import random_model

GOLDEN = Path(__file__).parents[2] / "golden"


def run(ops: Any, model: Model, runs: Any, tap: Tap, layers: range | None = None, states: States | None = None) -> Any:
    left: dict[str, States] = {}
    Script(ops, model, runs, tap).go(layers or range(model.config.layers), states, left.__setitem__)
    return left


@pytest.mark.parametrize(
    "name", ["walking-skeleton", "shared-prefix", "packed", "experts-12", "window-chunks", "mini-8x7b"]
)
def test_every_tap_has_the_bits_of_a_run_call_by_call(name: str) -> None:
    """Several sequences, caches that are cut, experts without tokens; also with every weight streamed in blocks."""
    case = read_case(GOLDEN / name)
    expected, model = compute(case), Model(case.config, case.checkpoint().parameters)
    for memory in (1 << 30, 0):
        tap = Tap(Recorder())
        run(ExactOps(tap, prepared_bytes=memory), model, case.runs(), tap)
        found = tap.recorder.arrays
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert (found[key].dtype, found[key].shape) == (values.dtype, values.shape), key
            assert found[key].tobytes() == values.tobytes(), key


def test_layers_in_two_pieces_are_those_in_one() -> None:
    case = read_case(GOLDEN / "walking-skeleton")
    model, whole, pieces = Model(case.config, case.checkpoint().parameters), Tap(Recorder()), Tap(Recorder())
    run(ExactOps(whole), model, case.runs(), whole)
    left = run(ExactOps(pieces), model, case.runs(), pieces, range(0, 1))
    assert [*left] == ["embedding", "layers.0"]
    rest = run(ExactOps(pieces), model, case.runs(), pieces, range(1, 2), left["layers.0"])
    assert [*rest] == ["layers.1", "head"]
    assert {key: a.tobytes() for key, a in whole.recorder.arrays.items()} == {
        key: a.tobytes() for key, a in pieces.recorder.arrays.items()
    }


def test_each_weight_is_read_once_and_no_expert_that_nobody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    case = read_case(GOLDEN / "walking-skeleton")
    checkpoint, reads = case.checkpoint(), Counter[str]()
    weight = type(checkpoint.parameters.layers[0].wq)
    original = weight.read

    def counted(self: Any) -> Any:
        reads[self.name] += 1
        return original(self)

    monkeypatch.setattr(weight, "read", counted)
    tap = Tap(Recorder())
    run(NativeOps(np.float64, tap), Model(case.config, checkpoint.parameters), case.runs(), tap)
    chosen = {
        f"layers.{i}.experts.{e}"
        for i in range(case.config.layers)
        for key, ids in tap.recorder.arrays.items()
        if key.endswith(f"layers.{i}.router.experts")
        for e in ids.reshape(-1).tolist()
    }
    experts = {name.rpartition(".")[0] for name in reads if ".experts." in name}
    assert experts == chosen
    matrices = {name: n for name, n in reads.items() if not name.endswith("norm")}
    assert set(matrices.values()) == {1}


def test_a_model_with_a_layer_of_its_own_is_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="cannot be taken apart"):
        Script(NativeOps(), replace(model, steps=replace(Steps(), decoder_layer=lambda *a: a)), [], Tap(Recorder()))


def test_states_that_do_not_fit_are_refused() -> None:
    case = read_case(GOLDEN / "walking-skeleton")
    with pytest.raises(InputError, match=r"the hidden state of run 'prefill' is nothing, but \[12, 48\] was expected"):
        check_states({}, case.runs(), case.config.dim, "t.safetensors")
    with pytest.raises(InputError, match=r"is \[3, 48\], but \[12, 48\] was expected"):
        check_states({"prefill": np.zeros((3, 48))}, case.runs(), case.config.dim, "t.safetensors")
