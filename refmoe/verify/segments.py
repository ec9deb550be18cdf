"""A trace in pieces of layers: where it holds what a layer begins with, the layer is judged by itself.

The pieces need nothing of each other, so that they can be computed by several processes, and what is not in the trace
beyond its last tap need not be computed at all. Verdicts and figures are those of one pass over the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from refmoe.jobs.spread import result_of
from refmoe.policy.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.taps import layer_of
from refmoe.traces.trace import Run, Trace, read_trace
from refmoe.verify.passes import Pass
from refmoe.verify.subject import Findings, Subject

Key = tuple[str, str]


def needed(config: Config, present: Mapping[str, Set[str]]) -> range:
    """The layers up to the last one of which the trace holds anything; the head counts to the last layer."""
    last = 0
    for name in (name for names in present.values() for name in names):
        layer = layer_of(name)
        last = max(last, 0 if name == "embedding" else config.layers if layer is None else layer + 1)
    return range(max(last, 1))


def segments(config: Config, present: Mapping[str, Set[str]], recomputed: Set[Key] = frozenset()) -> list[range]:
    """Cut where the trace has a layer's output in every run, and the next layer may go on from it.

    present: per run its taps.   recomputed: taps that are not gone on from.
    """
    layers = needed(config, present)

    def starts(i: int) -> bool:
        tap = f"layers.{i - 1}.residual"
        return all(tap in names and (run, tap) not in recomputed for run, names in present.items())

    cuts = [0, *(i for i in layers if i and starts(i)), layers.stop]
    # what comes before the first tap of the trace, and is not gone on from, is nobody's business
    wanted = [range(a, b) for a, b in pairwise(cuts)]
    return [each for each in wanted if _has_taps(each, present, config)] or wanted[:1]


def _has_taps(layers: range, present: Mapping[str, Set[str]], config: Config) -> bool:
    def belongs(name: str) -> bool:
        layer = layer_of(name)
        if layer is None:
            return not layers.start if name == "embedding" else layers.stop == config.layers
        return layer in layers

    return any(belongs(name) for names in present.values() for name in names)


def merge(found: Sequence[Findings], runs: Sequence[Run]) -> Findings:
    """The findings of all segments, as one pass would have made them."""
    whole = Findings()
    for part in found:
        whole.tallies |= part.tallies
        whole.invalid |= part.invalid
        whole.open_choices |= part.open_choices
        whole.unbounded |= part.unbounded
        whole.decisions += part.decisions
        for kind, count in part.counts.items():
            whole.counts[kind] = whole.counts.get(kind, 0) + count
    order = {run.run: i for i, run in enumerate(runs)}
    whole.decisions.sort(key=lambda decision: (order[decision.run], decision.layer))
    return whole


@dataclass(frozen=True)
class Spread:
    """Where the segments of a trace are judged, and how a process elsewhere gets at the model."""

    executor: Executor
    source: Any
    """Names the model in a few words: has `load`, is hashable and can be sent."""


@dataclass(frozen=True)
class Work:
    """One segment for another process."""

    trace: Path
    source: Any
    runs: tuple[Run, ...]
    policy: Policy
    spreads: float
    recomputed: frozenset[Key]
    unrounded: bool
    layers: range


def judge_segment(work: Work) -> Findings:
    """In any process that can read the trace and the model."""
    loaded = _loaded(work.source)
    subject = Subject(loaded.config, loaded.parameters, work.runs)
    judging = Pass(_opened(work.trace), subject, work.policy, work.spreads, work.recomputed, work.unrounded)
    return judging.go(work.layers)


@lru_cache(maxsize=1)
def _loaded(source: Any) -> Any:
    return source.load()


@lru_cache(maxsize=1)
def _opened(path: Path) -> Trace:
    return read_trace(path)


def judge_all(
    trace: Trace, subject: Subject, policy: Policy, spreads: float, present: Mapping[str, Set[str]],
    recomputed: frozenset[Key], unrounded: bool, progress: Callable[[], None] | None, spread: Spread | None,
) -> Findings:  # fmt: skip
    """One pass over all that the trace has taps of, here, or each segment where `spread` says.

    Raises InputError when a worker process dies.
    """
    pieces = segments(subject.config, present, recomputed)
    if spread is None:
        layers = range(pieces[0].start, pieces[-1].stop)
        return Pass(trace, subject, policy, spreads, recomputed, unrounded, progress).go(layers)
    items = [
        Work(trace.path, spread.source, subject.runs, policy, spreads, recomputed, unrounded, each) for each in pieces
    ]
    found = []
    for future, each in [(spread.executor.submit(judge_segment, item), item) for item in items]:
        found.append(result_of(future))
        if progress is not None:
            for _ in range(len(each.layers) * len(subject.runs)):
                progress()
    return merge(found, subject.runs)
