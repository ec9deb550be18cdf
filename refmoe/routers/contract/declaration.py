"""What a router claims to be. A law is judged by the declaration, never by what most routers do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from refmoe.errors import InputError
from refmoe.routers.contract.arithmetic import FORMATS, MEASURED_EXP, ExpBudget, Floats, Format

Scoring = Literal["softmax", "sigmoid", "other"]
Selection = Literal["logits", "scores"]
TieRule = Literal["lower", "higher", "unspecified"]
Behaviour = Literal["raise", "propagate", "unspecified"]
Priority = Literal["token", "choice", "weight"]
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
Framework = Literal["numpy", "torch", "jax", "cupy"]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """A router's claims. Only `experts` and `top_k` have no default.

    scoring     how a weight follows from a logit: softmax; sigmoid; or other, some increasing function of each logit by
                itself, up to a common factor of the token
    normalised  the chosen weights sum to `scale`; else each keeps its share of all experts
    scale       a factor of all weights (DeepSeek-V3: routed_scaling_factor)
    epsilon     added to the sum that normalises (DeepSeek-V3: 1e-20)
    selection   compares the logits themselves, or scores computed from them, where near logits may coincide
    bias        added to each expert's score for the selection alone (DeepSeek-V3: e_score_correction_bias)
    ties        of equal logits, the lower or the higher id is chosen (ROUTE-3: lower), or either
    descending  each token's ids are in order of falling logit
    nan, infinity, all_masked
                a token with a NaN, with a +Inf, with nothing but -Inf: raise, propagate (a weight is NaN), unspecified
    dtype       of the array that the router is given
    arithmetic  it computes in, if not `dtype`; weights_dtype  it rounds the weights to, if not `arithmetic`
    framework   whose arrays the router takes
    gate        given, the router takes hidden states [T, D] and multiplies them by this gate [E, D] itself
    capacity    tokens an expert takes of a batch: a number, or a function of the number of tokens. A dropped choice has
                weight 0 or an id outside 0 .. E-1
    priority    who is kept: token, the earlier token; choice, all first choices before all second ones, then the
                earlier token; weight, the larger weight
    shift_invariant
                a constant added to a token's logits changes nothing. True of softmax; for other, it is a claim
    exp_budget  what the engine's exp may be off by
    """

    experts: int
    top_k: int
    scoring: Scoring = "softmax"
    normalised: bool = True
    scale: float = 1.0
    epsilon: float = 0.0
    selection: Selection = "scores"
    bias: tuple[float, ...] | None = None
    ties: TieRule = "unspecified"
    descending: bool = True
    nan: Behaviour = "unspecified"
    infinity: Behaviour = "unspecified"
    all_masked: Behaviour = "unspecified"
    dtype: Dtype = "float32"
    arithmetic: Dtype | None = None
    weights_dtype: Dtype | None = None
    framework: Framework = "numpy"
    gate: Any = None
    capacity: int | Callable[[int], int] | None = None
    priority: Priority = "token"
    shift_invariant: bool | None = None
    exp_budget: ExpBudget = MEASURED_EXP

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), choices(hints[field.name])
            if allowed and value not in allowed:
                wanted = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise InputError(f"declaration: {field.name} is {value!r}, one of {wanted} was expected")
        if self.experts < 1 or not 1 <= self.top_k <= self.experts:
            found = f"top_k = {self.top_k} of experts = {self.experts}"
            raise InputError(f"declaration: {found}, 1 <= top_k <= experts was expected")
        if isinstance(self.capacity, int) and self.capacity < 1:
            raise InputError(f"declaration: capacity is {self.capacity}, at least 1 was expected")
        if self.bias is not None:
            if len(self.bias) != self.experts or self.selection != "scores" or self.scoring == "other":
                raise InputError("declaration: a bias wants one number per expert and a selection by known scores")
            object.__setattr__(self, "bias", tuple(float(number) for number in self.bias))
        if self.gate is not None:
            gate = np.asarray(self.gate, dtype=np.float64)
            if gate.ndim != 2 or gate.shape[0] != self.experts:
                wanted = f"[{self.experts}, hidden] was expected"
                raise InputError(f"declaration: the gate has shape {list(gate.shape)}, {wanted}")
            object.__setattr__(self, "gate", tuple(map(tuple, gate.tolist())))

    @property
    def given(self) -> Format:
        """The format of the router's input."""
        return FORMATS[self.dtype]

    @property
    def working(self) -> Format:
        """The format it computes in."""
        return FORMATS[self.arithmetic or self.dtype]

    @property
    def stored(self) -> Format:
        """The format of the weights that it returns."""
        return FORMATS[self.weights_dtype or self.arithmetic or self.dtype]

    @property
    def gate_matrix(self) -> Floats:
        return np.array(self.gate, dtype=np.float64)

    @property
    def any_shift(self) -> bool:
        return self.scoring == "softmax" if self.shift_invariant is None else self.shift_invariant

    def capacity_of(self, tokens: int) -> int:
        """How many tokens an expert takes of a batch of so many."""
        if self.capacity is None:
            return tokens
        return self.capacity if isinstance(self.capacity, int) else self.capacity(tokens)


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal allows, None included where it is optional; none for another type."""
    found: list[Any] = []
    for part in get_args(hint) or ():
        if get_args(part):
            found += get_args(part)
        elif isinstance(part, str) or (part is type(None) and found):
            found.append(None if part is type(None) else part)
    return tuple(found) if all(isinstance(item, str | None) for item in found) else ()
