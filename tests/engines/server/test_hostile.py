# SPDX-License-Identifier: Apache-2.0
"""Hostile servers: whatever one does, at the first request or later, it gets a verdict, and in time."""

from __future__ import annotations

import gzip
import math
import zlib
from typing import Any

import pytest

from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.server.asking import LARGEST, Address, Client, ServerFault, Unwilling
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


BOMB = gzip.compress(b"[" + b"0," * (LARGEST // 2) + b"0]", 1)
"""An answer that is small, and larger than any may be when it is unpacked."""
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
    "nothing": (fake.answers(204, b""), BROKEN),
    "a stream": (sends(b'data: {"tokens": [1]}\n\ndata: [DONE]\n\n'), BROKEN),
    "no end of waiting": (fake.continues, TIMED_OUT),
    "a header too long": (fake.with_headers(X="x" * 100_000), CRASHED),
    "too many headers": (fake.with_headers(**{f"X_{i}": "x" for i in range(200)}), CRASHED),
    "chunks that are none": (fake.with_headers(Transfer_Encoding="chunked"), CRASHED),
    "zip that is none": (fake.with_headers(Content_Encoding="gzip"), BROKEN),
    "a zip bomb": (fake.with_headers(lambda _: BOMB, Content_Encoding="gzip"), BROKEN),
    "an encoding that nobody knows": (fake.with_headers(Content_Encoding="snail"), BROKEN),
    "always busy": (fake.answers(429), TIMED_OUT),
    "busy for an hour": (fake.answers(503, Retry_After="3600"), TIMED_OUT),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_request_ends_in_time_with_a_named_fault(name: str) -> None:
    spoil, kind = FAULTS[name]
    # an answer without end may last longer than its reading
    limit = 30.0 if kind == BROKEN else SOON
    with serving(lambda *_: {"a": list(range(1000))}, spoil) as url, pytest.raises(ServerFault) as found:
        client(url, limit).post("/completion", {"prompt": [1]})
    assert found.value.kind == kind


FORMS: dict[str, Spoil] = {
    "chunks": fake.with_headers(fake.in_chunks, Transfer_Encoding="chunked"),
    "gzip": fake.with_headers(gzip.compress, Content_Encoding="gzip"),
    "deflate": fake.with_headers(zlib.compress, Content_Encoding="deflate"),
    "identity": fake.with_headers(Content_Encoding="identity"),
    "another type": fake.with_headers(Content_Type="text/html; charset=utf-16"),
    "no type": fake.with_headers(),
    "a connection that stays open": fake.stays_open,
}


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_in_another_form_is_read(name: str) -> None:
    with serving(lambda *_: {"a": [*range(1000)]}, FORMS[name]) as url:
        assert client(url, 30.0).post("/completion", {}) == {"a": [*range(1000)]}


@pytest.mark.parametrize("after", ["0", "0.3", "soon", "-1", "inf", "nan", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_busy_server_is_asked_again(after: str) -> None:
    """Whatever it says of the time, and more than once."""
    seen = []

    def spoil(handler: Any, data: bytes) -> bool:
        seen.append(data)
        return len(seen) < 4 and fake.answers(429, Retry_After=after)(handler, data)

    with serving(lambda *_: {"ok": True}, spoil) as url:
        assert client(url, 30.0).post("/completion", {}) == {"ok": True}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_told_and_not_followed(status: int) -> None:
    place = "http://192.0.2.1/v1"
    with serving(lambda *_: {}, fake.answers(status, b"", Location=place)) as url, pytest.raises(Unwilling) as found:
        client(url, 30.0).post("/completion", {})
    assert found.value.status == status
    assert place in found.value.reason


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


@pytest.mark.parametrize(("status", "verdict"), [(500, CRASHED), (502, CRASHED), (400, NOT_CONFORMANT)])
def test_an_error_later_is_a_verdict_of_its_kind(status: int, verdict: str) -> None:
    """A server that fails is not called wrong. One that refuses what it took before is."""
    found = asked(honest_llama(), fake.once(8, fake.answers(status)), wanted=LLAMA)
    assert found.verdict == verdict
    assert found.answers.alive
    assert not found.judgement.wrong


@pytest.mark.slow
def test_a_server_without_time_is_not_called_wrong() -> None:
    found = asked(honest_llama(), fake.for_a_while(8, 10.5, fake.answers(429)), wanted=LLAMA, limit=10.0)
    assert found.verdict == TIMED_OUT
    assert found.answers.alive
    assert not found.judgement.wrong


@pytest.mark.parametrize("status", [500, 502, 504])
def test_an_error_at_each_request_is_a_crash(status: int) -> None:
    found = asked(honest_llama(), fake.answers(status))
    assert (found.verdict, found.judgement.tokens) == (CRASHED, ())


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
