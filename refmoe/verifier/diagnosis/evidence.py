# SPDX-License-Identifier: Apache-2.0
"""A failed trace, and its checks against a changed specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np

from refmoe.arithmetic.arrays import Tap
from refmoe.arithmetic.codes import InputFormat, quantise
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import FLOAT64, Format
from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.bugs.forced_rounding import rounded
from refmoe.bugs.quantised.coarse_sums import CoarseSums, added_up
from refmoe.bugs.quantised_checkpoint import QuantisedWeight, SmoothedGain
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.rows import RowWeight
from refmoe.checkpoints.size import total_parameters
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.cut_points import ACCUMULATION_CUTS, CUT_POINTS, RANK_CUTS
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.spec.taps import layer_of, step_of
from refmoe.steps.coded import groups_of, parts_of, quantises
from refmoe.steps.enclosure_ops import MATRIX_BYTES, EnclosureOps
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.diagnosis.fit import within_own_rounding
from refmoe.verifier.diagnosis.observed import Observed, Recorded, Recording, observe
from refmoe.verifier.diagnosis.prediction import WEIGHT_BYTES, PlainOps, Prediction
from refmoe.verifier.findings import FAIL, FORCED, PASS, UNDECIDABLE, Check, Report
from refmoe.verifier.free_running import Replica
from refmoe.verifier.intake import Contents, take_in
from refmoe.verifier.passes import Key, Reading
from refmoe.verifier.routing import Routing, consistent, valid
from refmoe.verifier.segments import needed, segments
from refmoe.verifier.subject import Subject
from refmoe.verifier.tally import Limits
from refmoe.verifier.verify import apply_second_pass, assemble

MOST_HELD = 1 << 25
"""The most parameters of a model whose stored values are all kept in memory."""


class Variation(Protocol):
    """A changed specification that a trace can be held against: a mutant, other arithmetic, or two of them at once."""

    @property
    def touches(self) -> tuple[str, ...]: ...
    def model(self, config: Config, parameters: Parameters) -> Model: ...
    def policy(self, policy: Policy) -> Policy: ...
    def runs(self, runs: tuple[Run, ...]) -> tuple[Run, ...]: ...


@dataclass(frozen=True)
class Part:
    """A part of the trace that can be judged by itself: some runs and layers, and the taps in them."""

    runs: tuple[Run, ...]
    layers: range
    present: Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Evidence:
    """A failed trace, its report, and the enclosures of the specification at its taps."""

    trace: Trace
    right: Subject
    policy: Policy
    contents: Contents
    limits: Limits
    report: Report
    failed: tuple[Check, ...]
    observed: dict[Key, Observed] = field(default_factory=dict)
    """The taps of the trace, in order of computation, run by run."""
    weights: dict[Any, WeightCache] = field(default_factory=dict)
    """Prepared weights that passes share, by the rounding that prepared them."""

    @cached_property
    def expected(self) -> dict[Key, Any]:
        """Exact results from the trace's own inputs, at the first failed tap of each step, in the tap's shape."""
        firsts = {check.step: (check.run, check.tap) for check in reversed(self.failed)}
        wanted = {key for step, key in firsts.items() if step != "router.experts"}
        found = middle(self, self.right, self.policy, wanted)
        return {key: array for key, array in found.items() if self.trace.get(*key).shape == array.shape}

    @cached_property
    def whole(self) -> Part:
        """All that the trace has taps of."""
        present = self.contents.present
        return Part(self.contents.runs, needed(self.right.config, present), present)

    @cached_property
    def first(self) -> Part:
        """The runs up to the first one with a failed check, and the layers of that check from the nearest tap on."""
        check, config = self.failed[0], self.right.config
        runs = until(self.contents.runs, {check.run})
        present = {run.run: self.contents.present[run.run] for run in runs}
        layer = check.layer if check.layer is not None else 0 if check.tap == "embedding" else config.layers - 1
        layers = next((piece for piece in segments(config, present) if layer in piece), self.whole.layers)

        def inside(tap: str) -> bool:
            at = layer_of(tap)
            if at is None:
                return not layers.start if tap == "embedding" else layers.stop == config.layers
            return at in layers

        return Part(runs, layers, {run: frozenset(filter(inside, taps)) for run, taps in present.items()})

    @cached_property
    def wrong_values(self) -> int:
        """The number of wrong values of the failed checks. A wrong choice of experts counts as one."""
        return sum(int(self.observed[key].wrong.sum()) for key in self.keys(self.whole))

    def keys(self, part: Part) -> tuple[Key, ...]:
        """The failed taps in a part."""
        failed = ((check.run, check.tap) for check in self.failed)
        return tuple(key for key in failed if key[1] in part.present.get(key[0], ()) and key in self.observed)


@np.errstate(all="ignore")
def gather(
    trace: Trace, config: Config, parameters: Parameters, runs: tuple[Run, ...] | None, policy: Policy, report: Report,
    kept: Recording | None = None,
) -> Evidence:  # fmt: skip
    """The evidence of a trace that has failed.   kept: the first pass of the verification, with its enclosures"""
    contents = take_in(trace, config, runs)
    limits = Limits(report.significance, contents.values, contents.tensors)
    right = Subject(config, held(config, parameters), contents.runs)
    failed = tuple(check for check in report.checks if check.verdict == FAIL)
    evidence = Evidence(
        trace=contents.trace, right=right, policy=policy, contents=contents, limits=limits, report=report, failed=failed
    )
    judging = kept
    if judging is not None:
        evidence.weights[_preparation(policy)] = judging.ops.matrices
    else:
        judging = Recording(contents.trace, replace(right, ops=ops_under(evidence, policy)), policy, limits)
        judging.go(evidence.whole.layers)
    checks = assemble(judging.findings, contents, config, policy, limits, makes_codes(policy, parameters))
    taps = observe(judging.recorded(), policy, limits.excess, checks, report.checks)
    return replace(evidence, observed=taps | _choices(contents.trace, config, report))


def held(config: Config, parameters: Parameters) -> Parameters:
    """The parameters, each read once and kept, unless there are too many. Most causes read all of them again."""
    if total_parameters(config) > MOST_HELD:
        return parameters

    more = QuantisedWeight | SmoothedGain | RowWeight  # they have more than their values

    def kept(owner: Any) -> Any:
        weights = {
            name: Weight(
                name=each.name, shape=each.shape, dtype=each.dtype, source=cache(each.read), origin=each.origin
            )
            for name, each in vars(owner).items()
            if isinstance(each, Weight) and not isinstance(each, more)
        }
        return replace(owner, **weights)

    layers = (replace(kept(layer), experts=tuple(map(kept, layer.experts))) for layer in parameters.layers)
    whole: Parameters = replace(kept(parameters), layers=tuple(layers))
    return whole


def middle(evidence: Evidence, subject: Subject, policy: Policy, wanted: set[Key]) -> dict[Key, Any]:
    """The results of exact arithmetic at the wanted taps, from the trace's own inputs."""
    subject = replace(subject, runs=until(subject.runs, {run for run, _ in wanted}))
    with np.errstate(all="ignore"):
        return Exact(evidence.trace, subject, policy, wanted=wanted, draw=None).arrays()


