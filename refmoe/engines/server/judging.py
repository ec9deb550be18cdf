# SPDX-License-Identifier: Apache-2.0
"""The answers of a server, judged: its log-probabilities as the tap ``logprobs``, and each token by itself.

A token is judged given the server's own tokens before it. Two healthy servers may part at a token that rounding can
decide, and both are right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Tap
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.engines.server.interview import BROKEN_LAW, PROMPT, Answers, Broken, Said
from refmoe.engines.server.replies import Row
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.spec.taps import IDS, LOGPROBS
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.suite.free_pass import FreePass
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Header, Run, Trace
from refmoe.verifier import ranking
from refmoe.verifier.findings import CONFORMANT, CONTESTABLE, FAIL, FORCED, NOT_CONFORMANT, TIE, Report
from refmoe.verifier.intake import take_in
from refmoe.verifier.routing import sharper
from refmoe.verifier.segments import SIGNIFICANCE, Settings
from refmoe.verifier.subject import Subject
from refmoe.verifier.tally import Limits
from refmoe.verifier.verify import verify

WRONG, OPEN = "wrong", "no bound"
TOKEN_VERDICTS = {
    FORCED: "the only token that rounding allows",
    TIE: "one of several that are equal in exact arithmetic",
    CONTESTABLE: "one of several that rounding can make the largest",
    OPEN: "rounding can decide the choice of an expert before it, so that any token is possible",
    WRONG: "no rounding that the policy allows makes it the largest",
}
"""The verdicts on a generated token, and what each means."""


@dataclass(frozen=True)
class Token:
    """The verdict on a generated token."""

    way: str
    before: tuple[int, ...]
    """The tokens before it."""
    found: int
    expected: int
    """The token of exact arithmetic."""
    verdict: str
    """One of `TOKEN_VERDICTS`."""
    gap: float
    """By how much its log-probability is below that of the largest, in exact arithmetic."""


@dataclass(frozen=True)
class Model:
    """The model that a server serves, and the rules that it is judged by."""

    name: str
    """In words, such as ``case served``."""
    config: Config
    parameters: Parameters
    policy: Policy
    significance: float = SIGNIFICANCE


@dataclass(frozen=True)
class Judgement:
    """Everything about the answers of a server."""

    tokens: tuple[Token, ...]
    rows: int
    """The number of rows of log-probabilities that the server gave."""
    open_rows: int
    """Of these, the rows without a bound, because rounding can decide the choice of an expert before them."""
    report: Report | None
    """The verification of its log-probabilities, None where it gave none."""
    trace: Trace | None
    """The log-probabilities that were verified."""
    broken: tuple[Broken, ...]
    """The laws that it breaks and the requests that failed."""

    @property
    def wrong(self) -> tuple[Token, ...]:
        """The wrong tokens."""
        return tuple(each for each in self.tokens if each.verdict == WRONG)

    def counted(self) -> dict[str, int]:
        """The number of tokens with each verdict."""
        return {name: sum(each.verdict == name for each in self.tokens) for name in TOKEN_VERDICTS}


def judge(answers: Answers, model: Model) -> Judgement:
    """Judge all answers of a server."""
    bounds = Bounds(answers.said, model)
    broken, said = list(answers.broken), bounded(answers.said, bounds)
    open_rows = sum(len(each.rows) for each in answers.said) - sum(len(each.rows) for each in said)
    trace = trace_of(said, model)
    report = None if trace is None else verified(trace, model)
    if report is not None and report.verdict == NOT_CONFORMANT:
        moved = one_position_off(said, model)
        if moved:
            broken.insert(0, Broken(PROMPT, BROKEN_LAW, moved))  # entries that are missing at the end come of it
            said = [each for each in said if each.way != PROMPT]
            trace = trace_of(said, model)
            report = None if trace is None else verified(trace, model)
            if report is not None and report.verdict == NOT_CONFORMANT:
                # an echo lists generated tokens after those of the prompt, and they are off as well
                said, trace, report = [replace(each, rows={}) for each in said], None, None
    return Judgement(
        tokens=tuple(tokens_of(answers.said, bounds)),
        rows=sum(len(each.rows) for each in answers.said),
        open_rows=open_rows,
        report=report,
        trace=trace,
        broken=tuple(broken),
    )


def bounded(said: Sequence[Said], bounds: Bounds) -> list[Said]:
    """The answers with those rows only that have a bound."""
    return [
        replace(each, rows={place: row for place, row in each.rows.items() if bounds.at(each.tokens, place).bounded})
        for each in said
    ]


def verified(trace: Trace, model: Model) -> Report:
    """The report on log-probabilities."""
    settings = Settings(model.significance, ops=partial(SharpOps, spreads_of(trace, model)))
    return verify(trace, model.name, model.config, model.parameters, None, model.policy, settings)


def spreads_of(trace: Trace, model: Model) -> float:
    """The standard deviations that count as certain in a verification of a trace."""
    contents = take_in(trace, model.config, None)
    return Limits(model.significance, contents.values, contents.tensors).excess


class SharpOps(EnclosureOps):
    """Enclosures whose log-softmax reads logits that err by so many standard deviations at most.

    A server gives nothing before its logits, so their proven radius covers the whole model. It is often infinite, and a
    log-softmax of it has no bound at all. The choice of an expert is judged with the same limit.
    """

    def __init__(self, spreads: float, policy: Policy, tap: Tap | None = None) -> None:
        super().__init__(policy, tap)
        self._spreads = spreads

    def log_softmax(self, x: Enclosure) -> Enclosure:
        """The log-softmax over the last axis. x: [T, V]"""
        return super().log_softmax(sharper(x.settle(), self._spreads))


# ---- log-probabilities


def trace_of(said: Sequence[Said], model: Model) -> Trace | None:
    """The log-probabilities as a trace: a sequence for each text and way of asking. None where there are none.

    A row of the whole vocabulary is in its order, and any other one has its ids beside it.
    """
    runs: list[Run] = []
    arrays: dict[str, Any] = {}
    for number, each in enumerate(each for each in said if each.rows):
        entries = min(len(row.ids) for row in each.rows.values())
        for start, stop, there in calls(each):
            op = "prefill" if not start else "chunk"
            name = f"{each.way} {number + 1} from {start}"
            positions = tuple(range(start, stop))
            tokens = each.tokens[start:stop]
            runs.append(Run(run=name, op=op, sequence=number, tokens=tokens, positions=positions, past=start))
            if there:
                rows = [each.rows[place].first(entries) for place in positions]
                arrays |= {f"{name}/{tap}": array for tap, array in _arrays(rows, model.config.vocab).items()}
    if not arrays:
        return None
    return held_trace(Header(tuple(runs), policy=model.policy.name, producer={"name": "server"}), arrays, "the server")


def calls(said: Said) -> list[tuple[int, int, bool]]:
    """The calls of a text: first token, the token after the last one, and whether it has rows.

    A text is cut where rows begin or end. Generated tokens are one call, as a call and its pieces compute the same.
    """
    last = max(said.rows)
    cuts = [place for place in range(1, last + 1) if (place in said.rows) != (place - 1 in said.rows)]
    bounds = [0, *cuts, last + 1]
    return [(a, b, a in said.rows) for a, b in pairwise(bounds)]


def _arrays(rows: Sequence[Row], vocab: int) -> dict[str, Any]:
    """The taps of some rows with equally many entries. Servers print a float32 without loss."""
    ids, values = np.array([row.ids for row in rows]), np.array([row.values for row in rows])
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if ids.shape[1] < vocab:
        return {LOGPROBS: values, IDS: ids.astype(np.int64)}
    whole = np.empty_like(values)
    np.put_along_axis(whole, ids, values, axis=-1)
    return {LOGPROBS: whole}


def one_position_off(said: Sequence[Said], model: Model) -> str:
    """Whether the rows of prompts are wrong as the API defines them, and right a position away.

    returns: a sentence that says so; empty where they are right, or wrong in both places
    """
    asked = [each for each in said if each.way == PROMPT]
    trace = trace_of(asked, model)
    if trace is None or verified(trace, model).verdict != NOT_CONFORMANT:
        return ""
    moved = [
        replace(each, rows={i + 1: row for i, row in each.rows.items() if i + 1 < len(each.tokens)}) for each in asked
    ]
    trace = trace_of(moved, model)
    if trace is None or verified(trace, model).verdict != CONFORMANT:
        return ""
    return (
        "the log-probabilities of a prompt are one position off: those listed for a token are the right ones after it, "
        "but those before it were expected"
    )


# ---- tokens


class LogitsPass(FreePass):
    """A pass over texts alone, which keeps the enclosure of their logits."""

    def __init__(self, subject: Subject, policy: Policy, limits: Limits) -> None:
        super().__init__(subject, policy, limits)
        self._anchored = set()  # a server may count positions from any start
        self.kept: dict[str, list[Any]] = {}
        self.mid: dict[str, list[Any]] = {}

    def _read_out(self, logits: Any) -> None:
        ops: Any = self.ops
        mid, shape = ops.log_softmax(logits).mid, logits.shape
        settled = logits.settle()
        parts = (np.broadcast_to(part, shape) for part in (settled.mid, settled.r, settled.v))
        self.kept.setdefault(self._run.run, []).append(Enclosure(*parts, accumulation=self.policy.accumulation))
        self.mid.setdefault(self._run.run, []).append(mid)


class Bounds:
    """The legal tokens after each token of the texts that a server has answered to. Equal texts are computed once."""

    def __init__(self, said: Sequence[Said], model: Model) -> None:
        asked = [each for each in said if each.choices or each.rows]
        texts = list(dict.fromkeys(each.tokens[: max([*each.choices, *each.rows]) + 1] for each in asked))
        # a text that begins another one needs no pass of its own
        self._texts = [
            text for text in texts if not any(text == other[: len(text)] and text != other for other in texts)
        ]
        runs = [
            Run(run=f"text {i}", op="prefill", sequence=i, tokens=text, positions=tuple(range(len(text))), past=0)
            for i, text in enumerate(self._texts)
        ]
        self._policy = model.policy
        self._logits: dict[int, Enclosure] = {}
        self._mid: dict[int, Any] = {}
        if runs:
            values = sum(map(len, self._texts)) * model.config.vocab
            limits = Limits(model.significance, values, len(runs))
            self._spreads = limits.excess
            computed = LogitsPass(Subject(model.config, model.parameters, tuple(runs)), model.policy, limits)
            computed.go()
            for i, run in enumerate(runs):
                blocks = computed.kept[run.run]
                parts = (np.concatenate([getattr(each, part) for each in blocks]) for part in ("mid", "r", "v"))
                self._logits[i] = Enclosure(*parts, accumulation=model.policy.accumulation)
                self._mid[i] = np.concatenate(computed.mid[run.run])

    def at(self, tokens: tuple[int, ...], place: int) -> Place:
        """The legal tokens after `tokens[: place + 1]`, which begin one of the texts."""
        wanted = tokens[: place + 1]
        text = next(i for i, text in enumerate(self._texts) if text[: place + 1] == wanted)
        return Place(self._logits[text][place : place + 1], self._mid[text][place], self._policy, self._spreads)


@dataclass(frozen=True)
class Place:
    """The legal tokens after some tokens."""

    logits: Enclosure
    """[1, V]"""
    mid: Any
    """The log-probabilities of exact arithmetic, [V]."""
    policy: Policy
    spreads: float

    @property
    def bounded(self) -> bool:
        """Whether any entry has a bound."""
        return bool(np.isfinite(sharper(self.logits, self.spreads).r).any())

    def legal(self, token: int) -> bool:
        """Whether rounding can make a token the largest."""
        return not ranking.judge(self.logits, self.mid[None], np.array([[token]]), self.policy, self.spreads, 0).swaps

    def verdict(self, token: int) -> str:
        """The verdict on a token: one of `TOKEN_VERDICTS`."""
        best, second = self.order[0], self.order[min(1, len(self.order) - 1)]
        if not self.bounded:
            return OPEN
        if not self.legal(token):
            return WRONG
        other = second if token == best else best
        if other == token or not self.legal(other):
            return FORCED
        return TIE if self.mid[token] == self.mid[other] else CONTESTABLE

    @property
    def order(self) -> list[int]:
        """The two largest tokens of exact arithmetic."""
        return [int(token) for token in np.argsort(-self.mid, kind="stable")[:2]]


def tokens_of(said: Sequence[Said], bounds: Bounds) -> list[Token]:
    """The verdicts on all generated tokens."""
    found = []
    for each in said:
        for at, token in sorted(each.choices.items()):
            place = bounds.at(each.tokens, at)
            best = place.order[0]
            found.append(
                Token(
                    way=each.way,
                    before=each.tokens[: at + 1],
                    found=token,
                    expected=best,
                    verdict=place.verdict(token),
                    gap=float(place.mid[best] - place.mid[token]),
                )
            )
    return found


def by_way(judgement: Judgement, said: Sequence[Said]) -> Mapping[str, tuple[int, int, bool]]:
    """Per way of asking: the number of rows, the number of tokens, and whether all of them are right."""
    failed = set()
    if judgement.report is not None:
        failed = {check.run.rpartition(" from ")[0] for check in judgement.report.checks if check.verdict == FAIL}
    wrong = {each.way for each in judgement.wrong} | {each.way for each in judgement.broken}
    wrong |= {name.rpartition(" ")[0] for name in failed}
    found: dict[str, tuple[int, int, bool]] = {}
    for each in said:
        rows, tokens, _ = found.get(each.way, (0, 0, True))
        found[each.way] = rows + len(each.rows), tokens + len(each.choices), each.way not in wrong
    return found
