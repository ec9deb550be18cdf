# SPDX-License-Identifier: Apache-2.0
"""`losses.json` against refmoe, in three arithmetics, and against plausible mistakes.

The known bugs: `tests/bugs/test_outside.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.ball import BallOps
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.routers.literature.losses import load_balancing_loss, router_z_loss
from tests.vectors.files import load
from tests.vectors.numbers import contains, read

VECTORS = load("losses.json")["vectors"]
BALANCING = [vector for vector in VECTORS if vector["kind"] == "load-balancing"]
Z_LOSS = [vector for vector in VECTORS if vector["kind"] == "router-z"]

# Relative: exp, log, division and a sum of at most 16 terms in binary64, each within 1 ulp, on numbers of one sign
# (z-loss: log-sum-exp, whose absolute error is that of its largest logit). 64 roundings are more than are made.
ROUNDING = Fraction(64, 2**53)


def table(vector: dict[str, Any]) -> tuple[list[Array], Array | None]:
    """Per layer the logits [T, E], and the mask [T]: sequences one after another."""
    layers = [np.array([[read(v) for v in row] for rows in layer for row in rows]) for layer in tables(vector)]
    mask = vector["mask"] and np.array([flag == 1 for row in vector["mask"] for flag in row])
    return layers, mask


def tables(vector: dict[str, Any]) -> list[Any]:
    return list(vector["layers"]) if "layers" in vector else [vector["logits"]]


def refmoe_loss(ops: Any, vector: dict[str, Any]) -> Any:
    layers, mask = table(vector)
    arrays = [ops.array(layer) for layer in layers]
    if vector["kind"] == "router-z":
        return router_z_loss(ops, arrays[0], mask)
    return load_balancing_loss(ops, arrays, vector["top_k"], mask)


@pytest.mark.parametrize("ops", [NativeOps, ExactOps])
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_refmoe_gives_the_value_in_float64(vector: dict[str, Any], ops: Callable[[], Any]) -> None:
    """AUX-1 to AUX-8."""
    value = Fraction(float(refmoe_loss(ops(), vector)))
    assert contains(vector["expected"]["loss"], value, ROUNDING * max(Fraction(1), abs(value)))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_refmoe_encloses_the_value_in_balls(vector: dict[str, Any]) -> None:
    """The balls of `BallOps` and the stated enclosures overlap, and both are narrow."""
    ops = BallOps()
    ball, stated = refmoe_loss(ops, vector), vector["expected"]["loss"]
    value = Fraction(stated.get("exact", stated.get("midpoint")))
    distance = abs(ball - ops.flint.arb(value.numerator) / value.denominator)
    assert float(ball.rad()) < 1e-25
    assert not distance > float(Fraction(stated.get("radius", "0")))


@pytest.mark.engines
@pytest.mark.parametrize("vector", [v for v in BALANCING if not v["ties"]], ids=lambda vector: str(vector["name"]))
def test_transformers_gives_the_value_in_float32(vector: dict[str, Any]) -> None:
    """transformers meets the vectors. With at most 8 rows of 8 experts, 64 roundings of 2^-24 are enough."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers: Any = tuple(torch.tensor(layer, dtype=torch.float32) for layer in table(vector)[0])
    mask = None if vector["mask"] is None else torch.tensor(vector["mask"])
    value = Fraction(float(load_balancing_loss_func(layers, layers[0].shape[-1], vector["top_k"], mask)))
    assert contains(vector["expected"]["loss"], value, Fraction(64, 2**24) * value)


def test_padding_does_not_change_the_loss() -> None:
    """AUX-5: the same tokens with and without padding, on either side."""
    expected = {vector["name"]: vector["expected"] for vector in BALANCING}
    assert expected["layers-mixed"] == expected["layers-mixed-padded"] == expected["layers-mixed-padded-left"]


def softmax(x: Array) -> Array:
    weight = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=-1, keepdims=True))


def parts(vector: dict[str, Any], keep: Array | None = None) -> tuple[Array, Array, int]:
    """f, P and E in plain NumPy. keep: a mask over the rows of all layers."""
    layers, mask = table(vector)
    rows = np.concatenate(layers)
    if keep is None:
        keep = np.ones(len(rows), bool) if mask is None else np.tile(mask, len(layers))
    probabilities = softmax(rows[keep])
    chosen = np.argsort(-rows[keep], axis=-1, kind="stable")[:, : vector["top_k"]]
    experts = rows.shape[-1]
    return np.bincount(chosen.ravel(), minlength=experts) / keep.sum(), probabilities.mean(axis=0), experts


