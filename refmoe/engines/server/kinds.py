# SPDX-License-Identifier: Apache-2.0
"""The kinds of server, and how each is asked. What a server gives is found by asking, not by its name.

llama.cpp       ``POST /completion``: ids in, ids out, any number of entries; no log-probabilities of a prompt
openai          ``POST /v1/completions``, of vLLM, mlx-lm, llama-cpp-python and many others. They differ in what they
                take and give, so `SHAPES` of a request are tried, those that give most first
transformers    ``transformers serve``: tokens by ``POST /v1/completions``. Started with refmoe's decision config, it
                gives whole distributions of a prompt by ``POST /v1/systemone``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.server.asking import FAILED, Client, ServerFault, Unwilling
from refmoe.engines.server.replies import (
    Reply,
    Row,
    broken,
    key_id,
    member,
    read_ids,
    read_text,
    row,
    rows_of_lists,
    rows_of_objects,
    spelled,
    there,
)
from refmoe.errors import InputError
from refmoe.files.sentences import one_line, shown

LLAMA, OPENAI, TRANSFORMERS = KINDS = ("llama.cpp", "openai", "transformers")
QUESTIONS = 64
"""The most positions that ``/v1/systemone`` answers in a request."""
VERSIONS = {"/version": "version", "/props": "build_info"}
"""The paths at which servers say their version, and the field that has it."""
ASIDE = 5.0
"""Seconds for a question beside the judgement, at most."""
LEAST = 1e-300
"""A probability of 0 has no logarithm, and counts as one below any that a float32 holds."""

Tokens = Sequence[int]


@dataclass(frozen=True)
class Question:
    """A prompt, and all that a server is asked for after it."""

    tokens: tuple[int, ...]
    count: int = 1
    """The number of tokens to generate, greedily."""
    cached: bool = True
    """Whether the server may go on from a cache of earlier requests, where it lets one choose."""
    stop: tuple[int, ...] = ()
    """Tokens before which the reply ends."""


class Kind(Protocol):
    """A server that can be asked."""

    name: str
    model: str | None
    """The name of the model in requests."""
    chooses_cache: bool
    """Whether `Question.cached` acts."""

    def ask(self, question: Question) -> Reply:
        """The reply. Raises ServerFault or Unwilling."""

    def ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        """The replies to several questions of one request, in order. Raises ServerFault or Unwilling."""

    def cancel(self, question: Question, seconds: float) -> None:
        """Ask, and break the connection off when the answer begins. Raises ServerFault."""

    def in_words(self) -> str:
        """All that it takes and gives, in words."""


# ---- llama.cpp


class Llama:
    """llama.cpp's own ``/completion``."""

    name = LLAMA
    model: str | None = None
    chooses_cache = True

    def __init__(self, client: Client, vocab: int) -> None:
        self._client, self._vocab = client, vocab

    def ask(self, question: Question) -> Reply:
        return self._read(self._client.post("/completion", self._body(question, list(question.tokens))))

    def ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        body = self._body(questions[0], [list(each.tokens) for each in questions])
        found = self._client.post("/completion", body)
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise broken(f"/completion answers {shown(found)} to several prompts, but a list of objects was expected")
        ordered = sorted(enumerate(found), key=lambda each: _place(each[1], each[0]))
        return _as_many([self._read(each) for _, each in ordered], questions)

    def cancel(self, question: Question, seconds: float) -> None:
        body = {**self._body(question, list(question.tokens)), "stream": True}
        self._client.begin("/completion", body, seconds)

    def in_words(self) -> str:
        return "takes ids, gives whole distributions of generated tokens"

    def _body(self, question: Question, prompt: Any) -> dict[str, Any]:
        return {
            "prompt": prompt, "n_predict": question.count, "n_probs": self._vocab, "temperature": 0.0,
            "samplers": ["temperature"], "cache_prompt": question.cached, "return_tokens": True,
            "stop": [spelled([token]) for token in question.stop],
        }  # fmt: skip

    def _read(self, found: Any) -> Reply:
        rows: list[Row | None] = []
        reported: list[int] = []
        if isinstance(found, dict) and found.get("completion_probabilities") is not None:
            rows, reported = rows_of_lists(found["completion_probabilities"], self._vocab, "completion_probabilities")
        tokens = read_ids(member(found, "tokens", list, "a list of token ids"), self._vocab, "tokens")
        finish = found.get("stop_type")
        return Reply(
            tokens=tokens,
            rows=there(rows),
            reported=dict(enumerate(reported)),
            finish=finish if isinstance(finish, str) else "",
        )