class Exact(Replica):
    """A replica without any rounding. It replaces a choice of experts that is invalid by the right one."""

    def _tap(self, name: str, x: Any) -> Any:
        chosen = super()._tap(name, x)
        if step_of(name) != "router.experts":
            return chosen
        return np.where(valid(chosen, self.subject.config.experts)[:, None], chosen, x)


class UnderBug(Recording):
    """A pass under a bug. The bug may produce infinities and NaN, so every overflow is allowed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ops.events.append("bug")


class Chooser(UnderBug):
    """A pass under a bug that chooses experts by another rule. The choice of that rule is the legal one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._chosen_by: tuple[Any, Any] | None = None
        ops: Any = self.ops
        choose = ops.top_k

        def top_k(scores: Any, k: int) -> Any:
            ids = choose(scores, k)
            self._chosen_by = scores, ids
            return ids

        ops.top_k = top_k

    def _choose(self, name: str, expected: Any) -> Any:
        found = self._found(name)
        if found is None:
            return super()._choose(name, expected)
        zeros = np.zeros(len(found))
        legal = (np.sort(found, axis=-1) == np.sort(expected, axis=-1)).all(axis=-1)
        if self._chosen_by is not None and np.array_equal(self._chosen_by[1], expected):
            # the ids are a top-k of the scores: where scores are equal, or rounding can exchange two, either is legal
            scores = self._chosen_by[0].settle()
            legal |= consistent(scores.mid - scores.r, scores.mid + scores.r, found)
        forced = np.full(len(found), FORCED)
        routing = Routing(expected=expected, kind=forced, legal=legal, margin=zeros, movable=zeros, found=found)
        self._record(self._run.run, name, routing)
        self._unknown = None
        return found

    def _found(self, name: str) -> Any:
        """The trace's choice, integers [T, k]. None if the trace has none, or one with invalid ids."""
        if name not in self._present:
            return None
        found = np.asarray(self._read(name, "router.experts")).astype(np.int64)
        return found if valid(found, self.subject.config.experts).all() else None


def subject_of(evidence: Evidence, variation: Variation) -> Subject:
    """The specification with the variation."""
    right = evidence.right
    model = variation.model(right.config, right.parameters)
    return Subject(model.config, model.parameters, variation.runs(evidence.contents.runs), model.steps)


