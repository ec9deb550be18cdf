# SPDX-License-Identifier: Apache-2.0
"""Reports made by hand, which together have every kind of finding that a report can show."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import inf, nan

from refmoe.spec.taps import LAYER_TAPS
from refmoe.verifier.findings import (
    CANNOT_JUDGE,
    CONFORMANT,
    CONTESTABLE,
    FAIL,
    FORCED,
    FREE,
    KNOWN_BUG,
    LOCAL,
    NOT_CONFORMANT,
    PASS,
    REPLAYED,
    TIE,
    UNDECIDABLE,
    Check,
    ContestableCode,
    Decision,
    Element,
    Explanation,
    Report,
)

HOSTILE = "<script>document.title='owned'</script>\"'&amp;]]>{{ 7*7 }}[bold]:smile:\x1b[31m\x00\u202e\ud800"
"""A name full of syntax: tags, entities, templates, markup, control characters."""

WRONG = "layers.0.router.logits"


def taps(layers: int) -> list[str]:
    """The taps of one call, in order of computation."""
    inner = [f"layers.{i}.{step}" for i in range(layers) for step in LAYER_TAPS]
    return ["embedding", *inner, "final_norm", "logits"]


def passing(run: str, tap: str, spread: int) -> Check:
    """A check that passes, with a number that depends on its place."""
    error, excess = 0.9 * ((7 * spread + 3) % 31) / 31, 5.0 * ((11 * spread + 5) % 29) / 29
    return Check(
        run=run,
        tap=tap,
        since=(),
        rung=LOCAL,
        verdict=PASS,
        reason="",
        values=128,
        undecided=0,
        outside=0,
        worst_error=error,
        excess=excess,
        excess_limit=12.1,
        rms=0.5,
        rms_limit=nan,
        truncation=0.01,
        truncation_snr=3.0,
    )


def decision(run: str, layer: int, token: int) -> Decision:
    """A legal decision. Some are ties, some are contestable, and some contestable ones deviate."""
    kind = TIE if (5 * layer + token) % 23 == 7 else CONTESTABLE if (3 * layer + token) % 17 == 4 else FORCED
    expected = ((token + layer) % 8, (token + 3 * layer + 5) % 8)
    found = (expected[1], (expected[0] + 1) % 8) if kind == CONTESTABLE and token % 2 else expected
    margin = {FORCED: 0.21, TIE: 0.0, CONTESTABLE: 0.002}[kind]
    return Decision(
        run=run,
        layer=layer,
        token=token,
        kind=kind,
        legal=True,
        found=found,
        expected=expected,
        margin=margin,
        movable=0.004,
    )


def conformant(layers: int = 2, runs: int = 3, tokens: int = 16) -> Report:
    """The report of a healthy engine with every tap."""
    names = ["prefill", *(f"decode{i}" for i in range(1, runs))]
    checks = [passing(run, tap, i + 13 * r) for r, run in enumerate(names) for i, tap in enumerate(taps(layers))]
    spans = {run: tokens if run == "prefill" else max(1, tokens // 16) for run in names}
    decisions = [decision(run, i, t) for run in names for i in range(layers) for t in range(spans[run])]
    headline = "Every value is one that bfloat16 can produce, and every token went to experts that it may go to."
    return Report(
        trace="traces/engine.safetensors",
        subject="case walking-skeleton",
        producer="transformers 5.23.0",
        policy="bfloat16",
        significance=1e-6,
        verdict=CONFORMANT,
        headline=headline,
        checks=tuple(checks),
        decisions=tuple(decisions),
    )


def code(number: int, found: float | None) -> ContestableCode:
    """A code between 45 and 46.   found: the engine's"""
    return ContestableCode(
        run="prefill", tap="layers.0.attention_norm", where=(number, 41), product="layers.0.attention.v",
        format="q8_k", ideal=45.4999977, rule=45.0, other=46.0, found=found,
    )  # fmt: skip


def quantised() -> Report:
    """The report of a healthy engine with quantised matrices, four of whose codes rounding alone decides."""
    found = (45.0, 46.0, None, 46.0)
    codes = tuple(code(i, each) for i, each in enumerate(found))
    return replace(conformant(), policy="llama.cpp-quantised", codes=codes)


