# SPDX-License-Identifier: Apache-2.0
"""The verdict on a running server: find its kind, ask it, judge its answers, and explain what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.engines.judge import in_words
from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.server.asking import Client, ServerFault
from refmoe.engines.server.interview import BROKEN_LAW, Answers, Broken, Interview
from refmoe.engines.server.judging import OPEN, Judgement, Model, by_way, judge
from refmoe.engines.server.kinds import LLAMA, TRANSFORMERS, Kind, Question, find_kind, version_of
from refmoe.engines.server.power import level_of, power_of
from refmoe.engines.server.prompts import COUNT, LENGTHS, prompts
from refmoe.profiles.policy import Policy
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT, Explanation, Power

FAULTS = (CRASHED, TIMED_OUT, BROKEN)
POLICIES = {LLAMA: {"float32": "llama.cpp-float32"}, TRANSFORMERS: {"float32": "hf-float32", "bfloat16": "hf-bfloat16",
            "float16": "hf-float16"}}  # fmt: skip
"""Per kind and dtype the policy that describes a server of this kind. Elsewhere it is the one of the dtype's name."""


@dataclass(frozen=True)
class Verdict:
    """Everything about a server."""

    verdict: str
    """``conformant``, ``not conformant``, ``cannot judge``, or one of `FAULTS`."""
    reason: str
    """One sentence."""
    kind: str
    gives: str
    """All that the server takes and gives, in words."""
    policy: Policy
    answers: Answers
    judgement: Judgement
    level: str
    """One of `power.LEVELS`."""
    power: Power
    explanations: tuple[Explanation, ...] | None = None
    """The explanations of wrong log-probabilities, best first. None: none were looked for."""
    notes: tuple[str, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()
    version: str = ""
    """Of the server; empty where it says none."""


@dataclass(frozen=True)
class Asking:
    """A server to be asked, and how."""

    client: Client
    wanted: str | None = None
    """Its kind, None: found by asking."""
    model_name: str | None = None
    """The name of the model in requests; None: the first that the server lists."""
    diagnose: bool = True
    progress: Callable[[], None] = field(default=lambda: None)
    """Called after each way of asking."""
    lengths: Sequence[int] = LENGTHS
    """The tokens of each prompt."""
    count: int = COUNT
    """The tokens to generate after each."""


def examine(asking: Asking, model: Model, policy_for: Callable[[str], Policy]) -> Verdict:
    """The verdict on a server.

    policy_for: the policy by which a kind of server is judged; that of `model` is not used
    Raises InputError where it is no server of a known kind. Any other failure of the server is a verdict.
    """
    drawn = prompts(model.config, model.parameters, asking.lengths)
    first = Question(drawn[0], asking.count)
    try:
        found = find_kind(asking.client, model.config.vocab, first, asking.wanted, asking.model_name)
    except ServerFault as fault:
        nothing = Answers(broken=[Broken("the first request", fault.kind, fault.reason)], alive=False)
        return concluded(nothing, replace(model, policy=policy_for(asking.wanted or "")), asking, None)
    model = replace(model, policy=policy_for(found.kind.name))
    interview = Interview(
        client=asking.client, kind=found.kind, prompts=drawn, count=asking.count, end=model.config.vocab - 1
    )
    answers = interview.go(asking.progress)
    verdict = concluded(answers, model, asking, found.kind)
    version = version_of(asking.client) if answers.alive else ""
    again = asking.client.again
    resent = [f"{again} of {asking.client.requests} requests had to be sent again"] if again else []
    notes = (*found.said, *resent, *verdict.notes)
    return replace(verdict, notes=notes, prompts=tuple(drawn), version=version)


def concluded(answers: Answers, model: Model, asking: Asking, kind: Kind | None) -> Verdict:
    """The verdict on answers.   kind: of the server, None where it gave no answer at all"""
    judgement = judge(answers, model)
    verdict, reason = whole(judgement)
    level = level_of(answers, model.config.vocab)
    explanations, notes = None, [f"{way}: not offered: {why}" for way, why in answers.refused.items()]
    if asking.diagnose and judgement.report is not None and judgement.report.verdict == NOT_CONFORMANT:
        try:
            explanations = explain(judgement, model)
        except Exception as error:  # of whatever kind: the values are a stranger's
            notes.append(f"refmoe could not explain it: {in_words(error)}")
    return Verdict(
        verdict=verdict,
        reason=reason,
        kind="" if kind is None else kind.name,
        gives="" if kind is None else kind.in_words(),
        policy=model.policy,
        answers=answers,
        judgement=judgement,
        level=level,
        power=power_of(level, model.policy),
        explanations=explanations,
        notes=tuple(notes),
    )


def whole(judgement: Judgement) -> tuple[str, str]:
    """The verdict over all, and its reason in a sentence."""
    laws = [each for each in judgement.broken if each.kind == BROKEN_LAW]
    faults = [each for each in judgement.broken if each.kind in FAULTS]
    report, wrong = judgement.report, judgement.wrong
    if report is not None and report.verdict == NOT_CONFORMANT:
        return NOT_CONFORMANT, report.headline.partition(": ")[2]
    if wrong:
        worst = max(wrong, key=lambda each: each.gap)
        return NOT_CONFORMANT, (
            f"{len(wrong)} of {len(judgement.tokens)} tokens are wrong: {worst.way}, after {len(worst.before)} tokens "
            f"it gives {worst.found}, but {worst.expected} is larger by {worst.gap:.3g} in log-probability"
        )
    if laws:
        return NOT_CONFORMANT, f"{laws[0].way}: {laws[0].reason}"
    if faults:
        return faults[0].kind, f"{faults[0].way}: {faults[0].reason}"
    counts = judgement.counted()
    bounded = len(judgement.tokens) - counts[OPEN]
    if report is not None and report.verdict == CANNOT_JUDGE:
        return CANNOT_JUDGE, report.headline.partition(": ")[2]
    if 2 * bounded <= len(judgement.tokens):
        return CANNOT_JUDGE, f"{counts[OPEN]} of {len(judgement.tokens)} tokens have no bound"
    values = "" if report is None else f", and {sum(each.values for each in report.checks)} log-probabilities"
    return CONFORMANT, f"{bounded} of {len(judgement.tokens)} tokens{values} were judged, and all are legal"


def explain(judgement: Judgement, model: Model) -> tuple[Explanation, ...]:
    """The known bugs and structures that explain wrong log-probabilities."""
    from refmoe.verifier.diagnosis import diagnose

    report, trace = judgement.report, judgement.trace
    assert report is not None
    assert trace is not None
    found = diagnose(trace, model.config, model.parameters, None, model.policy, report, MUTANTS.values())
    return tuple(each for each in found if each.explains)


# ---- as plain values


def facts(found: Verdict) -> dict[str, Any]:
    """The verdict as plain values."""
    judgement, report = found.judgement, found.judgement.report
    return {
        "verdict": found.verdict,
        "reason": found.reason,
        "kind": found.kind,
        "version": found.version,
        "gives": found.gives,
        "policy": found.policy.name,
        "level": found.level,
        "power": {
            "seen": found.power.seen, "known": found.power.known, "dtype": found.power.dtype,
            "unseen": [*found.power.unseen],
        },
        "ways": {
            way: {"rows": rows, "tokens": tokens, "right": right}
            for way, (rows, tokens, right) in by_way(judgement, found.answers.said).items()
        },
        "tokens": judgement.counted(),
        "wrong_tokens": [
            {"way": each.way, "before": [*each.before], "found": each.found, "expected": each.expected, "gap": each.gap}
            for each in judgement.wrong
        ],
        "broken": [{"way": each.way, "kind": each.kind, "reason": each.reason} for each in judgement.broken],
        "log_probabilities": None if report is None else {
            "verdict": report.verdict, "values": sum(each.values for each in report.checks),
            "undecided": sum(each.undecided for each in report.checks),
            "first_wrong": None if report.first_wrong is None else report.first_wrong[0],
        },
        "explanations": None if found.explanations is None else [
            {"name": each.name, "kind": each.kind, "about": each.about, "fix": each.fix, "sources": [*each.sources]}
            for each in found.explanations
        ],
        "notes": [*found.notes],
    }  # fmt: skip
