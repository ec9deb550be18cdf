# SPDX-License-Identifier: Apache-2.0
"""A server of the specification, or of a mutant of it, without HTTP: its answers come from the exact arithmetic.

It says what the best server would say of this engine: whole distributions of prompt and generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refmoe.bugs.mutant import CALLS, Mutant
from refmoe.bugs.run_engine import run
from refmoe.engines.server.kinds import Question
from refmoe.engines.server.replies import Reply, Row, row
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Caches, Model, Parameters, forward
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.script import Call, plan


class Simulated:
    """An engine that is asked as a server is."""

    name = "simulated"
    model: str | None = None
    chooses_cache = False

    def __init__(self, mutant: Mutant | None, config: Config, parameters: Parameters, policy: Policy) -> None:
        """mutant: None: the specification"""
        self._mutant, self._config, self._parameters, self._policy = mutant, config, parameters, policy
        self._known: dict[tuple[tuple[int, ...], int], Reply] = {}

    def ask(self, question: Question) -> Reply:
        """The reply, of which equal questions are computed once."""
        key = question.tokens, question.count
        if key not in self._known:
            self._known[key] = self._reply(*key)
        return self._known[key]

    def ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        return [self.ask(each) for each in questions]

    def cancel(self, question: Question, seconds: float) -> None:
        """Nothing is there to be broken off."""

    def in_words(self) -> str:
        return "takes ids, gives whole distributions of prompt and generated tokens"

    def _reply(self, tokens: tuple[int, ...], count: int) -> Reply:
        made, rows = self._stepwise(tokens, count) if self._one_by_one else self._again(tokens, count)
        listed = [as_row(each) for each in self._read_out(rows)]
        last = len(tokens) - 1
        return Reply(
            tokens=made,
            rows={i - last: each for i, each in enumerate(listed) if i >= last},
            prompt_rows={i: each for i, each in enumerate(listed) if i < last},
        )

    @property
    def _one_by_one(self) -> bool:
        """Whether the engine may be given a token at a time. A mutant of the calls has to see all of them."""
        return self._mutant is None or self._mutant.changes != CALLS

    def _stepwise(self, tokens: tuple[int, ...], count: int) -> tuple[tuple[int, ...], Any]:
        """Greedy tokens, and the logits that they were chosen from, after those of the prompt: [T, V]."""
        if self._mutant is None:
            model, policy = Model(self._config, self._parameters, CUT_STEPS), self._policy
        else:
            model = self._mutant.model(self._config, self._parameters)
            policy = self._mutant.policy(self._policy)
        ops: Any = PolicyOps(policy)
        caches: Caches | None = None
        made: list[int] = []
        found, new, past = [], list(tokens), 0
        with np.errstate(all="ignore"):
            while len(made) < count:
                positions = ops.integers(range(past, past + len(new)))
                logits, caches = forward(ops, model, ops.integers(new), positions, caches)
                found.append(np.asarray(logits, np.float64))
                past += len(new)
                made.append(int(np.argmax(found[-1][-1])))
                new = made[-1:]
        return tuple(made), np.concatenate(found)

    def _again(self, tokens: tuple[int, ...], count: int) -> tuple[tuple[int, ...], Any]:
        """As `_stepwise`, where all calls are made again for each token."""
        made: tuple[int, ...] = ()
        while True:
            calls = [Call("prefill", 0, tokens), *([Call("decode", 0, made)] if made else [])]
            runs = plan(calls, self._config.vocab)
            trace = run(self._mutant, self._config, self._parameters, runs, self._policy)
            logits = np.concatenate([np.asarray(trace.get(each.run, "logits"), np.float64) for each in runs])
            made = (*made, int(np.argmax(logits[-1])))
            if len(made) == count:
                return made, logits

    def _read_out(self, logits: Any) -> Any:
        """The log-probabilities, [T, V]."""
        ops: Any = PolicyOps(self._policy)
        with np.errstate(all="ignore"):
            found = ops.cut("logprobs", ops.log_softmax(ops.cut("logprobs.softmax_input", logits)))
        return np.asarray(found, np.float32)


def as_row(values: Any) -> Row:
    """A row of the whole vocabulary, as it comes out of JSON.   values: [V]"""
    return row((token, float(value)) for token, value in enumerate(values))