def failing(layers: int = 2, runs: int = 3, tokens: int = 16) -> Report:
    """Wrong router logits and their consequences, an improbable step, and an undecidable step."""
    report = conformant(layers, runs, tokens)
    impossible = Element(where=(11, 7), found=0.523, expected=0.3125, low=0.3115, high=0.3135, sigma=0.00021)
    slot = Element(where=(11, 1, 63), found=-1.75, expected=-1.7265625, low=-inf, high=inf, sigma=0.00075)
    score = Element(where=(3, 11, 5), found=0.51, expected=0.5, low=0.49, high=0.512, sigma=0.002)
    changed = {
        ("prefill", WRONG): {
            "verdict": FAIL, "outside": 3, "worst_error": 214.0, "excess": 1003.0, "worst": impossible,
            "since": ("layers.0.moe_norm",), "reason": "3 of 128 values lie outside, the worst by 214 times its radius",
        },
        ("prefill", "layers.0.expert.output"): {
            "verdict": FAIL, "worst_error": 0.0, "excess": 31.2, "worst": slot, "rung": REPLAYED,
            "since": ("layers.0.moe_norm", "layers.0.router.experts"),
            "reason": "the worst value lies 31.2 standard deviations away, the limit is 12.1",
        },
        ("prefill", "layers.1.attention.scores"): {
            "verdict": FAIL, "outside": 0, "worst_error": 0.8, "excess": 44.0, "worst": score,
            "reason": "the worst value lies 44 standard deviations away, the limit is 12.1",
        },
        ("decode1", "layers.1.residual"): {
            "verdict": UNDECIDABLE, "undecided": 128, "worst_error": 0.0, "excess": 0.0, "excess_limit": 0.0,
            "rung": FREE, "reason": "no value has a finite bound over a segment this long",
        },
    }  # fmt: skip
    checks = tuple(replace(check, **changed.get((check.run, check.tap), {})) for check in report.checks)  # type: ignore[arg-type]
    wrong = Decision(
        run="prefill",
        layer=0,
        token=11,
        kind=FORCED,
        legal=False,
        found=(2, 5),
        expected=(2, 7),
        margin=0.031,
        movable=0.004,
    )
    decisions = tuple(wrong if (d.run, d.layer, d.token) == ("prefill", 0, 11) else d for d in report.decisions)
    return replace(
        report,
        verdict=NOT_CONFORMANT,
        headline="layers.0.router.logits of run prefill holds values that bfloat16 cannot produce.",
        checks=checks,
        decisions=decisions,
        first_wrong=("prefill", WRONG),
        missing=("attention.q_rope", "expert.hidden"),
        unknown=("prefill/layers.0.rotary.cos",),
        explanations=(
            Explanation(
                name="router-input-unnormalised",
                kind=KNOWN_BUG,
                about="The gate reads the residual.",
                fix="feed the norm to the gate",
                sources=("https://example.org/1",),
                explains=True,
                still_failing=0,
                newly_failing=0,
                coefficient=1.02,
                residual=0.01,
                touches=2,
            ),
        ),
        notes=("The accumulator of the down projection: to judge it, expert.hidden would have to be in the trace.",),
    )


def undecidable() -> Report:
    """A trace in which nothing could be decided, not even the routing."""
    reason = "no bound is finite: layers.0.moe_norm would have to be in the trace"
    checks = (
        Check(
            run="prefill",
            tap="logits",
            since=("embedding",),
            rung=FREE,
            verdict=UNDECIDABLE,
            reason=reason,
            values=32,
            undecided=32,
            outside=0,
            worst_error=0.0,
            excess=0.0,
        ),
    )
    choices = tuple(
        Decision(
            run="prefill",
            layer=i,
            token=t,
            kind=CONTESTABLE,
            legal=True,
            found=(),
            expected=(0, 1),
            margin=0.1,
            movable=inf,
        )
        for i in (0, 1)
        for t in (0, 1)
    )
    return Report(
        trace="logits.safetensors",
        subject="checkpoint",
        producer="engine",
        policy="bfloat16",
        significance=1e-6,
        verdict=CANNOT_JUDGE,
        headline="Nothing could be decided.",
        checks=checks,
        decisions=choices,
        notes=("Only the logits are in the trace.",),
    )


def empty() -> Report:
    """A trace without taps."""
    headline = "The trace holds no tap that the specification knows."
    return Report(
        trace="empty.safetensors",
        subject="case square",
        producer="",
        policy="float32",
        significance=1e-6,
        verdict=CANNOT_JUDGE,
        headline=headline,
        unknown=("x",),
    )


