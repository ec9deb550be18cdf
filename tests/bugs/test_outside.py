# SPDX-License-Identifier: Apache-2.0
"""Bugs of tokenizers, samplers and losses against the vectors; of generation against its laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.generation_session import Session, unchanged_by_router_logits
from refmoe.bugs.mutant import TOKENIZER
from refmoe.bugs.run_engine import same
from refmoe.bugs.vector_checks import read_vectors, wrong
from refmoe.errors import InputError
from refmoe.routers.literature.losses import load_balancing_loss
from refmoe.suite.matrix.surroundings import FILES, RIGHT, built, outside, read_vocabulary
from refmoe.verifier.findings import NOT_CONFORMANT
from tests.bugs.judging import (
    DTYPES,
    GOLDEN,
    case_named,
    cases_aimed_at,
    diagnosed,
    explained,
    first_wrong_step,
    judged,
    traced,
)
from tests.models import random_model

pytest.importorskip("mistral_common")

NO_VECTOR = {"aux-leaks-into-inference": "no wrong loss, but one in a wrong place: a law of generation shows it"}
CONTENT = {name: read_vectors(GOLDEN / "vectors" / name) for names in FILES.values() for name in names}

BUGS = [bug for bug in outside() if bug not in NO_VECTOR]
AIMED = [(bug, name) for bug in BUGS for name in FILES[MUTANTS[bug].changes]]


def over(function: Any, name: str) -> Any:
    """An implementation to hold against a file, over the vocabulary that the file is of."""
    content = CONTENT[name]
    tokenizer = content["kind"] == TOKENIZER
    return built(function, content["kind"], read_vocabulary(content, GOLDEN / name) if tokenizer else None)


def claimed(bug: str, name: str) -> set[str]:
    """The vectors of a file that say they show a bug."""
    return {vector["name"] for vector in CONTENT[name]["vectors"] if bug in vector["bugs"]}


@pytest.mark.parametrize(("changes", "name"), [(changes, name) for changes, names in FILES.items() for name in names])
def test_the_right_implementation_gets_every_vector_right(changes: str, name: str) -> None:
    assert wrong(over(RIGHT[changes], name), CONTENT[name]) == []


@pytest.mark.parametrize(("bug", "name"), AIMED)
def test_a_bug_is_caught_by_every_vector_that_lists_it(bug: str, name: str) -> None:
    found = set(wrong(over(MUTANTS[bug].function, name), CONTENT[name]))
    assert claimed(bug, name)
    assert claimed(bug, name) - found == set()


@pytest.mark.parametrize("name", CONTENT)
def test_the_vectors_list_no_bug_that_is_not_in_the_catalogue(name: str) -> None:
    listed = {bug for vector in CONTENT[name]["vectors"] for bug in vector["bugs"]}
    assert listed
    assert listed <= {*BUGS}


@pytest.mark.parametrize(("bug", "name"), AIMED)
def test_a_bug_leaves_some_vectors_right(bug: str, name: str) -> None:
    """It is one mistake, not another implementation altogether."""
    assert len(wrong(over(MUTANTS[bug].function, name), CONTENT[name])) < len(CONTENT[name]["vectors"])


def test_vectors_of_another_kind_or_version_are_refused() -> None:
    for content in ({**CONTENT["losses.json"], "format_version": "2"}, {**CONTENT["losses.json"], "kind": "?"}):
        with pytest.raises(InputError, match="are not known"):
            wrong(load_balancing_loss, content)


# ---- router logits in generation


def test_asking_for_router_logits_changes_no_token() -> None:
    """And the loss is there, for each call one."""
    model, prompt = random_model(), [3, 1, 4]
    assert unchanged_by_router_logits(Session, model, prompt, 4)
    session = Session(model, True)
    for tokens in ([3, 1, 4], [1], [5]):
        session.step(tokens)
    assert len(session.losses) == 3
    assert np.isfinite(session.losses).all()


def test_a_loss_that_leaks_into_generation_is_caught_by_the_first_decode_call() -> None:
    leaks: Any = MUTANTS["aux-leaks-into-inference"].function
    model = random_model()
    assert not unchanged_by_router_logits(leaks, model, [3, 1, 4], 2)
    assert unchanged_by_router_logits(leaks, model, [3, 1, 4], 1)  # the prompt alone has no cached tokens


# ---- a mask made of the ids: a variation of the forward pass

EOS = "gen-pad-eq-eos"


@pytest.mark.parametrize("name", cases_aimed_at(EOS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hidden_eos_is_seen_in_the_probabilities_and_named(name: str, dtype: str) -> None:
    trace = traced(EOS, name, dtype)
    report = judged(trace, name, dtype)
    assert report.verdict == NOT_CONFORMANT
    assert first_wrong_step(report) in MUTANTS[EOS].touches, explained(report)
    first, *_ = diagnosed(trace, name, dtype, report, MUTANTS.values())
    assert (first.name, first.explains) == (EOS, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_an_eos_in_the_context_nothing_is_hidden(dtype: str) -> None:
    name = "mini-8x7b"
    assert not any(2 in run.tokens for run in case_named(name).runs())
    assert same(traced(EOS, name, dtype), traced(None, name, dtype))


def test_a_query_that_would_see_nothing_sees_what_it_did() -> None:
    """An EOS at the very beginning: `batch-ragged` has one, and no row of it is NaN."""
    assert case_named("batch-ragged").runs()[0].tokens[0] == 2
    trace = traced(EOS, "batch-ragged", "float32")
    assert all(np.isfinite(each.map()).all() for key, each in trace.tensors.items() if key.endswith("probs"))