def makes_codes(policy: Policy, parameters: Parameters) -> bool:
    """Whether products make codes of their inputs, as `verify` asks."""
    return bool(policy.inputs) and quantises(policy, named_weights(parameters).values())


def until(runs: tuple[Run, ...], names: Set[str]) -> tuple[Run, ...]:
    """The runs up to the last one with one of these names."""
    last = max((i for i, run in enumerate(runs) if run.run in names), default=len(runs) - 1)
    return runs[: last + 1]


# ---- arithmetic that passes share


FACTORS = "factors"
"""The key of quantised matrices among the prepared weights."""
NO_VALUE = {"weights", *RANK_CUTS, *ACCUMULATION_CUTS}
"""The cut points that are not forced. Weights are rounded anyway. The others depend on an order or a layout that no
policy tells, so that no value can be predicted."""


def forced_cuts(right: Policy, changed: Policy) -> frozenset[str]:
    """The cut points that the changed policy stores more coarsely. An engine of that policy rounds there every time.

    A router that now takes the softmax first loses the probabilities that underflow.
    """
    if changed is right:
        return frozenset()
    coarser = (name for name in CUT_POINTS if name not in NO_VALUE and not changed.at(name).holds(right.at(name)))
    first = changed.router_order != right.router_order
    return frozenset([*coarser, *["router.probs"] * first])


class ForcingOps(EnclosureOps):
    """Enclosures whose midpoints are rounded at some cut points, as an engine that stores them so rounds them."""

    def __init__(
        self, policy: Policy, tap: Tap | None, forced: frozenset[str], matrices: WeightCache, factors: WeightCache
    ) -> None:
        super().__init__(policy, tap)
        self._forced, self.matrices, self.factors = forced, matrices, factors

    def cut(self, name: str, x: Any) -> Any:
        if name not in self._forced:
            return super().cut(name, x)
        made = super().cut(name, rounded(x, self.policy.at(name)))
        return made

    def _times_codes(self, x: Enclosure, weight: Any, coded: InputFormat, step: str | None) -> Enclosure:
        made = super()._times_codes(x, weight, coded, step)
        if not isinstance(coded, CoarseSums):
            return made
        codes = quantise(x.mid.reshape(-1, x.shape[-1]), coded)
        variance = [added_up(codes, groups_of(weight), part, coded)[1] for part in parts_of(weight, self.factors)]
        more = np.concatenate(variance, axis=-1).reshape(made.shape)
        return Enclosure(made.mid, made.r, made.v + more, accumulation=made.accumulation)


def ops_under(evidence: Evidence, policy: Policy) -> Callable[..., EnclosureOps]:
    """Enclosures under a policy, with the cut points that it changes forced, and with shared weights."""
    matrices = WeightCache(MATRIX_BYTES)
    if _accumulators(policy) == _accumulators(evidence.policy):  # else matrices are prepared for other products
        matrices = evidence.weights.setdefault(_preparation(policy), matrices)
    forced = forced_cuts(evidence.policy, policy)
    factors = factors_of(evidence)
    return lambda used, tap: ForcingOps(policy=used, tap=tap, forced=forced, matrices=matrices, factors=factors)


def factors_of(evidence: Evidence) -> WeightCache:
    """Quantised matrices as engines multiply them, which no policy changes."""
    return evidence.weights.setdefault(FACTORS, WeightCache(MATRIX_BYTES))


def _preparation(policy: Policy) -> tuple[Format, bool]:
    """The rounding of the weights, and whether products are those of an engine in float64."""
    return policy.at("weights"), policy.accumulation.precision == 53 or policy.storage.precision == 53


def _accumulators(policy: Policy) -> dict[str, Format]:
    """The dtypes of products that have their own."""
    return {name: policy.at(name) for name in ACCUMULATION_CUTS if name in policy.cuts}


def predict(
    evidence: Evidence,
    variation: Variation,
    part: Part,
    wanted: frozenset[str] | None = None,
    rounds: bool = False,
) -> dict[Key, Any]:
    """The predictions of a variation at the taps of a part, as `Prediction` keeps them.

    wanted: the steps to keep, in the trace or not; None: all steps that the trace has
    rounds: whether values are rounded at every cut point, as in an ideal engine
    """
    subject, policy = subject_of(evidence, variation), variation.policy(evidence.policy)
    weights = evidence.weights.setdefault(policy.at("weights"), WeightCache(WEIGHT_BYTES))
    forced = frozenset(CUT_POINTS) if rounds else forced_cuts(evidence.policy, policy)
    factors = factors_of(evidence)

    def ops(used: Policy, tap: Tap | None) -> Any:
        return PlainOps(policy=used, tap=tap, forced=forced, weights=weights, factors=factors)

    names = {run.run for run in part.runs}
    subject = replace(subject, runs=until(subject.runs, names), ops=ops)
    judging = Prediction(evidence.trace, subject, policy, wanted)
    judging.go(part.layers)
    return judging.values()


