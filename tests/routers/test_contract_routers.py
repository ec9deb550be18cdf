# SPDX-License-Identifier: Apache-2.0
"""The contract on correct routers: refmoe's own, and those of libraries, which pass or fail for a stated reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.contracts.report import explain
from refmoe.routers.contract import Declaration, Subject, Verdict, judge, judge_all
from refmoe.routers.contract.laws import LAWS
from refmoe.routers.literature import adapters
from refmoe.routers.literature import noisy_top_k as noisy
from refmoe.spec.router import route
from tests.own_process import with_jax

EXAMPLES = 25


class Matrix:
    """A weight as the spec's ops take it."""

    grid = None
    computed = False
    most = None
    read_block = None

    def __init__(self, values: Any) -> None:
        self.values = np.array(values)
        self.shape = self.values.shape

    def read(self) -> Any:
        return self.values


def broken(verdicts: list[Verdict]) -> str:
    """The broken laws, in words."""
    return "\n\n".join(explain(verdict) for verdict in verdicts if verdict.outcome not in ("pass", "not applicable"))


def passed(verdicts: list[Verdict]) -> set[str]:
    return {verdict.law.name for verdict in verdicts if verdict.outcome == "pass"}


# --- refmoe's own


@pytest.mark.parametrize(
    ("ops", "dtype"), [(NativeOps(np.float32), "float32"), (NativeOps(np.float64), "float64"), (ExactOps(), "float64")],
    ids=["native-float32", "native-float64", "exact"],
)  # fmt: skip
def test_the_router_of_the_spec(ops: Any, dtype: Any) -> None:
    """ROUTE-1 to ROUTE-4 from hidden states.

    A hidden state that is NaN makes all logits NaN. A router matrix cannot give a single NaN logit, which the spec
    would not choose.
    """
    gate = np.eye(8, 11, 1)
    declared = Declaration(
        experts=8, top_k=2, ties="lower", selection="logits", dtype=dtype, gate=gate, nan="propagate"
    )  # fmt: skip
    weight = Matrix(gate.astype(dtype))
    verdicts = judge_all(Subject(lambda x: route(ops, x, weight, 2), declared), EXAMPLES)
    assert broken(verdicts) == ""
    assert len(passed(verdicts)) == 18


def test_the_router_of_the_spec_behind_a_gate_like_any_other() -> None:
    """The logits are known only within the rounding of a dot product, and so are the decisions."""
    gate = np.random.default_rng(3).standard_normal((6, 16)).astype(np.float32)
    declared = Declaration(experts=6, top_k=2, ties="lower", gate=gate)
    verdicts = judge_all(Subject(lambda x: route(NativeOps(np.float32), x, Matrix(gate), 2), declared), EXAMPLES)
    assert broken(verdicts) == ""
    biased = Matrix(gate + np.float32(1e-3) * np.eye(6, 16, dtype=np.float32))
    found = judge(LAWS["weight-values"], Subject(lambda x: route(NativeOps(np.float32), x, biased, 2), declared))
    assert found.outcome == "fail"


def noisy_without_noise(x: Any) -> Any:
    """NOISY-2. (The adapter makes its zeros by x * 0, which is NaN for a masked expert.)"""
    routing = noisy.noisy_top_k(ExactOps(), x, np.zeros_like(x), np.zeros_like(x), 3)
    return routing.ids, routing.weights


