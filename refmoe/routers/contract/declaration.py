# SPDX-License-Identifier: Apache-2.0
"""The claims of a router. Laws are judged by this declaration, never by the behaviour of most routers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refmoe.contracts.declaring import Dtype, Framework, check_choices
from refmoe.contracts.formats import FORMATS, Floats, Format
from refmoe.errors import InputError
from refmoe.routers.contract.arithmetic import MEASURED_EXP, ExpBudget

Scoring = Literal["softmax", "sigmoid", "other"]
Selection = Literal["logits", "scores"]
TieRule = Literal["lower", "higher", "unspecified"]
Behaviour = Literal["raise", "propagate", "unspecified"]
Priority = Literal["token", "choice", "weight"]

MOST_EXPERTS = 512
"""The most experts. Hypothesis draws no example that is much larger."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """A router's claims. Only `experts` and `top_k` have no default."""

    experts: int
    top_k: int
    scoring: Scoring = "softmax"
    """The function from logit to weight: softmax, sigmoid or other.

    other: an increasing function of each logit by itself, up to a common factor of the token.
    """
    normalised: bool = True
    """The chosen weights sum to `scale`; else each keeps its share of all experts."""
    scale: float = 1.0
    """A factor of all weights (DeepSeek-V3: routed_scaling_factor)."""
    epsilon: float = 0.0
    """Added to the sum that normalises (DeepSeek-V3: 1e-20)."""
    selection: Selection = "scores"
    """The selection compares the logits, or scores computed from them, where near logits may coincide."""
    bias: tuple[float, ...] | None = None
    """Added to each expert's score for the selection only (DeepSeek-V3: e_score_correction_bias)."""
    ties: TieRule = "unspecified"
    """Which of equal logits is chosen: that of the lower id (ROUTE-3), of the higher id, or of either."""
    descending: bool = True
    """Each token's ids are in order of falling logit."""
    nan: Behaviour = "unspecified"
    """The result of a token with a NaN: an exception (raise), a weight that is NaN (propagate), or any result."""
    infinity: Behaviour = "unspecified"
    """The result of a token with a +Inf, as for `nan`."""
    all_masked: Behaviour = "unspecified"
    """The result of a token with only -Inf, as for `nan`."""
    dtype: Dtype = "float32"
    """The dtype of the array that the router is given."""
    arithmetic: Dtype | None = None
    """The dtype that it computes in, if not `dtype`."""
    weights_dtype: Dtype | None = None
    """The dtype that it rounds the weights to, if not `arithmetic`."""
    framework: Framework = "numpy"
    """The framework of the arrays that the router takes."""
    gate: Any = None
    """The router matrix [E, D]. The router then takes hidden states [T, D] and multiplies them by it."""
    capacity: int | Callable[[int], int] | None = None
    """Tokens that an expert takes of a batch: a number, or a function of the number of tokens.

    A dropped choice has weight 0 or an id outside 0 .. E-1.
    """
    priority: Priority = "token"
    """The choices that are kept.

    token: of earlier tokens. choice: all first choices before all second ones, then of earlier tokens. weight: those of
    larger weight.
    """
    shift_invariant: bool | None = None
    """A constant added to a token's logits does not change the result. Softmax implies it; other may claim it."""
    exp_budget: ExpBudget = MEASURED_EXP
    """The error of the engine's exp."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.experts > MOST_EXPERTS:
            raise InputError(f"declaration: experts = {self.experts}, but at most {MOST_EXPERTS} was expected")
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
        """The format that the router computes in."""
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
        """The number of tokens that an expert takes of a batch of `tokens`."""
        if self.capacity is None:
            return tokens
        return self.capacity if isinstance(self.capacity, int) else self.capacity(tokens)