def hostile() -> Report:
    """Names and sentences that look like code."""
    element = Element(where=(0, 0), found=nan, expected=1.0, low=0.5, high=1.5, sigma=nan)
    tap = f"layers.0.{HOSTILE}"
    bad = Check(
        run=HOSTILE,
        tap=tap,
        since=(HOSTILE,),
        rung=LOCAL,
        verdict=FAIL,
        reason=HOSTILE,
        values=1,
        undecided=0,
        outside=1,
        worst_error=inf,
        excess=inf,
        excess_limit=12.0,
        worst=element,
    )
    other = replace(bad, tap=HOSTILE, verdict=UNDECIDABLE)
    sources = ("javascript:alert(1)", f"https://example.org/{HOSTILE}", "https://example.org/fine?a=1&b=2")
    cause = Explanation(
        name=HOSTILE,
        kind=KNOWN_BUG,
        about=HOSTILE,
        fix=HOSTILE,
        sources=sources,
        explains=True,
        still_failing=0,
        newly_failing=0,
        coefficient=nan,
        residual=nan,
    )
    choice = Decision(
        run=HOSTILE, layer=0, token=0, kind=FORCED, legal=False, found=(0, 1), expected=(2, 3), margin=1.0, movable=0.1
    )
    return Report(
        trace=HOSTILE,
        subject=HOSTILE,
        producer=HOSTILE,
        policy=HOSTILE,
        significance=1e-6,
        verdict=NOT_CONFORMANT,
        headline=HOSTILE,
        checks=(bad, other),
        decisions=(choice,),
        codes=(replace(code(0, 46.0), run=HOSTILE, tap=tap, product=HOSTILE, format=HOSTILE),),
        first_wrong=(HOSTILE, tap),
        missing=(HOSTILE,),
        unknown=(HOSTILE,),
        notes=(HOSTILE,),
        explanations=(cause,),
    )


def not_finite() -> Report:
    """Checks with NaN or infinity in every field that can hold them, in every combination."""
    elements = (
        Element(where=(0, 1), found=nan, expected=0.0, low=-inf, high=inf, sigma=nan),
        Element(where=(0, 1), found=inf, expected=1.0, low=0.9, high=1.1, sigma=0.1),
        Element(where=(0, 1), found=-inf, expected=nan, low=nan, high=nan, sigma=inf),
        Element(where=(0, 1), found=0.0, expected=inf, low=inf, high=inf, sigma=0.0),
        None,
    )
    amounts = (nan, nan, nan), (inf, inf, inf), (0.0, 0.0, 0.0), (inf, 3.0, 12.0), (nan, inf, 12.0), (0.5, nan, 0.0)
    checks = tuple(
        Check(
            run="prefill",
            tap=tap,
            since=(),
            rung=LOCAL,
            verdict=verdict,
            reason="why",
            values=2,
            undecided=1,
            outside=0,
            worst_error=error,
            excess=excess,
            excess_limit=limit,
            rms=nan,
            rms_limit=nan,
            truncation=nan,
            truncation_snr=inf,
            worst=element,
        )
        for tap, verdict, (error, excess, limit), element in zip(
            taps(1),
            (FAIL, UNDECIDABLE, PASS, FAIL) * 6,
            amounts * 4,
            elements * 5,
            strict=False,
        )
    )
    choice = Decision(
        run="prefill",
        layer=0,
        token=0,
        kind=CONTESTABLE,
        legal=True,
        found=(1, 0),
        expected=(0, 1),
        margin=nan,
        movable=inf,
    )
    return replace(failing(), checks=checks, decisions=(choice,), first_wrong=("prefill", "embedding"))


@cache
def large() -> Report:
    """56 layers, 40 runs and 100 000 decisions, some of them wrong."""
    report = conformant(layers=56, runs=40, tokens=1)
    decisions = [decision("prefill", i, t) for i in range(56) for t in range(1786)]
    decisions[70_000] = replace(decisions[70_000], legal=False, found=(0, 1), expected=(2, 3), kind=FORCED)
    wrong = ("decode17", "layers.31.attention.q_rope")
    checks = tuple(
        replace(c, verdict=FAIL, outside=1, worst_error=80.0, reason="1 of 128 values lies outside")
        if (c.run, c.tap) == wrong
        else c
        for c in report.checks
    )
    headline = "layers.31.attention.q_rope of run decode17 holds a value that bfloat16 cannot produce."
    return replace(
        report,
        checks=checks,
        decisions=tuple(decisions),
        verdict=NOT_CONFORMANT,
        headline=headline,
        first_wrong=wrong,
    )


@cache
def all_wrong() -> Report:
    """A large report in which everything fails. Every list must have an end."""
    report = large()
    checks = tuple(
        replace(c, verdict=FAIL, outside=1, worst_error=3.0 + i % 97, reason=f"{i} values lie outside")
        for i, c in enumerate(report.checks)
    )
    decisions = tuple(replace(d, legal=d.token % 2 == 0) for d in report.decisions)
    codes = tuple(code(i, 46.0) for i in range(7000))
    return replace(report, checks=checks, decisions=decisions, codes=codes, first_wrong=("prefill", "embedding"))


SMALL = {make.__name__: make for make in (conformant, quantised, failing, undecidable, empty, hostile, not_finite)}
SAMPLES = SMALL | {"large": large, "all_wrong": all_wrong}
