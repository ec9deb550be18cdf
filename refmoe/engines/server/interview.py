# SPDX-License-Identifier: Apache-2.0
"""The questions that a server is asked, and its answers.

The same prompts are asked in several ways, because a server serves them by several paths: a prompt as a whole, a
prefix after a prefix, one generated token after another, a prompt whose beginning is in a cache, several at once. Each
way is a law as well: whichever way a server is asked, each row and each token must be a legal one of the model, given
the tokens before it. So nothing is compared with what the same server said another way, and no tolerance is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from refmoe.engines.process import CRASHED
from refmoe.engines.server.asking import FAILED, Client, ServerFault, Unwilling
from refmoe.engines.server.kinds import Kind, Question
from refmoe.engines.server.replies import Reply, Row

PROMPT, GENERATED, PREFIXES, GROWN = "the prompt", "generated", "each prefix", "each prefix, from the cache"
FED_BACK, TOGETHER, BATCH = "its own reply fed back", "several requests at once", "several prompts in one request"
STOPPED, CANCELLED = "a stop token", "after a cancelled request"
WAYS: Mapping[str, str] = {
    PROMPT: "the distributions after each token of a prompt, from one request",
    GENERATED: "the tokens that follow a prompt, and their distributions",
    PREFIXES: "one request for each prefix of a prompt, without a cache",
    GROWN: "one request for each prefix of a prompt, where a cache may hold the one before",
    FED_BACK: "a prompt that is an earlier one with its reply",
    TOGETHER: "all prompts in requests of their own, at the same time",
    BATCH: "all prompts in one request",
    STOPPED: "a request that names a token before which the reply ends",
    CANCELLED: "a request after another one was broken off in the middle of its answer",
}
"""The ways in which a server is asked, in order. Each is a law: it must change no answer beyond rounding."""
LATER = 8
"""Tokens that are generated in the ways after the first."""
ABANDONED = 64
"""Tokens that the request asks for which is broken off."""
WAIT = 5.0
"""Seconds to wait for the first bytes of that request's answer."""


@dataclass(frozen=True)
class Said:
    """The answers of a server about one text, in one way of asking."""

    way: str
    tokens: tuple[int, ...]
    """The text: a prompt, and the generated tokens that the server went on from."""
    given: int
    """The number of tokens that were given as the prompt. The others came one by one."""
    rows: Mapping[int, Row] = field(default_factory=dict)
    """The distributions after tokens of the text, by the index of the token."""
    choices: Mapping[int, int] = field(default_factory=dict)
    """The tokens that were generated after tokens of the text, by the index of the token."""


@dataclass(frozen=True)
class Broken:
    """A law of servers that an answer breaks, or a request that failed."""

    way: str
    kind: str
    """`BROKEN_LAW`, or the kind of a `ServerFault`."""
    reason: str


BROKEN_LAW = "broken law"


@dataclass
class Answers:
    """All that a server has said."""

    said: list[Said] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """The ways of asking that the server does not offer, and why."""
    alive: bool = True
    """Whether it answered to the end."""


