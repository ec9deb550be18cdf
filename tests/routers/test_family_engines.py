# SPDX-License-Identifier: Apache-2.0
"""The routers against those of transformers, each loaded with logits through an identity router matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.deepseek_v3 import deepseek_v3
from refmoe.routers.literature.dispatch import make_plan
from refmoe.routers.literature.gshard import gshard
from refmoe.routers.literature.mixtral import mixtral
from refmoe.routers.literature.noisy_top_k import noisy_top_k
from refmoe.routers.literature.record import gates
from refmoe.routers.literature.switch import switch

pytestmark = pytest.mark.engines
OPS: Any = ExactOps()

# transformers' weights are float32: a softmax or a normalised sigmoid over at most 16 experts is a chain of exp, a sum
# and two divisions, within 32 roundings in any order.
FLOAT32 = 32 * 2.0**-24


def random_logits(seed: int, tokens: int, experts: int) -> Any:
    """Distinct multiples of 2^-8: exact in float32, and far enough apart that float32 decides as float64 does."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(-400, 400))[:experts] for _ in range(tokens)]) / 256.0


def by_expert(ids: Any, weights: Any, experts: int) -> Any:
    """Weights [T, E] by expert, as engines do not promise an order of the slots."""
    table = np.zeros((len(ids), experts))
    np.put_along_axis(table, np.asarray(ids), np.asarray(weights, np.float64), axis=1)
    return table


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (8, 1), (5, 3), (4, 4)])
def test_mixtral(experts: int, k: int) -> None:
    """ROUTE-2 to ROUTE-4."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    router = MixtralTopKRouter(MixtralConfig(num_local_experts=experts, num_experts_per_tok=k, hidden_size=experts))
    router.weight.data = torch.eye(experts)
    logits = random_logits(1, 60, experts)
    _, weights, ids = router(torch.tensor(logits, dtype=torch.float32))
    routing = mixtral(OPS, logits, k)
    assert (routing.ids == ids.numpy()).all()
    assert (abs(routing.weights - weights.detach().numpy()) <= FLOAT32 * routing.weights).all()


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_switch(capacity: int) -> None:
    """SWITCH-1 to SWITCH-3: expert, probability, and which tokens overflow."""
    import torch
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = SwitchTransformersConfig(d_model=6, num_experts=6, expert_capacity=capacity, router_bias=False)
    router = SwitchTransformersTop1Router(config).eval()
    router.classifier.weight.data = torch.eye(6)
    logits = random_logits(2, 40, 6)
    dispatched, probability, _ = router(torch.tensor(logits, dtype=torch.float32)[None])
    routing = switch(OPS, logits, capacity)
    assert (dispatched[0].numpy().astype(bool) == (gates(OPS, routing) > 0)).all()
    kept = routing.kept[:, 0]
    theirs = probability[0, :, 0].detach().numpy()
    assert (abs(routing.weights[kept, 0] - theirs[kept]) <= FLOAT32 * theirs[kept]).all()
    assert kept.all() == (capacity == 100)


@pytest.mark.parametrize("capacity", [1, 5, 9, 100])
def test_gshard_top_2_is_that_of_nllb(capacity: int) -> None:
    """GSHARD-1, GSHARD-2, GSHARD-5 with both choices asked for; weights normalised before tokens are dropped."""
    import torch
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    config = NllbMoeConfig(
        d_model=5, num_experts=5, expert_capacity=capacity, router_bias=False, second_expert_policy="all",
        normalize_router_prob_before_dropping=True, batch_prioritized_routing=False,
        moe_eval_capacity_token_fraction=-1.0,
    )  # fmt: skip
    router = NllbMoeTop2Router(config).eval()
    logits = random_logits(3, 30, 5)
    first, combine = router.route_tokens(torch.tensor(logits, dtype=torch.float32))
    ours = gates(OPS, routing := gshard(OPS, logits, capacity))
    assert ((ours > 0) == (combine.numpy() > 0)).all()
    assert (abs(ours - combine.numpy()) <= FLOAT32 * ours).all()
    assert (first.numpy().sum(axis=1) == routing.kept[:, 0]).all()
    assert routing.kept.all() == (capacity == 100)


def test_noisy_top_k_without_noise_is_that_of_jetmoe() -> None:
    """NOISY-2 and DISPATCH-1: gates, and how many rows each expert gets. (Its sort is not stable, so no row order.)"""
    import torch
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating

    gating = JetMoeTopKGating(6, 6, 3)
    gating.layer.weight.data = torch.eye(6)
    logits = random_logits(4, 50, 6)
    order, tokens, weights, sizes, _ = gating(torch.tensor(logits, dtype=torch.float32))
    routing = noisy_top_k(OPS, logits, logits * 0, logits * 0, 3)
    plan = make_plan(OPS, routing)
    assert tuple(sizes) == plan.counts
    assert (np.sort(order.numpy()) == np.sort(plan.order)).all()
    experts = routing.ids.reshape(-1)[order.numpy()]
    assert (np.diff(experts) >= 0).all()
    theirs = np.zeros((50, 6))
    theirs[tokens.numpy(), experts] = weights.detach().numpy()
    ours = gates(OPS, routing)
    assert (abs(ours - theirs) <= FLOAT32 * ours).all()


@pytest.mark.parametrize(("groups", "top_groups", "k"), [(1, 1, 2), (4, 2, 4), (8, 4, 8), (2, 1, 3)])
def test_deepseek_v3(groups: int, top_groups: int, k: int) -> None:
    """DEEPSEEK-1 to DEEPSEEK-5 with biases; in the second round they turn every biased score negative."""
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, num_local_experts=16, num_experts_per_tok=k, n_group=groups, topk_group=top_groups,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    router.weight.data = torch.eye(16)
    for seed, shift in enumerate((0.0, -2.0)):
        logits = random_logits(seed, 60, 16)
        bias = np.random.default_rng(seed).permutation(16) / 37.0 + shift
        router.e_score_correction_bias.data = torch.tensor(bias, dtype=torch.float32)
        _, weights, ids = router(torch.tensor(logits, dtype=torch.float32))
        routing = deepseek_v3(OPS, logits, k, bias, groups, top_groups, 2.5)
        ours, theirs = gates(OPS, routing), by_expert(ids.numpy(), weights.detach().numpy(), 16)
        assert ((ours > 0) == (theirs > 0)).all()
        assert (abs(ours - theirs) <= FLOAT32 * ours).all()


def test_a_dropped_token_of_switch_transformers_is_a_dropped_token_here() -> None:
    """CAP-3 where queues are long: 200 tokens for two experts, kept tokens a prefix of each queue."""
    import torch
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = SwitchTransformersConfig(d_model=2, num_experts=2, expert_capacity=37, router_bias=False)
    router = SwitchTransformersTop1Router(config).eval()
    router.classifier.weight.data = torch.eye(2)
    logits = random_logits(6, 200, 2)
    dispatched, _, _ = router(torch.tensor(logits, dtype=torch.float32)[None])
    ids = OPS.top_k(logits, 1)
    kept = admit(OPS, ids, logits[:, :1] * 0, 2, 37).kept[:, 0]
    assert (dispatched[0].numpy().any(axis=1) == kept).all()
