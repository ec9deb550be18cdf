# SPDX-License-Identifier: Apache-2.0
"""Each fault of `faults` in transformers: caught wherever arithmetic allows it, and only its own steps fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refmoe.verifier.findings import CONFORMANT
from tests.verifier import (
    faults_of_attention,
    faults_of_cache,
    faults_of_experts,
    faults_of_norms,
    faults_of_rope,
)
from tests.verifier.engines import (
    Arrays,
    captured,
    explained,
    failed_steps,
    first_wrong_step,
    honest,
    judged,
    loaded,
)
from tests.verifier.faults import DTYPES, FAULTS, SAME_BITS, Fault

pytestmark = pytest.mark.engines

PARTS = (faults_of_attention, faults_of_cache, faults_of_experts, faults_of_norms, faults_of_rope)
"""Imported because they register faults."""

SEEN = [(fault, dtype) for fault in FAULTS.values() for dtype in DTYPES if dtype not in fault.unseen]
UNSEEN = [(fault, dtype) for fault in FAULTS.values() for dtype in fault.unseen]
ENGINES = sorted({(fault.model, dtype) for fault in FAULTS.values() for dtype in DTYPES})


def named(pairs: list[tuple[Fault, str]]) -> list[Any]:
    """The parameters. The default run has float32, and bfloat16 or float16 in turn; other dtypes are slow."""
    order = list(FAULTS.values())
    return [
        pytest.param(
            fault,
            dtype,
            id=f"{fault.name}-{dtype}",
            marks=pytest.mark.slow if dtype == DTYPES[1 + order.index(fault) % 2] and not fault.unseen else (),
        )
        for fault, dtype in pairs
    ]


def patched(fault: Fault, dtype: str, attention: str = "eager") -> Arrays:
    """The arrays of the engine with the fault."""
    with pytest.MonkeyPatch.context() as patch:
        fault.apply(patch, loaded(fault.model, dtype))
        return captured(fault.model, dtype, attention)


def same(found: Arrays, expected: Arrays) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(np.asarray(found[key], np.float64), np.asarray(expected[key], np.float64)) for key in found
    )


def test_the_faults_are_many_and_come_from_every_part() -> None:
    assert len(FAULTS) >= 25
    assert {step for fault in FAULTS.values() for step in fault.breaks} >= {
        "embedding", "attention_norm", "attention.q", "attention.k", "attention.q_rope", "attention.probs",
        "attention.context", "attention.output", "attention_residual", "router.logits", "router.experts",
        "router.weights", "expert.gate", "expert.hidden", "expert.output", "moe.output", "residual", "final_norm",
        "logits",
    }  # fmt: skip
    assert all("float32" not in fault.unseen or len(fault.unseen) < len(DTYPES) for fault in FAULTS.values())
    for part in PARTS:
        assert any(fault.apply.__module__ == part.__name__ for fault in FAULTS.values())


@pytest.mark.parametrize(("fault", "dtype"), named(SEEN))
def test_a_fault_is_caught_where_it_is_and_nowhere_else(fault: Fault, dtype: str) -> None:
    """Steps that are wrong given their own inputs fail. Steps that only inherit a wrong value pass."""
    report = judged(fault.model, patched(fault, dtype), f"hf-{dtype}")
    assert failed_steps(report) == set(fault.breaks), explained(report)
    assert first_wrong_step(report) == fault.breaks[0]


@pytest.mark.parametrize(("fault", "dtype"), named(UNSEEN))
def test_what_a_dtype_cannot_show_is_no_fault_there(fault: Fault, dtype: str) -> None:
    """If the bits are those of a legal engine, the verdict is that of a legal engine."""
    found = patched(fault, dtype)
    assert same(found, honest(fault.model, dtype)) == (fault.unseen[dtype] == SAME_BITS)
    report = judged(fault.model, found, f"hf-{dtype}")
    assert report.verdict == CONFORMANT, explained(report)


@pytest.mark.parametrize(("model", "dtype"), ENGINES)
def test_without_the_patch_nothing_is_caught(model: str, dtype: str) -> None:
    """The control: the same model and path without a fault, after all patches are undone."""
    found = captured(model, dtype)
    assert same(found, honest(model, dtype))
    report = judged(model, found, f"hf-{dtype}")
    assert failed_steps(report) == set(), explained(report)


THROUGH_SDPA = {
    "scale-missing": ("attention.context",), "window-off": ("attention.context",),
    "window-one-too-long": ("attention.context",), "cache-drops-the-oldest": ("attention.context",),
    "rope-sign": ("attention.q_rope", "attention.k_rope"), "weights-swapped": ("moe.output",),
}  # fmt: skip
"""Some faults, and the steps that show them if scores and probabilities are not in the trace."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", THROUGH_SDPA)
def test_a_fault_is_caught_through_a_fused_kernel_too(name: str, dtype: str) -> None:
    report = judged(FAULTS[name].model, patched(FAULTS[name], dtype, "sdpa"), f"hf-{dtype}")
    assert failed_steps(report) == set(THROUGH_SDPA[name]), explained(report)
    assert first_wrong_step(report) == THROUGH_SDPA[name][0]


# ---- a tap that is wrong while what follows is right


def interleaved(x: Any) -> Any:
    """The rotation of interleaved pairs instead of half-split pairs."""
    half = x.shape[-1] // 2
    return np.stack((x[..., :half], x[..., half:]), -1).reshape(x.shape)


MISWRITTEN: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "rotated values written interleaved": (("attention.q_rope", "attention.k_rope"), interleaved),
    "rotated queries alone": (("attention.q_rope",), interleaved),
    "hidden units in another order": (("expert.hidden",), lambda x: x[..., ::-1]),
    "context heads in another order": (("attention.context",), lambda x: x[:, ::-1]),
    "probabilities of other heads": (("attention.probs",), lambda x: x[::-1]),
    "values of other heads": (("attention.v",), lambda x: x[:, ::-1]),
    "a norm before its gain": (("moe_norm",), lambda x: x * np.asarray(2, x.dtype)),
    "weights before they are renormalised": (("router.weights",), lambda x: x / 2),
    "hidden state one layer's scale off": (("residual",), lambda x: x * np.asarray(2, x.dtype)),
    "the final norm of the tokens in reverse": (("final_norm",), lambda x: x[::-1]),
}
"""Changes to the dumped values of some steps. The engine itself goes on with the right values."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MISWRITTEN)
def test_a_tap_that_is_written_wrongly_fails_alone(name: str, dtype: str) -> None:
    steps, change = MISWRITTEN[name]
    model = "dims-distinct"
    found = {
        key: np.ascontiguousarray(change(array)) if key.partition("layers.")[2].partition(".")[2] in steps
        or key.rpartition("/")[2] in steps else array
        for key, array in honest(model, dtype).items()
    }  # fmt: skip
    report = judged(model, found, f"hf-{dtype}")
    assert failed_steps(report) == set(steps), explained(report)
    assert first_wrong_step(report) == steps[0]