class Interview:
    """Asks a server all questions. No failure of the server ends it, unless the server no longer answers at all."""

    def __init__(self, client: Client, kind: Kind, prompts: Sequence[tuple[int, ...]], count: int, end: int) -> None:
        """count: the tokens to generate after each prompt   end: the token that ends a text"""
        self._client, self._kind, self._prompts, self._count = client, kind, prompts, count
        self._end = end
        self._replies: dict[tuple[int, ...], Reply] = {}
        self.answers = Answers()

    def go(self, progress: Callable[[], None] = lambda: None) -> Answers:
        """All answers.   progress: called after each way of asking"""
        for way, ask in self._plan():
            if self.answers.alive:
                self._guarded(way, ask)
            progress()
        return self.answers

    def _plan(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            (GENERATED, self._generated),
            (PREFIXES if self._kind.chooses_cache else GROWN, lambda: self._prefixes(cached=False)),
            *([(GROWN, lambda: self._prefixes(cached=True))] if self._kind.chooses_cache else []),
            (FED_BACK, self._fed_back),
            (TOGETHER, self._together),
            (BATCH, self._batch),
            (STOPPED, self._stopped),
            (CANCELLED, self._cancelled),
        ]

    def _guarded(self, way: str, ask: Callable[[], None]) -> None:
        """Ask in one way. A failure is written down, and the server is asked whether it still answers."""
        try:
            ask()
        except Unwilling as refusal:
            self.answers.alive = self._lives(way)
            if way in (BATCH, STOPPED):
                self.answers.refused[way] = refusal.reason
            elif refusal.status in FAILED:
                self._break(way, CRASHED, refusal.reason)
            else:
                self._break(way, BROKEN_LAW, f"a request like an earlier one was refused: {refusal.reason}")
        except ServerFault as fault:
            self._break(way, fault.kind, fault.reason)
            self.answers.alive = self._lives(way)

    def _lives(self, way: str) -> bool:
        """Whether the server still answers a question that it answered before."""
        shortest = min(self._prompts, key=len)
        try:
            self._kind.ask(Question(shortest))
        except (ServerFault, Unwilling) as fault:
            self._break(way, CRASHED, f"it no longer answers afterwards: {fault.reason}")
            return False
        return True

    def _break(self, way: str, kind: str, reason: str) -> None:
        self.answers.broken.append(Broken(way, kind, reason))

    # ---- the ways

    def _generated(self) -> None:
        for prompt in self._prompts:
            question = Question(prompt, self._count, cached=False)
            reply = self._kind.ask(question)
            self._replies[prompt] = reply
            self._keep(GENERATED, question, reply)
            if reply.prompt_rows:
                self.answers.said.append(Said(PROMPT, prompt, len(prompt), rows=dict(reply.prompt_rows)))

    def _prefixes(self, cached: bool) -> None:
        """Ask for the token after each prefix of the first prompt, in growing order."""
        tokens = self._prompts[0]
        rows, choices = {}, {}
        for length in range(1, len(tokens) + 1):
            reply = self._kind.ask(Question(tokens[:length], 1, cached=cached))
            if 0 in reply.rows:
                rows[length - 1] = reply.rows[0]
            if reply.tokens:
                choices[length - 1] = reply.tokens[0]
        way = GROWN if cached or not self._kind.chooses_cache else PREFIXES
        given = 1 if cached else len(tokens)
        self.answers.said.append(Said(way=way, tokens=tokens, given=given, rows=rows, choices=choices))

    def _fed_back(self) -> None:
        """Ask for the continuation of a prompt with its whole reply, after a long reply and after one token."""
        for prompt in self._prompts[1:]:
            before = self._replies.get(prompt)
            if before is not None and before.tokens:
                question = Question(prompt + before.tokens, LATER)
                self._keep(FED_BACK, question, self._kind.ask(question))
        shortest = min(self._prompts, key=len)[:2]
        reply = self._kind.ask(Question(shortest))
        question = Question(shortest + reply.tokens[:1])
        self._keep(FED_BACK, question, self._kind.ask(question))

    def _together(self) -> None:
        questions = [Question(each, LATER) for each in self._prompts]
        with ThreadPoolExecutor(len(questions)) as threads:
            for question, reply in zip(questions, threads.map(self._kind.ask, questions), strict=True):
                self._keep(TOGETHER, question, reply)

    def _batch(self) -> None:
        questions = [Question(each, LATER) for each in self._prompts]
        for question, reply in zip(questions, self._kind.ask_all(questions), strict=True):
            self._keep(BATCH, question, reply)

    def _stopped(self) -> None:
        """Ask with a stop token. It is the first token of an earlier reply that had not come before in it."""
        prompt = self._prompts[0]
        before = self._replies.get(prompt)
        if before is None:
            return
        late = [i for i, token in enumerate(before.tokens[: self._count]) if i and token not in before.tokens[:i]]
        if not late:
            return
        place = late[min(1, len(late) - 1)]
        question = Question(prompt, self._count, stop=(before.tokens[place],))
        reply = self._kind.ask(question)
        if question.stop[0] in reply.tokens[:-1]:
            reason = f"its reply goes on after the token {question.stop[0]}, by which it was to end"
            self._break(STOPPED, BROKEN_LAW, reason)
        self._keep(STOPPED, question, reply)

    def _cancelled(self) -> None:
        prompt = self._prompts[-1]
        self._kind.cancel(Question(self._prompts[0], ABANDONED), min(WAIT, self._client.limit))
        question = Question(prompt, LATER)
        self._keep(CANCELLED, question, self._kind.ask(question))

    # ---- what is kept of a reply

    def _keep(self, way: str, question: Question, reply: Reply) -> None:
        """Keep a reply, and hold it against the laws that it can break by itself."""
        before = any((each.way, each.kind) == (way, BROKEN_LAW) for each in self.answers.broken)
        for reason in () if before else _faults(question, reply):
            self._break(way, BROKEN_LAW, reason)
        made = reply.tokens[: question.count]
        last = len(question.tokens) - 1
        choices = {last + i: token for i, token in enumerate(made)}
        text = question.tokens + made[:-1]
        if len(made) < question.count and not question.stop and made[-1:] != (self._end,):
            # to end a reply early is to choose the token that ends a text
            choices[last + len(made)] = self._end
            text = question.tokens + made
        self.answers.said.append(
            Said(
                way=way,
                tokens=text,
                given=len(question.tokens),
                rows={last + i: row for i, row in reply.rows.items() if last + i < len(text)},
                choices=choices,
            )
        )


def _faults(question: Question, reply: Reply) -> Iterator[str]:
    """The laws that a reply breaks whatever the model is, each as a sentence."""
    if len(reply.tokens) > question.count:
        yield f"its reply has {len(reply.tokens)} tokens, but {question.count} were asked for"
    for place, token in reply.reported.items():
        if place < len(reply.tokens) and token != reply.tokens[place]:
            yield (
                f"the token {token} stands beside the log-probabilities of generated token {place}, but its reply has "
                f"{reply.tokens[place]} there"
            )
            break
    if reply.rows and len(reply.rows) < len(reply.tokens) - bool(question.stop):  # a stop token may stand without
        lacking = next(i for i in range(len(reply.tokens)) if i not in reply.rows)
        yield f"generated token {lacking} has no log-probabilities, but others of its reply have"


def without(answers: Answers, entries: int, rows: bool = True, generated: bool = True) -> Answers:
    """The answers of a server that gives less.

    entries: of each row, the largest so many   rows: whether it gives rows at all
    generated: whether it gives rows of generated tokens
    """
    kept = []
    for said in answers.said:
        wanted = rows and (generated or said.way == PROMPT)
        left = {place: row.first(entries) for place, row in said.rows.items()} if wanted else {}
        if left or said.choices:
            kept.append(replace(said, rows=left))
    return replace(answers, said=kept)
