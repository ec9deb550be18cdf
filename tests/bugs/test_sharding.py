# SPDX-License-Identifier: Apache-2.0
"""The sharded run is the specification (SHARD-1 to SHARD-12), and its known bugs are seen wherever they can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.run_engine import same
from refmoe.bugs.sharded_mutant import OnRanks, on_ranks
from refmoe.errors import InputError
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.config import PRESETS, Config
from refmoe.spec.model import Model
from refmoe.spec.taps import step_of
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.steps.sharded import Layout, block, layouts, shard
from refmoe.steps.sharded.parameters import SplitTable
from refmoe.steps.sharded.steps import all_reduce, attention_partials, received
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder, Trace
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from tests.bugs.judging import (
    DTYPES,
    case_named,
    cases_aimed_at,
    diagnosed,
    explained,
    first_wrong_step,
    judged,
    parameters_of,
    traced,
)
from tests.models import SMALL, random_parameters

U = 2.0**-53
TWELVE_HEADS = Config(
    dim=24, layers=2, heads=12, kv_heads=3, head_dim=4, hidden_dim=20, vocab=31, experts=5, experts_per_token=2,
)  # fmt: skip
FITTING = [pytest.param(layout, id=str(layout)) for layout in layouts(SMALL)]


def run_sharded(name: str, layout: Layout, dtype: str, rules: Policy | None = None) -> Trace:
    """The trace of a golden case over the ranks of a layout."""
    case, rules, recorder = case_named(name), rules or policy(dtype), Recorder()
    execute(PolicyOps(rules, recorder), shard(case.config, parameters_of(name), layout), case.runs(), recorder)
    return held_trace(Header(case.runs(), None, None, rules.name), recorder.arrays)


# ---- who holds what


@pytest.mark.parametrize(("count", "holders"), [(8, 1), (8, 2), (5, 2), (80, 3), (7, 7), (3, 5)])
def test_blocks_are_contiguous_and_of_even_size(count: int, holders: int) -> None:
    """SHARD-2."""
    blocks = [block(count, holders, holder) for holder in range(holders)]
    assert [thing for each in blocks for thing in each] == [*range(count)]
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize("config", [SMALL, TWELVE_HEADS, *PRESETS.values()], ids=["small", "twelve", *PRESETS])
def test_a_rank_holds_the_heads_that_its_query_heads_read_and_no_others(config: Config) -> None:
    """SHARD-3, SHARD-4."""
    share = config.heads // config.kv_heads
    tried = [*layouts(config, (1, 2, 3, 4, 6, 8, 12, 16))]
    assert any(layout.tensor > config.kv_heads for layout in tried)
    for layout in tried:
        ranks = range(layout.tensor)
        queries = [layout.query_heads(config, rank) for rank in ranks]
        assert [head for each in queries for head in each] == [*range(config.heads)]
        for rank, heads in zip(ranks, queries, strict=True):
            assert [*layout.kv_heads(config, rank)] == sorted({head // share for head in heads})
        copies = [
            len([rank for rank in ranks if head in layout.kv_heads(config, rank)]) for head in range(config.kv_heads)
        ]
        assert set(copies) == {max(1, layout.tensor // config.kv_heads)}


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(5, 1), "TP = 5 does not divide heads = 12"),
        (Layout(2, 1), "neither of TP = 2 and kv_heads = 3"),
        (Layout(1, 6), "EP = 6 leaves groups without an expert"),
        (Layout(0, 1), "at least one rank"),
    ],
)
def test_a_layout_that_a_model_does_not_fit_is_refused(layout: Layout, words: str) -> None:
    with pytest.raises(InputError, match=words):
        shard(TWELVE_HEADS, random_parameters(TWELVE_HEADS, 1), layout)


@pytest.mark.parametrize("layout", FITTING)
def test_the_parts_put_together_are_the_parameters(layout: Layout) -> None:
    """SHARD-1, SHARD-5, SHARD-6, SHARD-10."""
    whole = random_parameters(SMALL, 1)
    model: Any = shard(SMALL, whole, layout)
    for layer, sharded in zip(whole.layers, model.parameters.layers, strict=True):
        ranks = sharded.attention
        assert len(ranks) == layout.tensor
        np.testing.assert_array_equal(np.concatenate([rank.wq.read() for rank in ranks]), layer.wq.read())
        np.testing.assert_array_equal(np.concatenate([rank.wo.read() for rank in ranks], axis=1), layer.wo.read())
        keys = layer.wk.read().reshape(SMALL.kv_heads, SMALL.head_dim, SMALL.dim)
        for rank in ranks:
            np.testing.assert_array_equal(rank.wk.read().reshape(-1, SMALL.head_dim, SMALL.dim), keys[rank.kv_heads])
            assert rank.wk.shape == rank.wk.read().shape
        assert len(sharded.experts) == layout.expert
        ids = [group.first + local for group in sharded.experts for local in range(len(group.experts))]
        assert ids == [*range(SMALL.experts)]
        for group in sharded.experts:
            for local, parts in enumerate(group.experts):
                expert = layer.experts[group.first + local]
                for name, axis in (("w1", 0), ("w3", 0), ("w2", 1)):
                    joined = np.concatenate([getattr(part, name).read() for part in parts], axis=axis)
                    np.testing.assert_array_equal(joined, getattr(expert, name).read())


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_table_over_ranks_answers_like_the_table(ranks: int) -> None:
    """SHARD-8, in a storage dtype."""
    table = parameters_of("edge-tokens").embedding
    split = SplitTable(table, ranks)
    ids = np.array([0, 1, 2, table.shape[0] - 1, 7, 2, 26, 27])
    assert split.rows(ids).dtype == table.rows(ids).dtype
    np.testing.assert_array_equal(split.rows(ids), table.rows(ids))
    np.testing.assert_array_equal(split.read(), table.read())


# ---- what is computed


@pytest.mark.parametrize("name", ["walking-skeleton", "batch-ragged"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dealing_experts_and_tokens_changes_no_bit(name: str, dtype: str) -> None:
    """SHARD-9, SHARD-11: with one rank in a group nothing is summed over ranks."""
    for layout in layouts(case_named(name).config, (1,)):
        assert same(run_sharded(name, layout, dtype), traced(None, name, dtype)), layout


@pytest.mark.parametrize("layout", [Layout(2, 1), Layout(8, 2)], ids=str)
def test_a_group_routes_its_own_tokens_as_all_are_routed(layout: Layout) -> None:
    """SHARD-9: block by block, the mixture of experts gives the rows that it gives for all tokens at once."""
    case, ops = case_named("mini-8x7b"), PolicyOps(policy("float64"))
    model: Any = shard(case.config, parameters_of("mini-8x7b"), layout)
    x = np.random.default_rng(1).standard_normal((7, case.config.dim))
    layer = model.parameters.layers[0]
    blocks = [x[[*block(7, layout.expert, group)]] for group in range(layout.expert)]
    apart = [model.steps.moe(ops, model, layer, rows) for rows in blocks]
    np.testing.assert_array_equal(np.concatenate(apart), model.steps.moe(ops, model, layer, x))


def test_each_slot_goes_to_the_one_group_that_holds_its_expert() -> None:
    """SHARD-10, SHARD-11."""
    model: Any = shard(SMALL, random_parameters(SMALL, 1), Layout(1, 2))
    chosen = np.array([[4, 0], [1, 2], [2, 4]])
    sent = [[slots.tolist() for slots in received(group, chosen)] for group in model.parameters.layers[0].experts]
    assert sent == [[[1], [2]], [[3, 4], [], [0, 5]]]


def test_copies_of_a_head_are_equal_and_cached_on_each_rank() -> None:
    """SHARD-12."""
    ops: Any = PolicyOps(policy("float64"))
    model: Any = shard(TWELVE_HEADS, random_parameters(TWELVE_HEADS, 1), Layout(12, 1))
    x = np.random.default_rng(1).standard_normal((4, TWELVE_HEADS.dim))
    _, cache = attention_partials(ops, model, model.parameters.layers[0], x, np.arange(4), None)
    assert cache.k.shape == (4, 12, TWELVE_HEADS.head_dim)
    for copies in (cache.k.reshape(4, 3, 4, -1), cache.v.reshape(4, 3, 4, -1)):
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:, :, :1], copies.shape))


@pytest.mark.parametrize("layout", FITTING)
def test_all_before_the_first_sum_over_ranks_is_the_same_bit_for_bit(layout: Layout) -> None:
    """SHARD-5."""
    before, sharded = (Recorder() for _ in range(2))
    whole = Model(SMALL, random_parameters(SMALL, 1), CUT_STEPS)
    for recorder, model in ((before, whole), (sharded, shard(SMALL, whole.parameters, layout))):
        recorder.run = "prefill"
        ops: Any = PolicyOps(policy("float64"), recorder)
        x = ops.tap("embedding", ops.embed(model.parameters.embedding, np.arange(6)))
        inner = ops.within("layers.0.")
        model.steps.decoder_layer(inner, model, model.parameters.layers[0], x, np.arange(6), None)
    taps = [*before.arrays]
    assert taps == [*sharded.arrays]
    for tap in taps[: taps.index("prefill/layers.0.attention.output")]:
        np.testing.assert_array_equal(sharded.arrays[tap], before.arrays[tap])


@pytest.mark.parametrize("layout", FITTING)
def test_a_sum_over_ranks_is_within_its_bound(layout: Layout) -> None:
    """SHARD-6: (TP + 1) u A, A the sum of the magnitudes of the terms; wo and w2, inputs of many sizes."""
    ops: Any = PolicyOps(policy("float64"))
    whole = random_parameters(SMALL, 2)
    layer: Any = shard(SMALL, whole, layout).parameters.layers[0]
    rng = np.random.default_rng(3)

    def check(matrix: Any, parts: list[Any]) -> None:
        x = rng.standard_normal((50, matrix.shape[1])) * 2.0 ** rng.integers(-20, 20, matrix.shape[1])
        cuts = np.cumsum([part.shape[1] for part in parts])[:-1]
        pieces = zip(np.split(x, cuts, axis=1), parts, strict=True)
        total = all_reduce([ops.linear(piece, part) for piece, part in pieces])
        size = np.abs(x) @ np.abs(matrix.read()).T
        assert (np.abs(total - ops.linear(x, matrix)) <= (layout.tensor + 1) * U * size).all()

    experts = [parts for group in layer.experts for parts in group.experts]
    check(whole.layers[0].wo, [rank.wo for rank in layer.attention])
    check(whole.layers[0].experts[1].w2, [rank.w2 for rank in experts[1]])


NOW = ("dims-distinct", "every-expert", "square")
"""TP up to 6 with copies of heads, EP up to all experts, a model that is all square."""
LATER = ("walking-skeleton", "mini-8x7b", "batch-ragged", "experts-12", "shared-prefix", "window-chunks", "top-all")


@pytest.mark.parametrize(
    "name", [*NOW, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float64", *DTYPES])
def test_the_sharded_run_is_conformant(name: str, dtype: str) -> None:
    """All clauses at once, on every layout: each step from the run's own inputs, by the verifier."""
    config = case_named(name).config
    for layout in layouts(config):
        report = judged(run_sharded(name, layout, dtype), name, dtype)
        assert report.verdict == CONFORMANT, f"{layout}: {explained(report)}"


