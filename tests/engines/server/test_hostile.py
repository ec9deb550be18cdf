# SPDX-License-Identifier: Apache-2.0
"""Hostile servers: whatever one does, at the first request or later, it gets a verdict, and in time."""

from __future__ import annotations

import math
from typing import Any

import pytest

from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.server.asking import Address, Client, ServerFault, Unwilling
from refmoe.engines.server.kinds import LLAMA
from refmoe.errors import InputError
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from tests.engines.server import fake
from tests.engines.server.asked import asked
from tests.engines.server.fake import Spoil, changed, honest_llama, sends, serving

SOON = 1.0
"""Seconds for a request, where the server is to exceed them."""


def client(url: str, limit: float = SOON) -> Client:
    return Client(Address(url), limit)


FAULTS: dict[str, tuple[Spoil, str]] = {
    "stalls": (fake.stalls, TIMED_OUT),
    "drips": (fake.drips, TIMED_OUT),
    "drips headers": (fake.drips_headers, TIMED_OUT),
    "drops": (fake.drops, CRASHED),
    "cut short": (fake.cut_short, CRASHED),
    "no HTTP": (fake.no_http, CRASHED),
    "endless": (fake.endless, BROKEN),
    "empty": (sends(b""), BROKEN),
    "no JSON": (sends(b"<html>502</html>"), BROKEN),
    "half JSON": (sends(b'{"tokens": [1, 2'), BROKEN),
    "not UTF-8": (sends(b'{"tokens": "\xff\xfe"}'), BROKEN),
    "deep": (sends(b"[" * 100_000), BROKEN),
    "a name twice": (sends(b'{"tokens": [], "tokens": []}'), BROKEN),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_request_ends_in_time_with_a_named_fault(name: str) -> None:
    spoil, kind = FAULTS[name]
    # an answer without end may last longer than its reading
    limit = 30.0 if kind == BROKEN else SOON
    with serving(lambda *_: {"a": list(range(1000))}, spoil) as url, pytest.raises(ServerFault) as found:
        client(url, limit).post("/completion", {"prompt": [1]})
    assert found.value.kind == kind


def test_a_refusal_keeps_the_words_of_the_server() -> None:
    def refuses(*_: Any) -> Any:
        raise fake.Refusal(422, "unexpected field")

    with serving(refuses) as url, pytest.raises(Unwilling) as found:
        client(url).get("/v1/models")
    assert found.value.status == 422
    assert "unexpected field" in found.value.reason


@pytest.mark.parametrize("spoil", [fake.drops, fake.busy])
def test_a_request_is_sent_again_once(spoil: Spoil) -> None:
    with serving(lambda *_: {"ok": True}, fake.once(0, spoil)) as url:
        asking = client(url, 30.0)
        assert asking.post("/completion", {}) == {"ok": True}
        assert (asking.again, asking.requests) == (1, 2)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:80",
        "ftp://a",
        "http://",
        "http://a:99999",
        "http://a:x",
        "http://a?b=c",
        "http://a@b",
        "http://[1",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InputError):
        Address(url)


def test_the_path_of_an_address_may_name_the_version() -> None:
    assert Address("http://a:8000/v1/").url == Address("http://a:8000").url == "http://a:8000"


# ---- a whole interview


@pytest.mark.parametrize("name", ["stalls", "drops", "cut short", "half JSON"])
def test_a_server_that_fails_from_the_first_request_on(name: str) -> None:
    spoil, kind = FAULTS[name]
    found = asked(honest_llama(), spoil, limit=SOON, wanted=LLAMA)
    assert found.verdict == kind
    assert found.judgement.tokens == ()


@pytest.mark.parametrize("number", [3, 14])
@pytest.mark.parametrize("name", ["drops", "half JSON"])
def test_a_server_that_fails_later_keeps_what_it_said(name: str, number: int) -> None:
    spoil, kind = FAULTS[name]
    found = asked(honest_llama(), fake.from_then_on(number, spoil), wanted=LLAMA)
    assert found.verdict in (kind, CRASHED)
    assert not found.judgement.wrong
    assert found.answers.alive is False


def test_a_server_that_fails_once_answers_the_rest() -> None:
    found = asked(honest_llama(), fake.once(14, sends(b"{")), wanted=LLAMA)
    assert found.verdict == BROKEN
    assert found.answers.alive
    assert len(found.judgement.broken) == 1


def first_entry(change: Any) -> Spoil:
    """Change the first log-probability of every row."""

    def spoil(found: Any) -> Any:
        for each in found if isinstance(found, list) else [found]:
            for step in each.get("completion_probabilities", ()):
                step["top_logprobs"][0]["logprob"] = change(step["top_logprobs"][0]["logprob"])
        return found

    return changed(spoil)


LIES: dict[str, tuple[Spoil, str]] = {
    "a little more": (first_entry(lambda x: x + 1e-3 if x < -1e-2 else x - 1e-3), NOT_CONFORMANT),
    "NaN": (first_entry(lambda _: math.nan), NOT_CONFORMANT),
    "minus infinity": (first_entry(lambda _: -math.inf), NOT_CONFORMANT),
    "null": (first_entry(lambda _: None), NOT_CONFORMANT),
    "positive": (first_entry(lambda _: 2.0), BROKEN),
    "text": (first_entry(lambda _: "-1.5"), BROKEN),
    "true": (first_entry(lambda _: True), BROKEN),
    "huge": (first_entry(lambda _: 10**400), BROKEN),
    "other ids": (changed(lambda found: {**found, "tokens": [10**6]} if isinstance(found, dict) else found), BROKEN),
    "no ids": (changed(lambda found: {**found, "tokens": None} if isinstance(found, dict) else found), BROKEN),
    "a list": (changed(lambda found: [found]), BROKEN),
}


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_lies_about_its_numbers(name: str) -> None:
    spoil, verdict = LIES[name]
    found = asked(honest_llama(), spoil, wanted=LLAMA)
    assert found.verdict == verdict


def test_a_slow_server_is_healthy() -> None:
    assert asked(honest_llama(), fake.slowly(0.01), wanted=LLAMA).verdict == CONFORMANT


def test_a_stranger_is_no_server() -> None:
    def stranger(*_: Any) -> Any:
        raise fake.Refusal(404, "nothing here")

    with pytest.raises(InputError):
        asked(stranger)
