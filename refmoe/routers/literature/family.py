# SPDX-License-Identifier: Apache-2.0
"""The routers by name, with the settings of their papers, for `refmoe router show`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.errors import InputError
from refmoe.routers.literature.capacity import expert_capacity
from refmoe.routers.literature.deepseek_v3 import deepseek_v3, sequence_balance_loss
from refmoe.routers.literature.expert_choice import expert_choice
from refmoe.routers.literature.gshard import gshard, gshard_loss
from refmoe.routers.literature.losses import load_balancing_loss, router_z_loss
from refmoe.routers.literature.mixtral import mixtral
from refmoe.routers.literature.noisy_top_k import importance_loss, load_loss, noisy_top_k
from refmoe.routers.literature.record import Routing
from refmoe.routers.literature.st_moe import st_moe
from refmoe.routers.literature.switch import switch, switch_loss


@dataclass(frozen=True)
class Settings:
    """The options of a run; None takes the router's own value."""

    k: int | None = None
    capacity_factor: float | None = None
    groups: int = 1
    top_groups: int = 1
    seed: int = 0
    """Seeds the noise and the uniform numbers, for the routers that use any."""


@dataclass(frozen=True)
class Call:
    """The arguments of a router's function, with all settings resolved."""

    ops: ArrayOps
    logits: Array
    k: int
    capacity: int | None
    groups: int
    top_groups: int
    chance: np.random.Generator

    def uniforms(self, *shape: int) -> Array:
        return self.ops.array(self.chance.random(shape))

    def normals(self) -> Array:
        return self.ops.array(self.chance.standard_normal(self.logits.shape))


Outcome = tuple[Routing, dict[str, Array]]
"""A routing and the router's auxiliary losses, without their coefficients."""


@dataclass(frozen=True)
class Router:
    """A member of the family."""

    source: str
    run: Callable[[Call], Outcome]
    k: int = 2
    any_k: bool = True
    """Whether the paper allows another k than `k`."""
    factor: float | None = None
    """Its capacity factor; None for a router without capacity."""


def _mixtral(call: Call) -> Outcome:
    loss = load_balancing_loss(call.ops, [call.logits], call.k)
    return mixtral(call.ops, call.logits, call.k), {"load balancing": loss}


def _switch(call: Call) -> Outcome:
    return switch(call.ops, call.logits, call.capacity), {"load balancing": switch_loss(call.ops, call.logits)}


def _gshard(call: Call) -> Outcome:
    uniforms = call.uniforms(call.logits.shape[0])
    routing = gshard(call.ops, call.logits, call.capacity, uniforms)
    return routing, {"load balancing": gshard_loss(call.ops, call.logits)}


def _glam(call: Call) -> Outcome:
    return gshard(call.ops, call.logits, call.capacity), {"load balancing": gshard_loss(call.ops, call.logits)}


def _st_moe(call: Call) -> Outcome:
    uniforms = call.uniforms(call.logits.shape[0], call.k - 1)
    losses = {
        "load balancing": switch_loss(call.ops, call.logits),
        "router z": router_z_loss(call.ops, call.logits),
    }
    return st_moe(call.ops, call.logits, call.capacity, uniforms, call.k), losses


def _noisy_top_k(call: Call) -> Outcome:
    # the noise has a matrix of its own, unknown here: its output is taken as 0, which gives a deviation of log 2
    inputs = (call.logits, call.logits * 0, call.normals(), call.k)
    routing = noisy_top_k(call.ops, *inputs)
    return routing, {"importance": importance_loss(call.ops, routing), "load": load_loss(call.ops, *inputs)}


def _expert_choice(call: Call) -> Outcome:
    assert call.capacity is not None
    return expert_choice(call.ops, call.logits, min(call.capacity, call.logits.shape[0])), {}


def _deepseek_v3(call: Call) -> Outcome:
    routing = deepseek_v3(call.ops, call.logits, call.k, groups=call.groups, top_groups=call.top_groups)
    return routing, {"sequence balance": sequence_balance_loss(call.ops, call.logits, call.k)}


FAMILY = {
    "noisy-top-k": Router("Shazeer et al. 2017", _noisy_top_k),
    "gshard": Router("Lepikhin et al. 2020", _gshard, any_k=False, factor=2.0),
    "glam": Router("Du et al. 2021", _glam, any_k=False, factor=2.0),
    "switch": Router("Fedus et al. 2021", _switch, k=1, any_k=False, factor=1.25),
    "st-moe": Router("Zoph et al. 2022", _st_moe, factor=1.25),
    "expert-choice": Router("Zhou et al. 2022", _expert_choice, k=1, any_k=False, factor=2.0),
    "mixtral": Router("Jiang et al. 2024", _mixtral),
    "deepseek-v3": Router("DeepSeek-AI 2024", _deepseek_v3),
}
"""In order of appearance. A capacity factor of 1 is T / E tokens: a top-2 router needs 2 to keep an even load whole."""


def run_router(name: str, ops: ArrayOps, logits: Any, settings: Settings) -> Outcome:
    """Run a router of the family on logits [T, E]. Raises InputError when a setting does not fit."""
    router = FAMILY[name]
    tokens, experts = logits.shape
    k = settings.k or router.k
    if k != router.k and not router.any_k:
        way = "lets the experts choose" if name == "expert-choice" else f"is top-{router.k}"
        raise InputError(f"--top-k {k} does not apply: {name} {way}")
    if k > experts:
        raise InputError(f"{name} chooses {k} experts per token, but there are {experts}")
    if settings.capacity_factor is not None and router.factor is None:
        raise InputError(f"--capacity-factor does not apply: {name} drops no token")
    if (settings.groups, settings.top_groups) != (1, 1):
        _check_groups(name, experts, k, settings)
    factor = router.factor if settings.capacity_factor is None else settings.capacity_factor
    if factor is not None and not 0 < factor < float("inf"):
        raise InputError(f"--capacity-factor is {factor}, but a positive number was expected")
    capacity = None if factor is None else expert_capacity(tokens, experts, factor)
    chance = np.random.default_rng([settings.seed, 1])
    return router.run(
        Call(
            ops=ops,
            logits=ops.array(logits),
            k=k,
            capacity=capacity,
            groups=settings.groups,
            top_groups=settings.top_groups,
            chance=chance,
        )
    )


def _check_groups(name: str, experts: int, k: int, settings: Settings) -> None:
    groups, top_groups = settings.groups, settings.top_groups
    if name != "deepseek-v3":
        raise InputError(f"--groups and --top-groups do not apply: {name} has no groups of experts")
    if experts % groups:
        raise InputError(f"--groups {groups} does not divide the {experts} experts into equal groups")
    if top_groups > groups:
        raise InputError(f"--top-groups {top_groups} exceeds --groups {groups}")
    if k > top_groups * (experts // groups):
        available = top_groups * (experts // groups)
        raise InputError(f"--top-k {k} exceeds the {available} experts of {top_groups} of {groups} groups")
