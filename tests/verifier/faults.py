# SPDX-License-Identifier: Apache-2.0
"""One-line faults of real engines, patched into transformers: the fault, the model that shows it, and where none can.

A fault is a function that takes a `pytest.MonkeyPatch` and a loaded model. `breaks` names the steps that are wrong
given their own inputs, the first one first; no other step may fail. A hook cannot see the scores, so errors of scores
show in the probabilities. `unseen` gives, for a dtype, the reason why the fault looks like a legal engine there: its
bits do not change, or the policy allows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Patch = Any
"""A `pytest.MonkeyPatch`."""

DTYPES = ("float32", "bfloat16", "float16")

SAME_BITS = "no bit changes"

ATTENDED = ("attention.probs", "attention.context")
"""The steps that read the cache, as far as hooks can see."""


@dataclass(frozen=True)
class Fault:
    """A fault, and the verdict expected of the verifier."""

    name: str
    why: str
    """The cause of the fault."""
    model: str
    """The golden case, or model of `engines.SYNTHETIC`, that shows it."""
    breaks: tuple[str, ...]
    """The steps that fail, in order of computation."""
    apply: Callable[[Patch, Any], None]
    unseen: Mapping[str, str] = field(default_factory=dict)
    """The dtypes at which it cannot be seen, each with the reason."""


FAULTS: dict[str, Fault] = {}

Apply = Callable[[Patch, Any], None]


def fault(
    name: str, model: str, *breaks: str, why: str, unseen: Mapping[str, str] | None = None
) -> Callable[[Apply], Apply]:
    """Register a fault."""

    def register(apply: Apply) -> Apply:
        assert name not in FAULTS
        FAULTS[name] = Fault(name=name, why=why, model=model, breaks=breaks, apply=apply, unseen=unseen or {})
        return apply

    return register


# ---- what faults share


def modeling() -> Any:
    from transformers.models.mixtral import modeling_mixtral

    return modeling_mixtral


def functional() -> Any:
    import torch

    return torch.nn.functional


def set_weight(patch: Patch, module: Any, name: str, value: Any) -> None:
    """The parameter of a module."""
    import torch

    patch.setitem(module._parameters, name, torch.nn.Parameter(value.detach(), requires_grad=False))


def change_weight(patch: Patch, module: Any, name: str, change: Callable[[Any], Any]) -> None:
    """The parameter of a module as `change` leaves it."""
    set_weight(patch, module, name, change(getattr(module, name).detach().clone()))


def wrap(patch: Patch, module: Any, change: Callable[..., Any]) -> None:
    """The forward of one module; `change` gets the old one and then its arguments."""
    forward = module.forward
    patch.setattr(module, "forward", lambda *args, **kwargs: change(forward, *args, **kwargs))


def norms(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, modeling().MixtralRMSNorm)]


def set_norm(patch: Patch, normalise: Callable[[Any, Any, float], Any]) -> None:
    """Every norm.   normalise(x, gain, eps), x in float32, gain as it is stored"""

    def forward(self: Any, x: Any) -> Any:
        return normalise(x, self.weight, self.variance_epsilon)

    patch.setattr(modeling().MixtralRMSNorm, "forward", forward)


def set_table(patch: Patch, table: Callable[[Any, Any, Any], tuple[Any, Any]]) -> None:
    """The table of cosines and sines.   table(x, positions, frequencies)"""

    def forward(self: Any, x: Any, position_ids: Any) -> Any:
        return table(x, position_ids, self.inv_freq)

    patch.setattr(modeling().MixtralRotaryEmbedding, "forward", forward)


def set_attention(patch: Patch, attend: Callable[..., tuple[Any, Any]]) -> None:
    """Eager attention.   attend(q, k, v, mask, scaling, repeats) returns context [1, H, T, d] and probs"""

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        context, probs = attend(q, k, v, mask, scaling, module.num_key_value_groups)
        return context.transpose(1, 2).contiguous(), probs

    patch.setattr(modeling(), "eager_attention_forward", forward)


def scores_of(q: Any, k: Any, mask: Any, scaling: float, repeats: int) -> Any:
    scores = q @ modeling().repeat_kv(k, repeats).transpose(2, 3) * scaling
    return scores if mask is None else scores + mask


def set_softmax(patch: Patch, softmax: Callable[[Any], Any]) -> None:
    """The softmax of eager attention, of the masked scores."""

    def attend(q: Any, k: Any, v: Any, mask: Any, scaling: float, repeats: int) -> Any:
        probs = softmax(scores_of(q, k, mask, scaling, repeats))
        return probs @ modeling().repeat_kv(v, repeats), probs

    set_attention(patch, attend)


def set_router(patch: Patch, choose: Callable[[Any, int], tuple[Any, Any]]) -> None:
    """The router.   choose(logits, k) returns weights and ids"""

    def forward(self: Any, x: Any) -> Any:
        logits = functional().linear(x.reshape(-1, self.hidden_dim), self.weight)
        weights, ids = choose(logits, self.top_k)
        return logits, weights, ids

    patch.setattr(modeling().MixtralTopKRouter, "forward", forward)


def set_linear(patch: Patch, chosen: Callable[[Any], bool], product: Callable[[Any, Any], Any]) -> None:
    """The product x w^T of the weights w that are chosen; hooks on `linear` go on seeing it."""
    import torch

    linear = functional().linear

    def replaced(x: Any, weight: Any, bias: Any = None) -> Any:
        if torch.overrides.has_torch_function((x, weight)):
            return torch.overrides.handle_torch_function(replaced, (x, weight), x, weight, bias)
        return product(x, weight) if chosen(weight) else linear(x, weight, bias)

    patch.setattr(functional(), "linear", replaced)


def is_down(model: Any) -> Callable[[Any], bool]:
    """Whether a weight is some expert's down projection."""
    downs = {w.data_ptr() for layer in model.model.layers for w in layer.mlp.experts.down_proj}
    return lambda weight: weight.data_ptr() in downs


def truncated(x: Any, dtype: Any) -> Any:
    """Float64 as the next value towards zero of a dtype."""
    import torch

    y = x.to(dtype)
    beyond = y.double().abs() > x.abs()
    return torch.where(beyond, torch.nextafter(y, torch.zeros_like(y)), y)


def set_cache(patch: Patch, change: Callable[[Any, int], Any], values_too: bool = True) -> None:
    """Patch the result of a cache.   change(keys or values [1, K, S, d], number of old tokens)"""
    from transformers import DynamicCache

    update = DynamicCache.update

    def changed(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        new = keys.shape[2]
        keys, values = update(self, keys, values, *args, **kwargs)
        past = keys.shape[2] - new
        return change(keys, past), change(values, past) if values_too else values

    patch.setattr(DynamicCache, "update", changed)