def _place(found: dict[str, Any], otherwise: int) -> int:
    """The place of an answer among those of a batch."""
    index = found.get("index")
    return index if isinstance(index, int) and not isinstance(index, bool) else otherwise


def _as_many(replies: list[Reply], questions: Sequence[Question]) -> list[Reply]:
    """Raises ServerFault where a batch has more or fewer replies than prompts."""
    if len(replies) != len(questions):
        raise broken(f"{len(replies)} replies came to {len(questions)} prompts of one request")
    return replies


# ---- OpenAI's API


@dataclass(frozen=True)
class Shape:
    """One form of a request to ``/v1/completions``."""

    about: str
    ids: bool
    """Whether a prompt is a list of ids, rather than a text."""
    fields: dict[str, Any]


def shapes(vocab: int) -> list[Shape]:
    """The forms of a request, those that give most first."""
    names = {"return_tokens_as_token_ids": True, "return_token_ids": True, "ignore_eos": True}
    whole = {"prompt_logprobs": -1, "logprobs": vocab}
    some = {"prompt_logprobs": 20, "logprobs": 20}
    return [
        Shape("takes ids, gives whole distributions of prompt and generated tokens", True, {**whole, **names}),
        Shape("takes ids, gives the 20 largest of prompt and generated tokens", True, {**some, **names}),
        Shape("takes ids, gives whole distributions by echo", True, {"logprobs": vocab, "echo": True}),
        Shape("takes ids, gives the 5 largest of generated tokens", True, {"logprobs": 5}),
        Shape("takes text, gives whole distributions by echo", False, {"logprobs": vocab, "echo": True}),
        Shape("takes text, gives the 5 largest of generated tokens", False, {"logprobs": 5}),
        Shape("takes text, gives the 11 largest of generated tokens", False, {"logprobs": True, "top_logprobs": 11}),
        Shape("takes ids, gives tokens", True, {}),
        Shape("takes text, gives tokens", False, {}),
    ]