FAMILY: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mixtral": (adapters.mixtral, {"top_k": 2, "selection": "logits"}),
    "noisy-top-k": (noisy_without_noise, {"top_k": 3, "selection": "logits"}),
    "switch": (adapters.switch, {"top_k": 1, "normalised": False, "selection": "logits"}),
    "gshard": (adapters.gshard, {"top_k": 2, "selection": "logits"}),
    "st-moe": (adapters.st_moe, {"top_k": 2, "selection": "logits"}),
    "deepseek-v3": (adapters.deepseek_v3, {"top_k": 2, "scoring": "sigmoid"}),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family(name: str) -> None:
    """Every router of `refmoe.routers.literature` that decides from logits alone."""
    router, claims = FAMILY[name]
    declared = Declaration(experts=8, dtype="float64", ties="lower", **claims)
    assert set(FAMILY) == set(adapters.ADAPTERS)
    assert broken(judge_all(Subject(router, declared), EXAMPLES // 2)) == ""


def test_a_bias_that_only_selects() -> None:
    """DEEPSEEK-2, DEEPSEEK-5 with a scale."""
    bias = tuple(np.linspace(-0.2, 0.2, 8).tolist())
    declared = Declaration(experts=8, top_k=3, dtype="float64", scoring="sigmoid", bias=bias, scale=2.5)
    router = lambda x: adapters.deepseek_v3(x, 3, bias=bias, scaling=2.5)  # noqa: E731
    assert broken(judge_all(Subject(router, declared), EXAMPLES // 2)) == ""


# --- routers of other libraries


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other on a busy machine, milliseconds per softmax of eight numbers."""
    try:
        import torch
    except ModuleNotFoundError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torch_top_k(logits: Any) -> Any:
    """The most common router."""
    import torch

    weights, ids = torch.topk(torch.softmax(logits, dim=-1), 2, dim=-1)
    return ids, weights / weights.sum(dim=-1, keepdim=True)


@pytest.mark.engines
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_top_k_softmax_in_plain_torch(dtype: Any) -> None:
    """Every law holds in every dtype, and the note says that torch.topk has no tie rule."""
    declared = Declaration(
        experts=8,
        top_k=2,
        dtype=dtype,
        framework="torch",
        nan="propagate",
        infinity="propagate",
        all_masked="propagate",
    )
    verdicts = judge_all(Subject(torch_top_k, declared), EXAMPLES)
    assert broken(verdicts) == ""
    assert len(passed(verdicts)) == 21
    (ties,) = (verdict for verdict in verdicts if verdict.law.name == "tie-rule")
    assert ties.words.startswith(
        "ties declared 'unspecified': of equal logits it seems to choose now the lower, now the higher id ("
    )


@pytest.mark.engines
@pytest.mark.parametrize(("rule", "example"), [("lower", 1), ("higher", 1)])
def test_a_tie_rule_that_torch_does_not_keep(rule: Any, example: int) -> None:
    """A declared tie rule fails, and the failure names the seeming rule. No other law fails."""
    declared = Declaration(experts=8, top_k=2, dtype="bfloat16", framework="torch", ties=rule)
    verdict = judge(LAWS["tie-rule"], Subject(torch_top_k, declared), EXAMPLES)
    assert verdict.outcome == "fail"
    assert f"by the declared rule '{rule}'" in verdict.words
    assert "it seems to choose now the lower, now the higher id" in verdict.words
    assert verdict.example is not None
    assert verdict.example["logits"].shape == (1, 8)


@pytest.mark.engines
def test_a_stable_sort_in_torch_has_the_tie_rule_of_the_spec() -> None:
    import torch

    def router(logits: Any) -> Any:
        ids = torch.argsort(logits, dim=-1, descending=True, stable=True)[:, :2]
        return ids, torch.softmax(logits.gather(1, ids), dim=-1)

    for dtype in ("bfloat16", "float32"):
        declared = Declaration(
            experts=8, top_k=2, dtype=dtype, framework="torch", selection="logits", ties="lower"
        )  # fmt: skip
        assert broken(judge_all(Subject(router, declared), EXAMPLES // 2)) == ""


@pytest.mark.engines
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_router_of_transformers(dtype: Any) -> None:
    """MixtralTopKRouter: logits in the model's dtype, softmax and weights in float32, ties by torch.topk."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    gate = np.eye(8, 12)
    module = MixtralTopKRouter(MixtralConfig(hidden_size=12, num_local_experts=8, num_experts_per_tok=2))
    module = module.to(getattr(torch, dtype))
    module.weight.data.copy_(torch.from_numpy(gate))

    def router(hidden: Any) -> Any:
        _, weights, ids = module(hidden)
        return ids, weights

    declared = Declaration(
        experts=8, top_k=2, dtype=dtype, arithmetic="float32", framework="torch", gate=gate, nan="propagate"
    )  # fmt: skip
    verdicts = judge_all(Subject(router, declared), EXAMPLES)
    assert broken(verdicts) == ""
    assert {"weight-values", "near-ties", "batch-size", "nan", "shift"} <= passed(verdicts)
    (ties,) = (verdict for verdict in verdicts if verdict.law.name == "tie-rule")
    assert "now the lower, now the higher id" in ties.words


@pytest.mark.engines
def test_the_router_of_gpt_oss() -> None:
    """Top-k of the logits, then softmax of the chosen, in bfloat16 throughout."""
    import torch
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    gate = np.eye(8)
    config = GptOssConfig(hidden_size=8, num_local_experts=8, num_experts_per_tok=3)
    module = GptOssTopKRouter(config).to(torch.bfloat16)
    module.weight.data.copy_(torch.from_numpy(gate))

    def router(hidden: Any) -> Any:
        _, weights, ids = module(hidden)
        return ids, weights

    declared = Declaration(
        experts=8, top_k=3, dtype="bfloat16", framework="torch", gate=gate, selection="logits"
    )  # fmt: skip
    assert broken(judge_all(Subject(router, declared), EXAMPLES // 2)) == ""


def deepseek_module() -> Any:
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    module = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=8, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=2.5
        )
    )
    module.weight.data.copy_(torch.eye(8))
    module.e_score_correction_bias.copy_(torch.linspace(-0.25, 0.25, 8))
    return module


@pytest.mark.engines
def test_the_router_of_deepseek_v3_in_transformers() -> None:
    """Declared: sigmoid, a bias for selection only, a scale, ids in no order, and 1e-20 in the sum."""
    module = deepseek_module()

    def router(hidden: Any) -> Any:
        _, weights, ids = module(hidden)
        return ids, weights

    claims: dict[str, Any] = {"scoring": "sigmoid", "scale": 2.5, "epsilon": 1e-20, "descending": False}
    bias = tuple(module.e_score_correction_bias.tolist())
    declared = Declaration(experts=8, top_k=2, framework="torch", gate=np.eye(8), bias=bias, **claims)
    assert broken(judge_all(Subject(router, declared), EXAMPLES)) == ""

    undeclared = Declaration(experts=8, top_k=2, framework="torch", gate=np.eye(8), **claims)
    verdicts = {verdict.law.name: verdict for verdict in judge_all(Subject(router, undeclared), EXAMPLES)}
    assert verdicts["optimal-selection"].outcome == "fail"  # the bias shows when it is not declared
    assert verdicts["weight-values"].outcome == "pass"  # the bias does not enter the weights


@pytest.mark.engines
def test_the_capacity_of_switch_in_transformers() -> None:
    """SwitchTransformersTop1Router: a one-hot mask, in which a token beyond the capacity is zero."""
    import torch
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = SwitchTransformersConfig(d_model=8, num_experts=8, expert_capacity=3, router_jitter_noise=0.0)
    module = SwitchTransformersTop1Router(config).eval()
    module.classifier.weight.data.copy_(torch.eye(8))

    def router(hidden: Any) -> Any:
        mask, probability, _ = module(hidden[None])
        kept = mask[0].sum(dim=-1, keepdim=True)
        return mask[0].argmax(dim=-1, keepdim=True), probability[0] * kept

    declared = Declaration(
        experts=8, top_k=1, framework="torch", gate=np.eye(8), normalised=False, capacity=3, priority="token"
    )  # fmt: skip
    verdicts = judge_all(Subject(router, declared), EXAMPLES // 2)
    assert broken(verdicts) == ""
    assert {"capacity-limit", "capacity-prefix"} <= passed(verdicts)


@pytest.mark.engines
def test_the_losses_of_transformers() -> None:
    """load_balancing_loss_func of Mixtral and the z-loss of Switch, in float32."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    subject = Subject(
        torch_top_k, Declaration(experts=8, top_k=2, framework="torch"),
        balance_loss=lambda logits: load_balancing_loss_func((logits,), 8, 2),
        z_loss=lambda logits: torch.as_tensor(router_z_loss_func(logits[None])),
    )  # fmt: skip
    names = ["balance-loss-even", "balance-loss-values", "z-loss-values"]
    assert broken(judge_all(subject, EXAMPLES, only=names)) == ""


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (3, 2), (1, 1), (4, 4), (64, 8), (256, 8), (16, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_no_false_alarm(experts: int, k: int, dtype: Any) -> None:
    """Eight correct ways to write a router pass every law, each step in the dtype, over sizes and dtypes."""
    import torch

    def chosen(scores: Any, after: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def router(x: Any) -> Any:
            weights, ids = torch.topk(scores(x), k, dim=-1)
            return ids, after(weights)

        return router

    def softmax(x: Any) -> Any:
        return torch.softmax(x, dim=-1)

    def by_steps(x: Any) -> Any:
        parts = torch.exp(x - x.max(dim=-1, keepdim=True).values)
        return parts / parts.sum(dim=-1, keepdim=True)

    def by_exp2(x: Any) -> Any:
        parts = torch.exp2((x - x.max(dim=-1, keepdim=True).values) * 1.4426950408889634)
        return parts / parts.sum(dim=-1, keepdim=True)

    def renormalised(w: Any) -> Any:
        return w / w.sum(dim=-1, keepdim=True)

    def same(x: Any) -> Any:
        return x

    sigmoid = {"scoring": "sigmoid"}
    ways: list[tuple[Any, dict[str, Any]]] = [
        (chosen(softmax, renormalised), {}),
        (chosen(by_steps, renormalised), {}),
        (chosen(softmax, same), {"normalised": False}),
        (chosen(same, softmax), {"selection": "logits"}),
        (chosen(same, lambda w: torch.log_softmax(w, dim=-1).exp()), {"selection": "logits"}),
        (chosen(same, by_exp2), {"selection": "logits"}),
        (chosen(torch.sigmoid, lambda w: w / (w.sum(dim=-1, keepdim=True) + 1e-20)), {**sigmoid, "epsilon": 1e-20}),
        (chosen(torch.sigmoid, same), {**sigmoid, "normalised": False}),
    ]
    for router, claims in ways:
        declared = Declaration(experts=experts, top_k=k, dtype=dtype, framework="torch", **claims)
        assert broken(judge_all(Subject(router, declared))) == ""


def router_of_jax() -> None:
    import jax

    def router(logits: Any) -> Any:
        weights, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)
        return ids, weights / weights.sum(axis=-1, keepdims=True)

    declared = Declaration(experts=8, top_k=2, dtype="bfloat16", framework="jax", ties="lower")
    assert broken(judge_all(Subject(router, declared), 25)) == ""


def test_jax_through_dlpack() -> None:
    """bfloat16 arrays reach jax and come back."""
    with_jax(router_of_jax)