# ---- the known bugs


def placed(bug: str, layout: Layout) -> OnRanks:
    return on_ranks(MUTANTS[bug], layout)


def can_show(bug: str, layout: Layout, config: Config) -> bool:
    """Whether a layout has what the bug needs."""
    if bug.startswith("ep-"):
        return layout.expert > 1
    if bug == "tp-kv-replication-wrong":
        return layout.tensor > config.kv_heads > 1
    return layout.tensor > 1


BUGS = [bug for bug, each in MUTANTS.items() if each.kind == "parallel"]
AIMED = [(bug, name) for bug in BUGS for name in cases_aimed_at(bug)]


def test_every_bug_of_sharding_has_a_case_aimed_at_it() -> None:
    assert len(BUGS) == 5
    assert {bug for bug, _ in AIMED} == {*BUGS}


def tried(bug: str, config: Config, everything: bool) -> list[Layout]:
    """One device, and of the layouts that can show a bug the first and the last; or all there are."""
    fitting = [*layouts(config)]
    showing = [layout for layout in fitting if can_show(bug, layout, config)]
    return fitting if everything else [fitting[0], showing[0], showing[-1]]


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize(("bug", "name"), AIMED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bug_is_seen_at_the_step_it_touches_and_only_where_it_can_be(
    bug: str, name: str, dtype: str, everything: bool
) -> None:
    """SHARD-4, SHARD-7, SHARD-10, SHARD-11. Where it cannot show, no bit differs from the sharded run that is right."""
    config, seen = case_named(name).config, 0
    for layout in tried(bug, config, everything):
        trace = traced(placed(bug, layout), name, dtype)
        if same(trace, run_sharded(name, layout, dtype)):
            assert not can_show(bug, layout, config), layout
            continue
        assert can_show(bug, layout, config), f"{layout}: not inert"
        report = judged(trace, name, dtype)
        assert report.verdict == NOT_CONFORMANT, f"{layout}: {report.headline}"
        assert first_wrong_step(report) in MUTANTS[bug].touches, explained(report)
        seen += 1
    assert seen


def test_a_call_with_one_token_cannot_be_combined_by_the_ids_of_another() -> None:
    """`needs` of the bug: in the first layer, whose cache it does not reach, decode calls are right to the bit."""
    bug, name, layout = "ep-combine-with-dispatched-ids", "batch-ragged", Layout(1, 5)
    found, right = traced(placed(bug, layout), name, "float32"), run_sharded(name, layout, "float32")
    first = {key: each.map() for key, each in found.tensors.items() if "/layers.0." in key}
    changed = {key.partition("/")[0] for key, x in first.items() if (x != right.tensors[key].map()).any()}
    assert changed
    assert all(len(run.tokens) > 1 for run in case_named(name).runs() if run.run in changed)


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bug_of_sharding_is_named_as_a_variation_of_one_forward_pass(bug: str, dtype: str) -> None:
    """Every bug on every layout is a hypothesis; of one bug on several layouts any may come first."""
    name = "dims-distinct"
    config = case_named(name).config
    few = [*layouts(config, (1, 6))]
    layout = next(each for each in reversed(few) if can_show(bug, each, config))
    trace = traced(placed(bug, layout), name, dtype)
    report = judged(trace, name, dtype)
    hypotheses = [placed(other, each) for other in BUGS for each in few if can_show(other, each, config)]
    first, *_ = diagnosed(trace, name, dtype, report, hypotheses)
    assert (first.name, first.explains) == (bug, True)


def test_steps_that_a_bug_touches_are_taps() -> None:
    taps = {step_of(key.partition("/")[2]) for key in run_sharded("dims-distinct", Layout(1, 1), "float32").tensors}
    assert {step for bug in BUGS for step in MUTANTS[bug].touches} <= taps
