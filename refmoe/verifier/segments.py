# SPDX-License-Identifier: Apache-2.0
"""A trace cut into segments of layers. A new segment begins wherever the trace holds the input of a layer.

Segments do not depend on each other, so that several processes can judge them. Layers after the last tap of the trace
are not computed. Verdicts and figures are the same as those of one pass over the whole model.
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
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.taps import layer_of
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.traces.pieces import by_pieces
from refmoe.traces.trace import Run, Trace, read_trace
from refmoe.verifier.passes import Key, Pass, Reading
from refmoe.verifier.subject import Findings, Subject
from refmoe.verifier.tally import Limits


def needed(config: Config, present: Mapping[str, Set[str]]) -> range:
    """The layers up to the last one that has a tap in the trace. The head belongs to the last layer."""
    last = 0
    for name in (name for names in present.values() for name in names):
        layer = layer_of(name)
        last = max(last, 0 if name == "embedding" else config.layers if layer is None else layer + 1)
    return range(max(last, 1))


def segments(config: Config, present: Mapping[str, Set[str]], recomputed: Set[Key] = frozenset()) -> list[range]:
    """The segments. A cut lies after each layer whose output is in the trace, in every run.

    present: the taps of each run   recomputed: taps that later steps must not read, so that no cut lies there
    """
    layers = needed(config, present)

    def starts(i: int) -> bool:
        tap = f"layers.{i - 1}.residual"
        return all(tap in names and (run, tap) not in recomputed for run, names in present.items())

    cuts = [0, *(i for i in layers if i and starts(i)), layers.stop]
    # a segment without taps is not needed, because the next segment starts from the trace
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
    """The findings of all segments in one, as a single pass would have made them."""
    whole = Findings()
    for part in found:
        whole.tallies |= part.tallies
        whole.invalid |= part.invalid
        whole.rankings |= part.rankings
        whole.open_choices |= part.open_choices
        whole.unbounded |= part.unbounded
        whole.decisions += part.decisions
        whole.codes |= part.codes
        for kind, count in part.counts.items():
            whole.counts[kind] = whole.counts.get(kind, 0) + count
    order = {run.run: i for i, run in enumerate(runs)}
    whole.decisions.sort(key=lambda decision: (order[decision.run], decision.layer))
    return whole


@dataclass(frozen=True)
class Spread:
    """The processes that judge segments, and the source from which they load the model."""

    executor: Executor
    source: Any
    """A short name of the model: has `load`, is hashable and can be pickled."""


SIGNIFICANCE = 1e-6
"""The probability that a healthy engine fails somewhere in a whole verification is less than this."""


@dataclass(frozen=True)
class Settings:
    """The way a verification runs. Only the significance can change a verdict."""

    significance: float = SIGNIFICANCE
    progress: Callable[[], None] | None = None
    """Called after each layer of each run, in each pass."""
    ops: Callable[..., EnclosureOps] = EnclosureOps
    """The enclosure arithmetic, as in `Subject`."""
    spread: Spread | None = None
    """The processes that judge layers side by side; None: this process judges one layer after the other."""
    passes: Callable[..., Pass] = Pass
    """Makes the passes of this process. A diagnosis keeps the enclosures of the first one."""


@dataclass(frozen=True)
class Work:
    """One segment to judge in another process. The trace is named by its path, the model by its source."""

    trace: Path
    source: Any
    runs: tuple[Run, ...]
    policy: Policy
    limits: Limits
    reading: Reading
    layers: range


def judge_segment(work: Work) -> Findings:
    """The findings of one segment, in any process that can read the trace and the model."""
    loaded = _loaded(work.source)
    subject = Subject(loaded.config, loaded.parameters, work.runs)
    judging = Pass(_opened(work.trace, loaded.config), subject, work.policy, limits=work.limits, reading=work.reading)
    return judging.go(work.layers)


@lru_cache(maxsize=1)
def _loaded(source: Any) -> Any:
    return source.load()


@lru_cache(maxsize=1)
def _opened(path: Path, config: Config) -> Trace:
    trace = read_trace(path)
    return by_pieces(trace, trace.runs, config)[0]


def judge_all(
    trace: Trace,
    subject: Subject,
    policy: Policy,
    limits: Limits,
    present: Mapping[str, Set[str]],
    reading: Reading,
    settings: Settings,
) -> Findings:
    """The findings of all segments: in one pass in this process, or one by one in the processes of `settings.spread`.

    Raises InputError when a worker process dies.
    """
    pieces = segments(subject.config, present, reading.recomputed)
    spread, progress = settings.spread, settings.progress
    if spread is None:
        layers = range(pieces[0].start, pieces[-1].stop)
        return settings.passes(trace, subject, policy, limits, reading, progress).go(layers)
    items = [
        Work(
            trace=trace.path,
            source=spread.source,
            runs=subject.runs,
            policy=policy,
            limits=limits,
            reading=reading,
            layers=each,
        )
        for each in pieces
    ]
    # the longest first, so that no process is left alone with one at the end; the head makes the last one longer
    order = sorted(range(len(items)), key=lambda i: (len(pieces[i]), i), reverse=True)
    futures = {i: spread.executor.submit(judge_segment, items[i]) for i in order}
    found = []
    for i, piece in enumerate(pieces):
        found.append(result_of(futures[i]))
        if progress is not None:
            for _ in range(len(piece) * len(subject.runs)):
                progress()
    return merge(found, subject.runs)
