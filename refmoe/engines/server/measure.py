# SPDX-License-Identifier: Apache-2.0
"""Measure the power of a server's evidence: each known bug is a server, and is judged by what it gives at each level.

A bug that a level shows is shown by every level that contains it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import PARALLEL, Mutant
from refmoe.bugs.quantised_checkpoint import INT8, quantised
from refmoe.bugs.sharded_mutant import ONE_DEVICE, on_ranks
from refmoe.engines.server.asking import ServerFault
from refmoe.engines.server.interview import GENERATED, PROMPT, Answers, Said, without
from refmoe.engines.server.judging import Model, judge
from refmoe.engines.server.kinds import Question
from refmoe.engines.server.power import CONTAINED, FEW, FORMAT_VERSION, LARGEST, LEVELS, PROMPTS, TOKENS
from refmoe.engines.server.prompts import COUNT, prompts
from refmoe.engines.server.served import served_case
from refmoe.engines.server.simulated import Simulated
from refmoe.engines.server.verdict import whole
from refmoe.profiles.load import policy as named_policy
from refmoe.steps.sharded.layout import layouts
from refmoe.suite.matrix.outcomes import POLICIES, setting
from refmoe.verifier.findings import NOT_CONFORMANT

SPECIFICATION = "-"
"""The name under which the specification itself is a server. It must be conformant at each level."""


@dataclass(frozen=True)
class Work:
    """A known bug, or `SPECIFICATION`, at a dtype."""

    mutant: str
    dtype: str


@lru_cache
def _prompts() -> list[tuple[int, ...]]:
    case = served_case()
    return prompts(case.config, case.checkpoint().parameters)


def said_by(server: Simulated) -> Answers:
    """The answers of a simulated server to the main questions."""
    answers = Answers()
    for tokens in _prompts():
        reply = server.ask(Question(tokens, COUNT))
        last = len(tokens) - 1
        answers.said.append(
            Said(
                way=GENERATED,
                tokens=tokens + reply.tokens[:-1],
                given=len(tokens),
                rows={last + i: row for i, row in reply.rows.items()},
                choices={last + i: token for i, token in enumerate(reply.tokens)},
            )
        )
        answers.said.append(Said(PROMPT, tokens, len(tokens), rows=dict(reply.prompt_rows)))
    return answers


def at_level(answers: Answers, level: str) -> Answers:
    """The answers of a server that gives no more than a level has."""
    if level == TOKENS:
        return without(answers, 0, rows=False)
    if level == LARGEST:
        return without(answers, FEW)
    if level == PROMPTS:
        return without(answers, served_case().config.vocab, generated=False)
    return answers


def seen_at(each: Work) -> list[str]:
    """The levels by which a bug is seen at a dtype, the least first."""
    case = served_case()
    if each.mutant == SPECIFICATION:
        rules, parameters = named_policy(each.dtype), case.checkpoint().parameters
        engines: Iterator[Mutant | None] = iter([None])
    else:
        rules, parameters = setting(each.mutant, case, each.dtype)
        engines = _engines(each.mutant)
    model = Model("case served", case.config, parameters, rules)
    right = _right(rules.name, "QUANT" in MUTANTS[each.mutant].needs if each.mutant in MUTANTS else False)
    seen: list[str] = []
    for engine in engines:
        try:
            answers = said_by(Simulated(engine, case.config, parameters, rules))
        except ServerFault:  # its log-probabilities are none
            return [*LEVELS]
        if engine is not None and answers.said == right.said:
            continue  # the bug changes nothing here
        for level in LEVELS:
            if (
                level in seen
                or any(less in seen for less in CONTAINED[level])
                or whole(judge(at_level(answers, level), model))[0] == NOT_CONFORMANT
            ):
                seen.append(level)
        if len(set(seen)) == len(LEVELS):
            break
    return [level for level in LEVELS if level in seen]


@lru_cache
def _right(policy: str, quantised_model: bool) -> Answers:
    """The answers of the specification, on the model or on the model whose matrices are quantised."""
    case = served_case()
    ground = case.checkpoint().parameters
    parameters = quantised(ground, INT8) if quantised_model else ground
    return said_by(Simulated(None, case.config, parameters, named_policy(policy)))


def _engines(name: str) -> Iterator[Mutant]:
    """The engines with a bug: one, or of a bug of sharded runs one for each layout of ranks."""
    mutant = MUTANTS[name]
    if mutant.changes != PARALLEL:
        yield mutant
        return
    for layout in layouts(served_case().config):
        if layout != ONE_DEVICE:
            yield on_ranks(mutant, layout)


def as_table(found: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    """The table of `power`. Raises ValueError where the specification itself is not conformant."""
    right = found.get(SPECIFICATION, {})
    if any(right.values()):
        raise ValueError(f"the specification is not conformant: {right}")
    known = [name for name in found if name != SPECIFICATION]
    return {
        "format_version": FORMAT_VERSION,
        "known": {dtype: [name for name in known if dtype in found[name]] for dtype in POLICIES},
        "seen": {
            level: {dtype: [name for name in known if level in found[name].get(dtype, ())] for dtype in POLICIES}
            for level in LEVELS
        },
    }