# ---- verdicts


@dataclass(frozen=True)
class Judged:
    """The checks of a trace, or of a part of it, against a changed specification, and its enclosures."""

    checks: list[Check]
    recorded: dict[Key, Recorded]

    @property
    def verdicts(self) -> dict[Key, str]:
        return {(check.run, check.tap): check.verdict for check in self.checks}


def judge_part(
    evidence: Evidence, part: Part, subject: Subject, policy: Policy, judge: Callable[..., Recording] = UnderBug
) -> Judged:
    """The checks of a part against a changed specification or policy, with the same second passes as in `verify`.

    The order of the second passes is reversed: unrounded inputs come first, because only they can change the verdict
    of the first failed check. If it fails still, the last pass is left out. Other checks may then keep a FAIL that the
    last pass would change.
    """
    names = {run.run for run in part.runs}
    subject = replace(subject, runs=until(subject.runs, names), ops=ops_under(evidence, policy))
    coded = makes_codes(policy, evidence.right.parameters)  # a sharded model has other records of parameters
    contents = replace(evidence.contents, runs=part.runs, present=dict(part.present))
    recorded: dict[Key, Recorded] = {}

    def checked(reading: Reading) -> list[Check]:
        judging = judge(evidence.trace, subject, policy, evidence.limits, reading)
        found = judging.go(part.layers)
        if not recorded:
            recorded.update(judging.recorded())
        return assemble(found, contents, evidence.right.config, policy, evidence.limits, coded)

    checks = first = checked(Reading())
    failed = frozenset((check.run, check.tap) for check in checks if check.verdict == FAIL)
    if failed and policy.consumers == "unrounded":
        checks = apply_second_pass(checks, checked(Reading(unrounded=True)), "")
    if failed and not _stays(evidence, first, checks):
        checks = apply_second_pass(checks, checked(Reading(recomputed=failed)), "")
    return Judged(checks, recorded)


def _stays(evidence: Evidence, first: list[Check], checks: list[Check]) -> bool:
    """Whether the first failed check counts and still fails. Its inputs passed, so recomputing them changes nothing.

    first: the checks before any second pass
    """
    at = next(i for i, check in enumerate(first) if check.verdict == FAIL)
    before = {(check.run, check.tap): check.verdict for check in evidence.report.checks}
    return before[first[at].run, first[at].tap] in (PASS, FAIL) and checks[at].verdict == FAIL


def still_failing(
    evidence: Evidence, verdicts: dict[Key, str], predicted: Mapping[Key, Any], ideal: Mapping[Key, Any]
) -> int:
    """The number of failed checks that were judged again and still fail.

    A check may have no bound under a bug that makes values that are not finite, or where rounding decides the choice
    of experts. The bug then explains the check if it predicts its values, up to what its own rounding makes.

    predicted: the predictions of the changed specification   ideal: those of an engine that rounds at every cut point
    """
    count = 0
    for check in evidence.failed:
        key = (check.run, check.tap)
        if key not in verdicts or verdicts[key] == PASS:
            continue
        seen = verdicts[key] == UNDECIDABLE and key in evidence.observed
        count += not (seen and within_own_rounding(evidence.observed, key, predicted, ideal))
    return count


def newly_failing(evidence: Evidence, verdicts: dict[Key, str]) -> int:
    """The number of passed checks, in all calls, that were judged again and now fail."""
    passed = (check for check in evidence.report.checks if check.verdict == PASS)
    return sum(verdicts.get((check.run, check.tap)) == FAIL for check in passed)


def changes_choice(variation: Variation) -> bool:
    """Whether the variation chooses experts by another rule."""
    return "router.experts" in variation.touches


def _choices(trace: Trace, config: Config, report: Report) -> dict[Key, Observed]:
    """The choices of experts in the trace that failed."""
    illegal = {(d.run, d.layer, d.token) for d in report.decisions if not d.legal}
    taps = {}
    for check in report.checks:
        if check.step != "router.experts" or check.verdict != FAIL:
            continue
        found = np.asarray(trace.get(check.run, check.tap)).astype(np.int64)
        wrong = np.array([(check.run, check.layer, token) in illegal for token in range(len(found))])
        ids = np.sort(found, axis=-1)
        taps[check.run, check.tap] = Observed(
            found=ids,
            mid=ids,
            variance=np.zeros(ids.shape),
            format=FLOAT64,
            read=np.ones(len(ids), bool),
            wrong=wrong | ~valid(found, config.experts),
            passes=False,
            as_stored=True,
        )
    return taps