class OpenAI:
    """``/v1/completions`` of OpenAI's API, in the form that this server gives most by."""

    name = OPENAI
    chooses_cache = False

    def __init__(self, client: Client, vocab: int, model: str | None, shape: Shape) -> None:
        self._client, self._vocab, self.model, self._shape = client, vocab, model, shape

    def ask(self, question: Question) -> Reply:
        body = self._body(question, self._prompt(question))
        choices = self._choices(body)
        return self._read(choices[0], question)

    def ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        body = self._body(questions[0], [self._prompt(each) for each in questions])
        found = self._choices(body)
        ordered = [each for _, each in sorted(enumerate(found), key=lambda each: _place(each[1], each[0]))]
        replies = [self._read(each, question) for each, question in zip(ordered, questions, strict=False)]
        return _as_many(replies + [Reply(())] * (len(ordered) - len(replies)), questions)

    def cancel(self, question: Question, seconds: float) -> None:
        body = {**self._body(question, self._prompt(question)), "stream": True}
        self._client.begin("/v1/completions", body, seconds)

    def in_words(self) -> str:
        return self._shape.about

    def without_rows(self) -> Shape:
        """The form in which only tokens are asked for."""
        return next(each for each in shapes(self._vocab) if not each.fields and each.ids == self._shape.ids)

    def _prompt(self, question: Question) -> Any:
        return list(question.tokens) if self._shape.ids else spelled(question.tokens)

    def _body(self, question: Question, prompt: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": question.count, "temperature": 0.0, **self._shape.fields}
        if self.model is not None:
            body["model"] = self.model
        if question.stop:
            body["stop"] = [spelled([token]) for token in question.stop]
        return body

    def _choices(self, body: dict[str, Any]) -> list[Any]:
        found: list[Any] = member(self._client.post("/v1/completions", body), "choices", list, "a list")
        if not found:
            raise broken("'choices' is empty, but at least one choice was expected")
        return found

    def _read(self, choice: Any, question: Question) -> Reply:
        text = member(choice, "text", str, "a text")
        echoed = self._shape.fields.get("echo", False)
        tokens = read_text(text, self._vocab) if text.strip() or not choice.get("token_ids") else ()
        before = len(question.tokens)
        if echoed and tokens[:before] == question.tokens:
            tokens = tokens[before:]
        else:
            echoed = False
        given = choice.get("token_ids")
        if given is not None:
            ids = read_ids(given, self._vocab, "token_ids")
            if ids[: len(tokens)] != tokens:  # the text ends before a stop token, and the ids after it
                raise broken(f"its text is {shown(spelled(tokens))}, but its 'token_ids' are {shown(list(ids))}")
            tokens = ids
        rows, reported = self._rows(choice.get("logprobs"))
        prompt_rows: dict[int, Row] = {}
        if echoed:
            # entry i is the distribution before token i, and the first has none
            prompt_rows = {place - 1: each for place, each in rows.items() if 0 < place < before}
            rows = {place - before: each for place, each in rows.items() if place >= before}
            reported = {place - before: each for place, each in reported.items() if place >= before}
        elif choice.get("prompt_logprobs") is not None:
            listed = rows_of_objects(choice["prompt_logprobs"], self._vocab, "prompt_logprobs")
            prompt_rows = {place - 1: each for place, each in there(listed).items() if place}
        finish = choice.get("finish_reason")
        return Reply(
            tokens=tokens,
            rows={place: each for place, each in rows.items() if place < max(len(tokens), 1)},
            prompt_rows=prompt_rows,
            reported=reported,
            finish=finish if isinstance(finish, str) else "",
        )

    def _rows(self, found: Any) -> tuple[dict[int, Row], dict[int, int]]:
        """The rows of the field `logprobs`, and the tokens that it names, by their place."""
        if not isinstance(found, dict):
            return {}, {}
        if found.get("content") is not None:
            rows, reported = rows_of_lists(found["content"], self._vocab, "content")
            return there(rows), dict(enumerate(reported))
        if found.get("top_logprobs") is None:
            return {}, {}
        rows = rows_of_objects(found["top_logprobs"], self._vocab, "top_logprobs")
        names = found.get("tokens")
        tokens = names if isinstance(names, list) else []
        named = {i: key_id(each, self._vocab) for i, each in enumerate(tokens) if isinstance(each, str)}
        return there(rows), named


# ---- transformers serve


class Transformers:
    """``transformers serve``: tokens, and with refmoe's decision config the distributions after a prompt's tokens."""

    name = TRANSFORMERS
    chooses_cache = False

    def __init__(self, client: Client, vocab: int, model: str | None, whole: bool) -> None:
        """whole: whether it was started with refmoe's decision config"""
        self._client, self._vocab, self.model, self._whole = client, vocab, model, whole
        self._tokens = OpenAI(client, vocab, model, shapes(vocab)[-1])

    def ask(self, question: Question) -> Reply:
        reply = self._tokens.ask(question)
        return replace(reply, prompt_rows=self.prompt_rows(question.tokens)) if self._whole else reply

    def ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        return self._tokens.ask_all(questions)

    def cancel(self, question: Question, seconds: float) -> None:
        self._tokens.cancel(question, seconds)

    def in_words(self) -> str:
        return "takes text, gives " + ("whole distributions of a prompt, and tokens" if self._whole else "tokens")

    def prompt_rows(self, tokens: Tokens) -> dict[int, Row]:
        """The distributions after the tokens of a prompt. Raises ServerFault or Unwilling."""
        choice = {"type": "choice", "criteria": {spelled([token]): None for token in range(self._vocab)}}
        cut = list(tokens)[:QUESTIONS]
        named = {} if self.model is None else {"model": self.model}
        found = self._client.post("/v1/systemone", {
            **named, "state": [spelled([token]) for token in cut],
            "questions": {str(place): choice for place in range(len(cut))},
        })  # fmt: skip
        answers = member(found, "answers", dict, "an object")
        return {place: self._row(member(answers, str(place), dict, "an object")) for place in range(len(cut))}

    def _row(self, answer: Any) -> Row:
        found = member(answer, "probabilities", dict, "an object of probabilities")
        pairs = []
        for key, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1.001:
                raise broken(f"{shown(value)} is no probability, but a number from 0 to 1 was expected")
            pairs.append((key_id(key, self._vocab), math.log(max(value, LEAST))))
        return row(pairs)


# ---- which of them it is


@dataclass
class Found:
    """A server whose kind is known."""

    kind: Kind
    said: list[str] = field(default_factory=list)
    """Sentences about what it refused or left out, while it was asked what it can give."""


def find_kind(client: Client, vocab: int, first: Question, wanted: str | None, model: str | None) -> Found:
    """Find the kind of a server by asking it.

    first: the first question. It is long, as some servers fail where the first request is short
    wanted: one of `KINDS`; None: any   model: the name of the model in requests; None: the server's own
    Raises ServerFault where it does not answer at all, and InputError where it is no server of these kinds.
    """
    listed = model if model is not None else first_model(client)
    refusals: list[Unwilling | ServerFault] = []
    tries: dict[str, Callable[[], Found | None]] = {
        LLAMA: lambda: _llama(client, vocab, first, refusals),
        TRANSFORMERS: lambda: _transformers(client, vocab, first, listed, refusals, wanted is None),
        OPENAI: lambda: _openai(client, vocab, first, listed, refusals),
    }
    for name, attempt in tries.items():
        if wanted in (None, name):
            found = attempt()
            if found is not None:
                return found
    for fault in refusals:
        if isinstance(fault, ServerFault):
            raise fault
        if fault.status in FAILED:
            raise ServerFault(CRASHED, fault.reason)
    why = f" ({refusals[-1].reason})" if refusals else ""
    raise InputError(
        f"{client.address.url}: answers neither as {' nor as '.join(tries if wanted is None else [wanted])} does{why}; "
        "--server-model says which model is asked for"
    )


def first_model(client: Client) -> str | None:
    """The first model that the server lists, None where it lists none. Raises ServerFault where it does not answer."""
    try:
        found = client.get("/v1/models")
    except Unwilling:
        return None
    except ServerFault as fault:
        if fault.kind != BROKEN:
            raise
        return None  # mlx-lm answers with nothing
    listed = found.get("data") if isinstance(found, dict) else None
    names = [each.get("id") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return next((name for name in names if isinstance(name, str)), None)


def version_of(client: Client) -> str:
    """The version that the server gives, as vLLM or llama-server does; empty where it gives none."""
    for path, name in VERSIONS.items():
        try:
            found = client.get(path, min(ASIDE, client.limit))
        except (ServerFault, Unwilling):
            continue
        version = found.get(name) if isinstance(found, dict) else None
        if isinstance(version, str) and version.strip():
            return one_line(version)
    return ""


def _llama(client: Client, vocab: int, first: Question, refusals: list[Unwilling | ServerFault]) -> Found | None:
    kind = Llama(client, vocab)
    return Found(kind) if _answers(client, kind, first, refusals) is not None else None


def _transformers(
    client: Client,
    vocab: int,
    first: Question,
    model: str | None,
    refusals: list[Unwilling | ServerFault],
    others: bool,
) -> Found | None:
    """The server, if it is of this kind. vLLM has the path for decisions too, gives none, and gives rows elsewhere.

    others: whether other kinds may be tried after this one
    """
    try:
        client.post("/v1/systemone", {})
    except Unwilling as refusal:
        if refusal.status in (404, 405, 501):  # no such path, or llama.cpp's own refusal
            return None
    except ServerFault:
        return None
    kind = Transformers(client, vocab, model, True)
    if _answers(client, kind, first, refusals) is not None:
        return Found(kind)
    why = refusals[-1].reason if refusals else "no token beside them"
    if others and _most_rows(client, vocab, first, model, refusals)[0]:
        return None
    kind = Transformers(client, vocab, model, False)
    if _answers(client, kind, first, refusals) is not None:
        return Found(kind, [f"no distributions of a prompt: {why}"])
    return None


def _openai(
    client: Client, vocab: int, first: Question, model: str | None, refusals: list[Unwilling | ServerFault]
) -> Found | None:
    entries, kind = _most_rows(client, vocab, first, model, refusals)
    if kind is None:
        return None
    return Found(kind if entries else OpenAI(client, vocab, model, kind.without_rows()))


def _most_rows(
    client: Client, vocab: int, first: Question, model: str | None, refusals: list[Unwilling | ServerFault]
) -> tuple[int, OpenAI | None]:
    """The number of entries in the form that gives most rows, and that form; None where it takes none.

    A server that takes a field and ignores it answers, but without rows.
    """
    best: tuple[int, OpenAI | None] = (0, None)
    for shape in shapes(vocab):
        kind = OpenAI(client, vocab, model, shape)
        reply = _answers(client, kind, first, refusals)
        if reply is None:
            continue
        rows = [*reply.rows.values(), *reply.prompt_rows.values()]
        entries = sum(len(each.ids) for each in rows)
        if best[1] is None or entries > best[0]:
            best = entries, kind
        if reply.prompt_rows or (rows and not shape.fields.get("echo")):
            break
    return best


def _answers(client: Client, kind: Kind, first: Question, refusals: list[Unwilling | ServerFault]) -> Reply | None:
    """The reply to the first question, None where the server does not take it in this form.

    Some servers drop a connection for a field that they do not know. Raises ServerFault where it answers no more.
    """
    try:
        reply = kind.ask(first)
    except ServerFault as fault:
        if fault.kind == TIMED_OUT:
            raise
        if fault.kind == CRASHED:
            first_model(client)
        refusals.append(fault)
        return None
    except Unwilling as refusal:
        refusals.append(refusal)
        return None
    return reply if reply.tokens else None
