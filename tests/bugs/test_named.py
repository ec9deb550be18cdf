# SPDX-License-Identifier: Apache-2.0
"""Bugs patched into transformers and dumped at bfloat16 are named: the right one first, none where there is none.

`python -m bench.diagnosis` prints the whole table.
"""

from __future__ import annotations

from functools import cache

import pytest

from refmoe.bugs.catalogue import MUTANTS
from tests.bugs.patched import PATCHED, Patched
from tests.bugs.patched_naming import ATTENTION, HEALTHY, LEFT_OUT, Naming, everything, healthy, name_it

pytestmark = pytest.mark.engines

BUGS = {f"{bug.name} on {bug.model}": bug for bug in everything()}

NAMED_FAST = (
    "attn-wo-head-order on dims-distinct", "cache-window-update-at-boundary on window-decode",
    "router-raw-logit-weights on flat-router", "expert-gelu on mini-8x7b", "load-sanitise-twice on dims-distinct",
    "norm-eps-1e-6 on tiny-embedding", "rope-sign on dims-distinct", "quant-router-quantised on mini-8x7b",
)  # fmt: skip
"""One of each class, for the default run."""

UNNAMED_FAST = ("query-bias on dims-distinct", "residual-added-twice on dims-distinct")


@cache
def naming(bug: Patched) -> Naming:
    return name_it(bug)


def test_every_bug_of_a_forward_pass_is_patched_or_left_out_with_a_reason() -> None:
    called = {name for bug in BUGS.values() for name in bug.called}
    wanted = {each.id for each in MUTANTS.values() if each.in_one_pass}
    assert called | set(LEFT_OUT) == wanted
    assert not called & set(LEFT_OUT)
    assert {bug.kin for bug in BUGS.values()} - {""} <= wanted
    assert all(bug.called or bug.why for bug in BUGS.values())


def test_a_bug_that_a_fault_has_is_not_patched_again_for_nothing() -> None:
    """Both are worth having where the patch is another form, or the case another."""
    faults = {(name, bug.model) for bug in BUGS.values() if bug.name not in PATCHED for name in bug.called}
    assert not faults & {(bug.name, bug.model) for bug in PATCHED.values()}


@pytest.mark.parametrize("name", NAMED_FAST)
def test_the_right_bug_is_named_first(name: str) -> None:
    found = naming(BUGS[name])
    assert found.right, found


@pytest.mark.parametrize("seed", [0, 1, 14])
def test_a_bug_that_makes_noise_is_named_whatever_noise_it_draws(seed: int) -> None:
    """By accident an engine's noise can be like the noise that the catalogue's own bug draws. That tells nothing."""
    import torch

    torch.manual_seed(seed)
    found = name_it(BUGS["router-jitter-leaks-to-experts on near-tie"])
    assert found.right, found


@pytest.mark.parametrize("name", UNNAMED_FAST)
def test_a_bug_that_is_not_in_the_catalogue_is_given_no_other_ones_name(name: str) -> None:
    found = naming(BUGS[name])
    assert found.visible
    assert found.right, found


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i > 1)) for i, name in enumerate(HEALTHY)]
)
def test_a_healthy_engine_is_given_no_name(name: str, attention: str) -> None:
    found = name_it(healthy(name), attention=attention)
    assert not found.visible
    assert not found.first


@pytest.mark.slow
def test_nineteen_of_twenty_are_named_first() -> None:
    found = [naming(bug) for bug in BUGS.values() if bug.called]
    seen = [each for each in found if each.visible]
    unseen = {each.bug for each in found if not each.visible}
    wrong = [each for each in seen if not each.right]
    assert unseen == {"prec-logits-lowprec", "logits-in-bfloat16"}  # the policy stores logits in bfloat16
    assert len(wrong) <= 0.05 * len(seen), wrong


@pytest.mark.slow
def test_no_bug_is_named_where_the_catalogue_has_none() -> None:
    found = [naming(bug) for bug in BUGS.values() if not bug.called]
    wrong = [each for each in found if not each.right]
    assert len(wrong) <= 0.05 * len(found), wrong