def as_it_should_be(vector: dict[str, Any]) -> float:
    f, p, experts = parts(vector)
    return float(experts * (f * p).sum())


def transposed_mask(vector: dict[str, Any]) -> float:
    """The mask read as [S, B]."""
    layers, _ = table(vector)
    keep = None if vector["mask"] is None else np.tile(np.array(vector["mask"], bool).T.ravel(), len(layers))
    f, p, experts = parts(vector, keep)
    return float(experts * (f * p).sum())


def mean_of_layers(vector: dict[str, Any]) -> float:
    return float(np.mean([as_it_should_be(vector | {"layers": [layer]}) for layer in vector["layers"]]))


def frequencies_that_sum_to_one(vector: dict[str, Any]) -> float:
    return as_it_should_be(vector) / int(vector["top_k"])


VARIATIONS: dict[str, tuple[Callable[[dict[str, Any]], float], str]] = {
    "a mask transposed": (transposed_mask, "mask-layout"),
    "the mean of the layers' losses": (mean_of_layers, "layers-pooled"),
    "f divided by k": (frequencies_that_sum_to_one, "cyclic-top-2"),
}


def catches(vector: dict[str, Any], value: float) -> bool:
    """Whether the value is wrong by more than a thousandth, which exceeds any error of float32."""
    return not contains(vector["expected"]["loss"], Fraction(value), Fraction(1, 1000))


def test_the_variations_vary_from_the_right_value() -> None:
    assert [vector["name"] for vector in BALANCING if catches(vector, as_it_should_be(vector))] == []


@pytest.mark.parametrize("mistake", VARIATIONS)
def test_each_near_mistake_is_caught(mistake: str) -> None:
    """Each mistake, which bugs.json does not have, gives a wrong value for some vector."""
    variation, name = VARIATIONS[mistake]
    (vector,) = (vector for vector in BALANCING if vector["name"] == name)
    assert catches(vector, variation(vector))


def z_values(vector: dict[str, Any]) -> Array:
    layers, mask = table(vector)
    rows = layers[0] if mask is None else layers[0][mask]
    largest = rows.max(axis=-1)
    return np.asarray(largest + np.log(np.exp(rows - largest[:, None]).sum(axis=-1)))


def naive_log_sum_exp(vector: dict[str, Any]) -> float:
    with np.errstate(all="ignore"):
        return float(np.mean(np.log(np.exp(table(vector)[0][0]).sum(axis=-1)) ** 2))


Z_VARIATIONS: dict[str, tuple[Callable[[dict[str, Any]], float], str]] = {
    "the square of the mean": (lambda vector: float(z_values(vector).mean() ** 2), "z-opposite-signs"),
    "the mean without a square": (lambda vector: float(z_values(vector).mean()), "z-equal-logits"),
    "the sum over tokens": (lambda vector: float((z_values(vector) ** 2).sum()), "z-mixed"),
    "the mean square of the logits": (lambda vector: float((table(vector)[0][0] ** 2).mean()), "z-equal-logits"),
    "of the shifted logits": (lambda vector: z_of(vector, table(vector)[0][0] - table(vector)[0][0].max()), "z-mixed"),
    "the mean over the experts": (lambda vector: z_of(vector, table(vector)[0][0], mean=True), "z-equal-logits"),
    "the largest not subtracted": (naive_log_sum_exp, "z-small"),
    "padding counted": (lambda vector: z_of(vector, table(vector)[0][0]), "z-padded"),
}


def z_of(vector: dict[str, Any], rows: Array, mean: bool = False) -> float:
    """The z-loss of all these rows. mean: use the log of the mean of exp, which is a mistake."""
    shift = np.log(rows.shape[-1]) if mean else 0.0
    largest = rows.max(axis=-1)
    return float(np.mean((largest + np.log(np.exp(rows - largest[:, None]).sum(axis=-1)) - shift) ** 2))


@pytest.mark.parametrize("mistake", Z_VARIATIONS)
def test_each_mistake_of_a_z_loss_is_caught(mistake: str) -> None:
    """The obvious mistakes of a z-loss, of which bugs.json has none."""
    variation, name = Z_VARIATIONS[mistake]
    (vector,) = (vector for vector in Z_LOSS if vector["name"] == name)
    value = variation(vector)
    assert not np.isfinite(value) or catches(vector, value)
