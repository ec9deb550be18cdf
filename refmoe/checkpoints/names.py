# SPDX-License-Identifier: Apache-2.0
"""The canonical names of parameters. Layouts map their tensors to them, and synthetic weights are hashed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from refmoe.checkpoints.weight import Weight
from refmoe.spec.config import Config
from refmoe.spec.experts import Expert
from refmoe.spec.model import Layer, Parameters

AXES: dict[str, tuple[tuple[str, ...], ...]] = {
    "embedding": (("vocab",), ("dim",)),
    "attention_norm": (("dim",),),
    "wq": (("heads", "head_dim"), ("dim",)),
    "wk": (("kv_heads", "head_dim"), ("dim",)),
    "wv": (("kv_heads", "head_dim"), ("dim",)),
    "wo": (("dim",), ("heads", "head_dim")),
    "moe_norm": (("dim",),),
    "gate": (("experts",), ("dim",)),
    "w1": (("hidden_dim",), ("dim",)),
    "w2": (("dim",), ("hidden_dim",)),
    "w3": (("hidden_dim",), ("dim",)),
    "final_norm": (("dim",),),
    "output": (("vocab",), ("dim",)),
}
"""For the last part of a parameter's name and each axis, the fields of the configuration whose product is its size."""


def parameter_shape(config: Config, name: str) -> tuple[int, ...]:
    """The shape of the parameter with this canonical name."""
    return tuple(math.prod(getattr(config, field) for field in axis) for axis in parameter_axes(name))


def parameter_axes(name: str) -> tuple[tuple[str, ...], ...]:
    """For each axis of the parameter with this canonical name, the fields whose product is its size."""
    return AXES[name.rpartition(".")[2]]


def expert_names(config: Config) -> Iterator[str]:
    """The names of the matrices of all experts within a layer: ``experts.0.w1``, ``experts.0.w2`` and so on."""
    return (f"experts.{e}.{w}" for e in range(config.experts) for w in ("w1", "w2", "w3"))


def parameter_names(config: Config) -> Iterator[str]:
    """Every canonical name, in the order of computation."""
    yield "embedding"
    for i in range(config.layers):
        layer = f"layers.{i}."
        for name in ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"):
            yield layer + name
        yield layer + "moe_norm"
        yield layer + "router.gate"
        for name in expert_names(config):
            yield layer + name
    yield "final_norm"
    yield "output"


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every parameter, in the order of computation."""
    return {name: parameter_shape(config, name) for name in parameter_names(config)}


def build_parameters(config: Config, weight: Callable[[str], Weight]) -> Parameters:
    """The spec's record of parameters, each fetched by its canonical name."""

    def layer(i: int) -> Layer:
        prefix = f"layers.{i}."
        return Layer(
            attention_norm=weight(prefix + "attention_norm"),
            wq=weight(prefix + "attention.wq"),
            wk=weight(prefix + "attention.wk"),
            wv=weight(prefix + "attention.wv"),
            wo=weight(prefix + "attention.wo"),
            moe_norm=weight(prefix + "moe_norm"),
            router=weight(prefix + "router.gate"),
            experts=tuple(expert(f"{prefix}experts.{e}.") for e in range(config.experts)),
        )

    def expert(prefix: str) -> Expert:
        return Expert(w1=weight(prefix + "w1"), w2=weight(prefix + "w2"), w3=weight(prefix + "w3"))

    return Parameters(
        embedding=weight("embedding"),
        layers=tuple(layer(i) for i in range(config.layers)),
        final_norm=weight("final_norm"),
        output=weight("output"),
    )


def named_weights(parameters: Parameters) -> dict[str, Weight]:
    """Every parameter by its canonical name."""
    found: dict[str, Any] = {"embedding": parameters.embedding}
    for i, layer in enumerate(parameters.layers):
        prefix = f"layers.{i}."
        found[prefix + "attention_norm"] = layer.attention_norm
        for name in ("wq", "wk", "wv", "wo"):
            found[f"{prefix}attention.{name}"] = getattr(layer, name)
        found[prefix + "moe_norm"] = layer.moe_norm
        found[prefix + "router.gate"] = layer.router
        for e, expert in enumerate(layer.experts):
            for name in ("w1", "w2", "w3"):
                found[f"{prefix}experts.{e}.{name}"] = getattr(expert, name)
    return found | {"final_norm": parameters.final_norm, "output": parameters.output}


def untied(weights: dict[str, Weight]) -> dict[str, Weight]:
    """The weights without an output matrix that is the embedding itself, as no file stores it twice."""
    tied = weights["output"] is weights["embedding"]
    return {name: weight for name, weight in weights.items() if not (tied and name == "output")}
