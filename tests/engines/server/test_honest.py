# SPDX-License-Identifier: Apache-2.0
"""Servers that answer at once and in full: healthy ones are conformant, and those with a known bug are not."""

from __future__ import annotations

from typing import Any

import pytest

from refmoe.engines.server.interview import (
    BATCH,
    CANCELLED,
    FED_BACK,
    GENERATED,
    GROWN,
    PREFIXES,
    PROMPT,
    STOPPED,
    TOGETHER,
)
from refmoe.engines.server.kinds import OPENAI, TRANSFORMERS
from refmoe.engines.server.power import LARGEST, TOKENS, WHOLE
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from tests.engines.server.asked import asked
from tests.engines.server.fake import VOCAB, Answer, changed, honest_llama, honest_openai

LAWS = {GENERATED, GROWN, FED_BACK, TOGETHER, BATCH, STOPPED, CANCELLED}
APIS: dict[str, tuple[Answer, str, set[str]]] = {
    "llama.cpp": (honest_llama(), WHOLE, LAWS | {PREFIXES}),
    "vllm": (honest_openai(), WHOLE, LAWS | {PROMPT}),
    "vllm with a path for decisions": (honest_openai(decisions=True), WHOLE, LAWS | {PROMPT}),
    "limited": (honest_openai(most=7), LARGEST, LAWS | {PROMPT}),
    "echo": (honest_openai(refused=("prompt_logprobs",), text_only=True), WHOLE, LAWS | {PROMPT}),
    "ignores": (honest_openai(numbers=False), TOKENS, LAWS),
    "text": (honest_openai(numbers=False, text_only=True), TOKENS, LAWS),
}


@pytest.mark.parametrize("api", APIS)
def test_a_healthy_server_is_conformant_in_every_way_of_asking(api: str) -> None:
    answer, level, ways = APIS[api]
    found = asked(answer)
    assert (found.verdict, found.judgement.broken) == (CONFORMANT, ())
    assert found.level == level
    assert {said.way for said in found.answers.said} == ways
    assert not found.judgement.open_rows


@pytest.mark.parametrize(("numbers", "kind"), [(True, OPENAI), (False, TRANSFORMERS)])
def test_a_server_without_decisions_is_asked_in_the_way_that_gives_more(numbers: bool, kind: str) -> None:
    """Two kinds of server have the path for decisions. Without the decision config, one of them gives tokens alone."""
    assert asked(honest_openai(decisions=True, numbers=numbers)).kind == kind


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wider_policy_takes_the_values_of_a_narrow_one(dtype: str) -> None:
    assert asked(honest_llama(), dtype=dtype).verdict == CONFORMANT


GROSS = ("rope-theta-default", "head-final-norm-missing", "attn-scale-missing", "router-wrong-k")


@pytest.mark.parametrize("mutant", GROSS)
@pytest.mark.parametrize("numbers", [True, False])
def test_a_known_bug_behind_http_is_seen(mutant: str, numbers: bool) -> None:
    """By log-probabilities, and by tokens alone given the server's own tokens before them."""
    found = asked(honest_openai(mutant, numbers=numbers))
    assert found.verdict == NOT_CONFORMANT
    assert found.judgement.wrong or numbers


def test_a_small_bug_needs_numbers() -> None:
    assert asked(honest_openai("norm-eps-1e-6")).verdict == NOT_CONFORMANT
    assert asked(honest_openai("norm-eps-1e-6", numbers=False)).verdict == CONFORMANT


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["rope-theta-default", "norm-eps-1e-6", "router-wrong-k"])
def test_log_probabilities_name_the_bug(mutant: str) -> None:
    found = asked(honest_llama(mutant), diagnose=True)
    assert found.explanations
    assert found.explanations[0].name == mutant


# ---- bugs of servers, each met in a real one


def test_an_echo_that_is_one_position_off_is_told_from_a_wrong_model() -> None:
    found = asked(honest_openai(refused=("prompt_logprobs",), text_only=True, echo_off_by=1))
    assert found.verdict == NOT_CONFORMANT
    first, *others = found.judgement.broken
    assert first.way == PROMPT
    assert found.reason == f"{first.way}: {first.reason}"
    # the last token of a reply has no entry, and others have
    assert {each.way for each in others} <= {GENERATED, FED_BACK, TOGETHER, BATCH, STOPPED, CANCELLED}
    assert found.judgement.report is None
    assert not found.judgement.wrong


def test_a_wrong_model_is_not_called_one_position_off() -> None:
    found = asked(honest_openai("rope-theta-default", refused=("prompt_logprobs",), text_only=True))
    assert found.verdict == NOT_CONFORMANT
    assert not found.judgement.broken


def next_token(found: Any) -> Any:
    """Every reported token is another one; the reply and its log-probabilities stay."""
    for choice in found.get("choices", ()):
        names = (choice["logprobs"] or {}).get("tokens")
        if names:
            choice["logprobs"]["tokens"] = [f"<{(int(name[1:-1]) + 1) % VOCAB}>" for name in names]
    return found


def test_the_wrong_token_beside_log_probabilities() -> None:
    answer = honest_openai(refused=("prompt_logprobs", "return_token_ids"), text_only=True)
    found = asked(answer, changed(next_token))
    assert found.verdict == NOT_CONFORMANT
    assert {each.way for each in found.judgement.broken} >= {GENERATED}


def no_stop(answer: Answer) -> Answer:
    return lambda path, body: answer(path, {name: value for name, value in body.items() if name != "stop"})


def test_a_stop_token_that_is_ignored() -> None:
    found = asked(no_stop(honest_llama()))
    assert found.verdict == NOT_CONFORMANT
    assert [each.way for each in found.judgement.broken] == [STOPPED]


def swapped(answer: Answer) -> Answer:
    """A batch whose replies change places."""

    def wrong(path: str, body: Any) -> Any:
        found = answer(path, body)
        return (
            [{**each, "index": len(found) - 1 - i} for i, each in enumerate(found)]
            if isinstance(found, list)
            else found
        )

    return wrong


def test_replies_of_a_batch_that_change_places() -> None:
    found = asked(swapped(honest_llama()))
    assert found.verdict == NOT_CONFORMANT
    wrong = {each.way for each in found.judgement.wrong}
    assert wrong == {BATCH}


def test_a_reply_that_ends_early() -> None:
    def short(path: str, body: Any) -> Any:
        count = body.get("n_predict", 0)
        return answer(path, {**body, "n_predict": 2} if count == 5 else body)

    answer = honest_llama()
    found = asked(short)
    assert found.verdict == NOT_CONFORMANT
    assert {each.found for each in found.judgement.wrong} == {VOCAB - 1}
