# SPDX-License-Identifier: Apache-2.0
"""Known bugs patched into transformers: the patches, the names that a diagnosis must give, and shared code.

Beside the faults of `tests.verifier.faults`, to which `patched_names` gives their names, these are the bugs of the
catalogue that are not among them. A patch is written as the bug comes about in an engine, not as the mutant has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.verifier.engines import Arrays
from tests.verifier.faults import Patch, functional, modeling, scores_of, wrap

Apply = Callable[[Patch, Any], None]


def as_it_is(arrays: Arrays) -> Arrays:
    return arrays


@dataclass(frozen=True)
class Patched:
    """A bug in transformers, and the names that a diagnosis must give it."""

    name: str
    model: str
    """The golden case, or model of `engines.SYNTHETIC`, that shows it."""
    called: tuple[str, ...]
    """The mutants that compute the same function on this trace, any of them; none where the catalogue has none."""
    why: str
    """The reason why the catalogue has no such mutant."""
    apply: Apply
    dump: Callable[[Arrays], Arrays] = as_it_is
    """The arrays that the engine writes, from the arrays that it has computed."""
    rules: str = ""
    """Changes to the policy that state the rule that it breaks."""
    quantised: bool = False
    """Whether it runs, and is judged, on the dequantised weights of a quantised checkpoint."""
    kin: str = ""
    """A mutant with the same mistake but another effect. If no name is required, this name is not wrong."""
    elsewhere: bool = True
    """Whether the patch is the bug on any model."""


PATCHED: dict[str, Patched] = {}
"""The patches by the id of their mutant."""


def patched(
    mutant: str, model: str, dump: Callable[[Arrays], Arrays] = as_it_is, rules: str = "", quantised: bool = False,
    elsewhere: bool = True,
) -> Callable[[Apply], Apply]:  # fmt: skip
    """Register a patch of a known bug."""

    def register(apply: Apply) -> Apply:
        assert mutant not in PATCHED
        PATCHED[mutant] = Patched(
            name=mutant,
            model=model,
            called=(mutant,),
            why="",
            apply=apply,
            dump=dump,
            rules=rules,
            quantised=quantised,
            elsewhere=elsewhere and not quantised,
        )
        return apply

    return register


# ---- what patches share


class Served:
    """Which sequence the engine serves: the patched model's calls, in the order in which their caches first appear."""

    def __init__(self, patch: Patch, model: Any) -> None:
        self.caches: list[Any] = []
        self.row = 0
        """The sequence of the call that is running."""
        self.ids: Any = None
        self.positions: Any = None
        wrap(patch, model.model, self._call)

    def _call(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs["past_key_values"]
        if not any(cache is seen for seen in self.caches):
            self.caches.append(cache)
        self.row = next(i for i, seen in enumerate(self.caches) if cache is seen)
        self.ids, self.positions = kwargs["input_ids"][0], kwargs["position_ids"][0]
        return forward(*args, **kwargs)


Attend = Callable[[Any, Any, Any, Any, Any, float], tuple[Any, Any]]


def set_eager(patch: Patch, attend: Attend) -> None:
    """Eager attention.   attend(module, q, k, v, mask, scaling) returns context [1, H, T, d] and probs [1, H, T, S]"""

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        context, probs = attend(module, q, k, v, mask, scaling)
        return context.transpose(1, 2).contiguous(), probs

    patch.setattr(modeling(), "eager_attention_forward", forward)


def attend(q: Any, k: Any, v: Any, mask: Any, scaling: float, repeats: int) -> tuple[Any, Any]:
    """Attention as it is."""
    probs = scores_of(q, k, mask, scaling, repeats).float().softmax(-1).to(q.dtype)
    return probs @ modeling().repeat_kv(v, repeats), probs


def attend_to_more(
    q: Any, k: Any, v: Any, mask: Any, scaling: float, repeats: int, more: tuple[Any, Any], hidden: bool = False
) -> tuple[Any, Any]:
    """Attention to slots beyond those of the sequence's tokens. Their probabilities are not written.

    more: keys and values of these slots, [1, K, n, d]   hidden: whether the mask hides them
    """
    import torch

    repeat = modeling().repeat_kv
    others = scores_of(q, more[0], None, scaling, repeats)
    others = torch.full_like(others, -torch.inf) if hidden else others
    probs = torch.cat((scores_of(q, k, mask, scaling, repeats), others), -1).float().softmax(-1).to(q.dtype)
    return probs @ torch.cat((repeat(v, repeats), repeat(more[1], repeats)), 2), probs[..., : k.shape[2]]


def set_mask(patch: Patch, change: Callable[[Any, Any], Any]) -> None:
    """The mask of a call, window or not.   change(visible: booleans [T, S], the cache) returns booleans [T, S]"""
    import torch

    def changed(make: Any, **kwargs: Any) -> Any:
        mask = make(**kwargs)
        visible = change(mask[0, 0] == 0, kwargs["past_key_values"])
        return torch.where(visible, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)[None, None]

    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        patch.setattr(modeling(), name, partial(changed, getattr(modeling(), name)))


Rows = Callable[[Any, Any, Any], Any]


def as_read(x: Any, ids: Any, weights: Any) -> Any:
    """The input of each slot's expert. x: [T, D]   ids, weights: [T, k]   returns: [T, k, D]"""
    return x[:, None].expand(*ids.shape, x.shape[-1])


def added(outputs: Any, ids: Any, weights: Any) -> Any:
    """The outputs times their weights, added in the order of experts. outputs: [T, k, D]   returns: [T, D]"""
    weighted, order = (outputs * weights[..., None]).to(outputs.dtype), ids.argsort(-1)
    y = outputs.new_zeros(len(ids), outputs.shape[-1])
    for rank in range(ids.shape[1]):
        y = y + weighted.take_along_dim(order[:, rank, None, None], 1)[:, 0]
    return y


def set_experts(
    patch: Patch, model: Any, rows: Rows = as_read, hidden: Rows | None = None, combine: Rows = added
) -> None:
    """The experts, one by one as transformers runs them.

    rows(x, ids, weights): what each slot reads, [T, k, D]
    hidden(gate_up, ids, weights): what each slot's last projection reads, from [T, k, 2 F] to [T, k, F]
    combine(outputs, ids, weights): the result [T, D] from outputs [T, k, D]
    """

    def plain(gate_up: Any, ids: Any, weights: Any) -> Any:
        gate, up = gate_up.chunk(2, -1)
        return functional().silu(gate) * up

    def run(experts: Any, x: Any, ids: Any, weights: Any) -> Any:
        read, used = rows(x, ids, weights), sorted(set(ids.flatten().tolist()))
        slots = {e: (ids == e).T.nonzero().flip(-1).T for e in used}  # token and rank, rank by rank
        fused = x.new_empty(*ids.shape, experts.gate_up_proj.shape[1])
        outputs = x.new_empty(*ids.shape, x.shape[-1])
        for e in used:
            fused[tuple(slots[e])] = read[tuple(slots[e])] @ experts.gate_up_proj[e].T
        acts = (hidden or plain)(fused, ids, weights)
        for e in used:
            functional().linear(read[tuple(slots[e])], experts.gate_up_proj[e])
            outputs[tuple(slots[e])] = functional().linear(acts[tuple(slots[e])], experts.down_proj[e])
        return combine(outputs, ids, weights)

    for layer in model.model.layers:
        wrap(patch, layer.mlp.experts, lambda _, x, ids, weights, e=layer.mlp.experts: run(e, x, ids, weights))


def grouped(ids: Any) -> Any:
    """Slots in the order of a kernel that sorts them by expert, tokens in order. ids: [T, k]   returns: [T k]"""
    return ids.flatten().argsort(stable=True)
