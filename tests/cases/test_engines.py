# SPDX-License-Identifier: Apache-2.0
"""Every case through an engine that nobody here wrote: materialised, loaded by transformers, compared tap by tap.

transformers computes norms, rotary tables, softmax and the router's softmax in float32 even in a float64 model. Each
case runs twice in float64: as it is, when it may be off by what float32's steps explain, and with those steps lifted to
float64, when it may be off by what float64's explain. The bound is the same formula with another unit roundoff.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.capture.transformers import capture, load_model
from refmoe.suite import FAMILIES, Case, find_cases, read_case
from refmoe.suite.conditions import golden_arrays
from refmoe.traces.trace import Recorder
from tests.capture.test_transformers import _lifted  # noqa: F401  (a fixture)
from tests.models import relative_rms

pytestmark = pytest.mark.engines

CASES = [read_case(folder) for folder in find_cases(Path(__file__).parents[2] / "golden", FAMILIES)]
LONG = {"production-positions-32768-decoded": pytest.mark.slow}
"""Cases of which two runs of the engine take half a minute."""
DYADIC = [case for case in CASES if "DYADIC" in case.conditions]
NEVER_SEEN = {"attention.scores"}  # no module's value

STEPS = 32
"""Roundings in a row between one tap and the next but a few, times two layers and more: a dozen each."""

SLOTTED = ("router.experts", "router.weights", "expert.gate", "expert.up", "expert.hidden", "expert.output")
"""Taps whose second axis is a token's chosen experts."""

Arrays = dict[str, np.ndarray[Any, Any]]


def explained(case: Case, golden: Any, unit: float) -> float:
    """The relative error that steps at this unit roundoff can make.

    A score or a router's logit of size s that is off by a relative u moves its exp by s u. An angle p f whose factors
    and product are rounded is off by 3 u p f, and moves scores by as much again; the first pair's f is 1 and exact.
    """
    size = max(float(np.abs(x).max()) for key, x in golden.items() if key.endswith(("scores", "router.logits")))
    position = max(position for run in case.runs() for position in run.positions)
    angle = position * case.config.rope_theta ** (-2 / case.config.head_dim)
    return unit * (STEPS + 3 * angle) * (1 + size)


def run(case: Case, folder: Path, dtype: str) -> tuple[Any, Arrays]:
    """The engine with the case's weights loaded, and its taps."""
    checkpoint = case.checkpoint()
    write_checkpoint(folder, checkpoint.config, checkpoint.parameters, "float32")
    model = load_model(folder, dtype)
    return model, captured(case, model)


def captured(case: Case, model: Any) -> Arrays:
    recorder = Recorder()
    capture(model, case.runs(), recorder)
    return recorder.arrays


def by_expert(arrays: Any) -> Arrays:
    """With the slots of each token in the order of expert ids: equal logits leave their order open in an engine."""
    sorted_arrays = dict(arrays)
    for key, chosen in arrays.items():
        if key.endswith("router.experts"):
            order = np.argsort(chosen, axis=-1, kind="stable")
            prefix = key.removesuffix("router.experts")
            for name in (
                "router.experts",
                "router.weights",
                "expert.gate",
                "expert.up",
                "expert.hidden",
                "expert.output",
            ):
                array = np.asarray(arrays[prefix + name])
                at = order.reshape(*order.shape, *[1] * (array.ndim - 2))
                sorted_arrays[prefix + name] = np.take_along_axis(array, at, axis=1)
    return sorted_arrays


def assert_agrees(found: Any, golden: Any, bound: float) -> None:
    assert {key.partition("layers.")[2].partition(".")[2] for key in golden.keys() - found.keys()} == NEVER_SEEN
    assert not found.keys() - golden.keys()
    for key, value in found.items():
        if key.endswith("experts"):
            assert np.array_equal(value, golden[key]), key
        else:
            assert relative_rms(value, golden[key]) < bound, key


def lowest_id_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lifted router with ROUTE-3: torch.topk leaves open which of equal logits it takes.

    Multiplied and summed row by row, as a matrix product may round two equal rows in two ways.
    """
    import torch
    from transformers.models.mixtral import modeling_mixtral as m

    def router(self: Any, x: Any) -> Any:
        logits = (x.reshape(-1, 1, self.hidden_dim) * self.weight).sum(-1)
        ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        return logits, torch.softmax(logits.gather(-1, ids), -1), ids

    monkeypatch.setattr(m.MixtralTopKRouter, "forward", router)


AS_IT_IS_CANNOT = {
    "TIE-EDGE": "torch.topk takes either of two equal logits",
    "ROUTER-UNDERFLOW": "its softmax over all experts comes first, and is zero in float32 for all but one of them",
}
"""Conditions under which transformers' own choice of experts is not ROUTE-2 or ROUTE-3."""


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=LONG.get(case.name, ())) for case in CASES])
def test_transformers_agrees_to_what_its_steps_explain(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    golden = golden_arrays(case)
    model, found = run(case, tmp_path, "float64")
    if not AS_IT_IS_CANNOT.keys() & set(case.conditions):
        assert_agrees(by_expert(found), by_expert(golden), explained(case, golden, 2.0**-24))
    request.getfixturevalue("_lifted")
    lowest_id_first(monkeypatch)
    assert_agrees(captured(case, model), golden, explained(case, golden, 2.0**-53))


def test_transformers_loses_the_second_choice_when_its_softmax_underflows(tmp_path: Path) -> None:
    """What `router-underflow` is for: the case tells a choice by probability from a choice by logit."""
    (case,) = [case for case in CASES if case.name == "router-underflow"]
    golden = golden_arrays(case)
    _, found = run(case, tmp_path, "float64")
    key = "prefill/layers.0.router.experts"
    assert np.array_equal(found[key][:, 0], golden[key][:, 0])
    assert not np.array_equal(found[key][:, 1], golden[key][:, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", DYADIC, ids=lambda case: case.name)
def test_transformers_gives_the_very_bits_of_a_dyadic_case(case: Case, dtype: str, tmp_path: Path) -> None:
    """Every tap, as it is; only the sign of a zero and the order of equal logits are free."""
    _, found = run(case, tmp_path, dtype)
    golden, found = by_expert(golden_arrays(case)), by_expert(found)
    assert {str(value.dtype) for key, value in found.items() if key.endswith("logits")} == {dtype}
    for key, value in found.items():
        assert np.array_equal(np.asarray(value, np.float64), golden[key]), key


def test_a_mistake_in_the_engine_is_no_part_of_what_is_explained(tmp_path: Path) -> None:
    """The bounds leave no room for one: eps forgotten where embeddings are tiny, a window one token longer."""
    for name, spoil in (("tiny-embedding", forget_eps), ("window-decode", widen_window)):
        (case,) = [case for case in CASES if case.name == name]
        golden = golden_arrays(case)
        model, _ = run(case, tmp_path / name, "float64")
        spoil(model)
        with pytest.raises(AssertionError):
            assert_agrees(captured(case, model), golden, explained(case, golden, 2.0**-24))


def forget_eps(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0


def widen_window(model: Any) -> None:
    model.config.sliding_window += 1
