# SPDX-License-Identifier: Apache-2.0
"""Ops of an ideal run under a policy: operations exact to binary64, rounded to nearest at each cut point.

This is one legal run of the policy, whose only errors are those of storage. A real engine under the same policy also
rounds inside its operations. It differs in the few elements that lie close to the middle between two values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import StoredWeight, Tap
from refmoe.arithmetic.codes import InputFormat, quantise
from refmoe.arithmetic.exact import dot
from refmoe.arithmetic.exact.ops import PREPARED_BYTES, ExactOps
from refmoe.arithmetic.formats import FLOAT64, Format, nearest
from refmoe.arithmetic.turning import turn
from refmoe.profiles.cut_points import PROJECTIONS, ROW_PARALLEL, product_of
from refmoe.profiles.policy import STAGES, Policy
from refmoe.spec.softmax import softmax
from refmoe.steps.coded import coded_values, codes_of, groups_of, kept, turned
from refmoe.steps.rounding import cut_again
from refmoe.steps.sharded import block


class PolicyOps(ExactOps):
    """`ExactOps` with the cut points of a policy. Arrays are float64 that hold values of the cuts' dtypes.

    A tap receives the value in the dtype of its cut point. The run goes on with the value that the tap returns, such as
    an engine's own array.
    """

    def __init__(self, policy: Policy, tap: Tap | None = None, prepared_bytes: int = PREPARED_BYTES) -> None:
        """prepared_bytes: the memory for prepared weights that are kept for later calls"""
        super().__init__(tap, prepared_bytes=prepared_bytes)
        self.policy = policy

    def cut(self, name: str, x: Any) -> Any:
        if name in self.policy.kept:
            return kept(self.policy, name, x, coded_values)
        return nearest(x, self.policy.at(name))

    def turned(self, cut: str, x: Any) -> Any:
        dtype = np.float32 if self.policy.turn == STAGES else np.float64
        return turned(self.policy, cut, x, lambda heads, block: turn(heads, block, dtype))

    def tap(self, name: str, x: Any) -> Any:
        if x.dtype.kind != "f":
            return super().tap(name, x)
        return self.array(super().tap(name, self.cut(name, x).astype(self.policy.at(name).dtype)))

    # ---- parameters, as the engine holds them

    def vector(self, weight: StoredWeight) -> Any:
        return self._held(weight.read())

    def embed(self, table: StoredWeight, ids: Any) -> Any:
        return self._held(table.rows(ids))

    def linear(self, x: Any, weight: StoredWeight) -> Any:
        step, coded, read = product_of(weight), codes_of(self.policy, weight), self.policy.input_of(weight)
        if isinstance(read, Format):
            x = nearest(x, read)
        elif step is not None and coded is None:
            ops: Any = self
            x = cut_again(ops, f"{step}.input", PROJECTIONS[step][1], x)
        if self.policy.ranks == 1 or step not in ROW_PARALLEL:
            return self._times_weight(x, weight) if coded is None else self._times_codes(x, weight, coded)
        shares = (block(x.shape[-1], self.policy.ranks, rank) for rank in range(self.policy.ranks))
        terms = [self._share(x, weight, coded, share) for share in shares if share]
        total = terms[0]
        for term in terms[1:]:
            total = self.cut("rank.partial", total + term)
        return total

    def _share(self, x: Any, weight: Any, coded: InputFormat | None, share: range) -> Any:
        """The part of a product that one rank has."""
        columns = slice(share.start, share.stop)
        if coded is not None:
            alone = np.zeros(x.shape)
            alone[..., columns] = x[..., columns]
            return self.cut("rank.partial", self._times_codes(alone, weight, coded))
        prepared = dot.prepare(self._held(weight.read())[:, columns])
        return self.cut("rank.partial", dot.linear(x[..., columns], prepared))

    def _times_codes(self, x: Any, weight: Any, coded: InputFormat) -> Any:
        """x [..., n] times the transpose of a quantised matrix, as if no sum of codes times scales rounded."""
        groups = groups_of(weight)

        def prepare() -> dot.PreparedWeight:
            made = weight.factors(0, weight.shape[0])
            joined = np.concatenate([made.terms, made.offsets], axis=-1) if groups else made.terms
            return dot.prepare(joined.astype(np.float64))

        codes = quantise(x.reshape(-1, x.shape[-1]), coded)
        left = np.concatenate([codes.values, codes.sums(groups)], axis=-1) if groups else codes.values
        made = dot.linear(left, self._prepared.get(weight, prepare, lambda made: made.nbytes))
        return made.reshape(*x.shape[:-1], -1)

    def _times_weight(self, x: Any, weight: StoredWeight) -> Any:
        def prepare() -> dot.PreparedWeight:
            stored = weight.read()
            held = stored if stored.dtype == self.policy.at("weights").dtype else self._held(stored)
            return dot.prepare(held)

        return dot.linear(x, self._prepared.get(weight, prepare, lambda made: made.nbytes))

    def _held(self, stored: Any) -> Any:
        return self.cut("weights", self.array(stored))

    # ---- the operations of the steps with cut points

    def softmax(self, x: Any, mask: Any | None) -> Any:
        ops: Any = self
        return softmax(ops, x, mask)

    def log_softmax(self, x: Any) -> Any:
        shifted = x - self.max(x, axis=-1)[..., None]
        total = self.cut("logprobs.sum", self.sum(self.exp(shifted), axis=-1))
        return shifted - self.cut("logprobs.sum", np.log(total))[..., None]

    def silu(self, x: Any) -> Any:
        return self.cut("expert.silu", x * self.cut("expert.sigmoid", self.sigmoid(x)))

    def top_k(self, x: Any, k: int) -> Any:
        """The top-k by stored logits, or by stored probabilities. Of equal ones the lower index comes first."""
        return super().top_k(self._probs(x) if self._softmax_first else x, k)

    def weigh(self, logits: Any, experts: Any) -> Any:
        if not self._softmax_first:
            return self.softmax(self.gather(logits, experts), None)
        chosen = self.gather(self._probs(logits), experts)
        return chosen / self.cut("router.probs", self.sum(chosen, axis=-1))[:, None]

    def accumulate(self, x: Any, axis: int) -> Any:
        ranks = self.policy.ranks > 1
        if self.policy.at("combine.partial") == FLOAT64 and not ranks:
            return self.sum(x, axis)  # no partial sum is rounded, so the sum is exact in any order
        first, *others = (x.take(i, axis) for i in range(x.shape[axis]))
        total = first
        for i, term in enumerate(others):
            total = (total if i == 0 else self.cut("combine.partial", total)) + term
            total = self.cut("rank.partial", total) if ranks else total
        return total

    @property
    def _softmax_first(self) -> bool:
        return self.policy.router_order == "softmax-then-top-k"

    def _probs(self, logits: Any) -> Any:
        """Softmax over all experts. logits: [T, E]   returns: [T, E]"""
        return self.cut("router.probs", self.softmax(self.cut("router.softmax_input", logits), None))
