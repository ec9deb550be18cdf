# SPDX-License-Identifier: Apache-2.0
"""An HTTP server over a model, on a thread of this process: honest, with a known bug, or hostile.

It computes in float64 and answers in float32. A behaviour replaces or spoils an answer.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any

import numpy as np

from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.bugs.catalogue import MUTANTS
from refmoe.engines.server.replies import read_text, spelled
from refmoe.engines.server.served import served_case
from refmoe.profiles.load import policy
from refmoe.spec.model import Caches, Model, forward
from refmoe.steps.rounding import CUT_STEPS
from refmoe.verifier.diagnosis.prediction import PlainOps

VOCAB = served_case().config.vocab


class Engine:
    """A model that generates greedily, with the log-probabilities of each token."""

    def __init__(self, mutant: str | None = None) -> None:
        case = served_case()
        parameters = case.checkpoint().parameters
        model = Model(case.config, parameters, CUT_STEPS)
        self._model = model if mutant is None else MUTANTS[mutant].model(case.config, parameters)
        self._ops: Any = PlainOps(policy("float32"), None, frozenset(), WeightCache(1 << 26), WeightCache(0))
        self._lock = Lock()

    def run(self, tokens: Sequence[int], count: int) -> tuple[list[int], Any]:
        """Generated tokens, and the log-probabilities after each token but the last generated one: [T, V]."""
        made: list[int] = []
        caches: Caches | None = None
        found, new, past = [], list(tokens), 0
        with self._lock:
            while len(made) < count:
                positions = self._ops.integers(range(past, past + len(new)))
                logits, caches = forward(self._ops, self._model, self._ops.integers(new), positions, caches)
                found.append(logits)
                past += len(new)
                made.append(int(np.argmax(logits[-1])))
                new = made[-1:]
        x = np.concatenate(found)
        x = x - x.max(-1, keepdims=True)
        return made, (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)


@cache
def engine(mutant: str | None = None) -> Engine:
    """One engine for each bug."""
    return Engine(mutant)


# ---- the APIs

Body = dict[str, Any]


def listed(row: Any, count: int) -> list[Body]:
    """The largest entries of a row, as llama.cpp lists them."""
    return [{"id": int(i), "logprob": float(row[i])} for i in np.argsort(-row, kind="stable")[:count]]


def by_name(row: Any, count: int, name: Callable[[int], str]) -> dict[str, float]:
    """The largest entries of a row, as OpenAI's API lists them."""
    return {name(int(i)): float(row[i]) for i in np.argsort(-row, kind="stable")[:count]}


def cut_at_stop(tokens: list[int], stop: Any) -> list[int]:
    """The tokens before the first one whose word is a stop."""
    words = stop or []
    place = next((i for i, token in enumerate(tokens) if spelled([token]) in words), len(tokens))
    return tokens[:place]


def llama(source: Engine, body: Body) -> Any:
    """``/completion`` of llama.cpp."""
    if isinstance(body["prompt"][0], list):
        return [{**llama(source, {**body, "prompt": each}), "index": i} for i, each in enumerate(body["prompt"])]
    made, rows = source.run(body["prompt"], body["n_predict"])
    made = cut_at_stop(made, body.get("stop"))
    first = len(body["prompt"]) - 1
    entries = [
        {
            "id": token,
            "logprob": float(rows[first + i, token]),
            "top_logprobs": listed(rows[first + i], body["n_probs"]),
        }
        for i, token in enumerate(made)
    ]
    return {"tokens": made, "content": spelled(made), "completion_probabilities": entries, "stop_type": "limit"}


def openai(source: Engine, body: Body, most: int = VOCAB, echo_off_by: int = 0, text_only: bool = False,
           numbers: bool = True) -> Any:  # fmt: skip
    """``/v1/completions`` of OpenAI's API, in the manner of vLLM, of llama-cpp-python or of a server without numbers.

    most: the most entries
    echo_off_by: the positions by which the rows of an echo are too late. There are none after the last row, so that the
        last tokens have no entry. In this way llama-cpp-python 0.3.36 pairs its tokens with its rows
    text_only: whether it takes texts alone   numbers: whether it gives log-probabilities
    """
    prompts = body["prompt"]
    many = isinstance(prompts, list) and not isinstance(prompts[0], int)
    choices = []
    for index, prompt in enumerate(prompts if many else [prompts]):
        if isinstance(prompt, list) and text_only:
            raise Refusal(400, "prompt must be a string.")
        tokens = list(read_text(prompt, VOCAB)) if isinstance(prompt, str) else prompt
        made, rows = source.run(tokens, body["max_tokens"])
        made = cut_at_stop(made, body.get("stop"))
        first = len(tokens) - 1
        choice: Body = {"index": index, "text": spelled(made), "finish_reason": "length", "logprobs": None}
        if numbers and "logprobs" in body:
            count = min(int(body["logprobs"]), most)
            word: Callable[[int], str] = lambda i: f"<{i}>"  # noqa: E731
            name = (lambda i: f"token_id:{i}") if body.get("return_tokens_as_token_ids") else word
            if body.get("echo"):
                whole = [*tokens, *made]
                shown = [None, *(by_name(row, count, name) for row in rows[echo_off_by:])]
                choice |= {
                    "text": spelled(whole),
                    "logprobs": {"tokens": list(map(word, whole[: len(shown)])), "top_logprobs": shown},
                }
            else:
                shown = [by_name(rows[first + i], count, name) for i in range(len(made))]
                choice["logprobs"] = {"tokens": [name(token) for token in made], "top_logprobs": shown}
            if "prompt_logprobs" in body:
                choice["prompt_logprobs"] = [None] + [
                    {str(i): {"logprob": value} for i, value in ((e["id"], e["logprob"]) for e in listed(row, count))}
                    for row in rows[:first]
                ]
                choice["token_ids"] = made
        choices.append(choice)
    return {"object": "text_completion", "choices": choices}


class Refusal(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


Answer = Callable[[str, Body], Any]
"""From the path and the body of a request to the JSON that answers it. It may raise Refusal."""
Spoil = Callable[["Handler", bytes], bool]
"""Sends an answer in its own manner, and says whether it has done so."""


def honest_llama(mutant: str | None = None) -> Answer:
    """A server of llama.cpp's API."""

    def answer(path: str, body: Body) -> Any:
        if path != "/completion":
            raise Refusal(404, "no such path")
        return llama(engine(mutant), body)

    return answer


def honest_openai(
    mutant: str | None = None, refused: Sequence[str] = (), decisions: bool = False, **manner: Any
) -> Answer:  # fmt: skip
    """A server of OpenAI's API.   refused: fields that it does not take   manner: as for `openai`

    decisions: whether it has a path for decisions, and no model that can make any, as vLLM 0.32
    """

    def answer(path: str, body: Body) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "m"}]}
        if decisions and path == "/v1/systemone":
            raise Refusal(501 if body else 400, "The model does not support the structured decision API")
        if path != "/v1/completions":
            raise Refusal(404, "no such path")
        for field in refused:
            if field in body:
                raise Refusal(422, f"unexpected field {field}")
        return openai(engine(mutant), body, **manner)

    return answer


class Handler(BaseHTTPRequestHandler):
    """Answers by the functions of its server."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Body) -> None:
        status = 200
        try:
            found = self.server.answer(self.path, body)
        except Refusal as refusal:
            status, found = refusal.status, {"error": {"message": str(refusal)}}
        data = json.dumps(found).encode()
        with suppress(OSError):
            if status != 200 or not self.server.spoil(self, data):
                self.send(data, status)

    def send(self, data: bytes, status: int = 200, length: int | None = None) -> None:
        """Send an answer.   length: the one that it states; None: its own"""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def raw(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        """Send an answer with these headers alone."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(answer: Answer, spoil: Spoil = lambda *_: False) -> Iterator[str]:
    """A server on a free port of this machine.   returns: its URL"""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.answer, server.spoil, server.over = answer, spoil, Event()
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


# ---- hostile behaviours


def from_then_on(number: int, spoil: Spoil) -> Spoil:
    """Behave from an answer on.   number: of the answer, from 0"""
    seen = [0]

    def some(handler: Handler, data: bytes) -> bool:
        seen[0] += 1
        return seen[0] > number and spoil(handler, data)

    return some


def once(number: int, spoil: Spoil) -> Spoil:
    """Behave at one answer."""
    seen = [0]

    def some(handler: Handler, data: bytes) -> bool:
        seen[0] += 1
        return seen[0] == number + 1 and spoil(handler, data)

    return some


def for_a_while(number: int, seconds: float, spoil: Spoil) -> Spoil:
    """Behave from an answer on for some seconds.   number: of the answer, from 0"""
    seen, begun = [0], [0.0]

    def some(handler: Handler, data: bytes) -> bool:
        seen[0] += 1
        if seen[0] == number + 1:
            begun[0] = time.monotonic()
        return seen[0] > number and time.monotonic() < begun[0] + seconds and spoil(handler, data)

    return some


def stalls(handler: Handler, _data: bytes) -> bool:
    handler.server.over.wait()
    return True


def drips(handler: Handler, data: bytes) -> bool:
    """A byte now and then, so that no single wait is long."""
    handler.send(b"", length=len(data))
    for byte in data:
        if handler.server.over.wait(0.05):
            break
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
    return True


def drips_headers(handler: Handler, _data: bytes) -> bool:
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10000:
        if handler.server.over.wait(0.05):
            break
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
    return True


def drops(handler: Handler, _data: bytes) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def cut_short(handler: Handler, data: bytes) -> bool:
    handler.send(data[: len(data) // 2], length=len(data))
    handler.close_connection = True
    return True


def sends(text: bytes) -> Spoil:
    def spoil(handler: Handler, _data: bytes) -> bool:
        handler.send(text)
        return True

    return spoil


def no_http(handler: Handler, _data: bytes) -> bool:
    handler.wfile.write(b"220 mail ready\r\n")
    handler.close_connection = True
    return True


def endless(handler: Handler, _data: bytes) -> bool:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    with suppress(OSError):
        while not handler.server.over.is_set():
            handler.wfile.write(b"[" * (1 << 20))
    handler.close_connection = True
    return True


def answers(status: int, data: bytes = b'{"error": "no"}', **headers: str) -> Spoil:
    """Answer with a status.   headers: their names with underscores"""

    def spoil(handler: Handler, _data: bytes) -> bool:
        handler.raw(status, data, {"Content-Length": str(len(data)), **named(headers)})
        return True

    return spoil


busy = answers(503)


def with_headers(encode: Callable[[bytes], bytes] = lambda data: data, **headers: str) -> Spoil:
    """Answer in full, in another form.   headers: their names with underscores"""

    def spoil(handler: Handler, data: bytes) -> bool:
        made = encode(data)
        length = {} if "Transfer_Encoding" in headers else {"Content-Length": str(len(made))}
        handler.raw(200, made, {**length, **named(headers)})
        return True

    return spoil


def named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def in_chunks(data: bytes) -> bytes:
    """A body as chunks of seven bytes."""
    parts = [data[i : i + 7] for i in range(0, len(data), 7)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def stays_open(handler: Handler, data: bytes) -> bool:
    """Answer in full, and leave the connection as it is."""
    handler.send(data)
    handler.server.over.wait()
    return True


def continues(handler: Handler, _data: bytes) -> bool:
    """Say without end that the answer will come."""
    with suppress(OSError):
        while not handler.server.over.wait(0.01):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return True


def changed(change: Callable[[Any], Any]) -> Spoil:
    """Answer with a changed value."""

    def spoil(handler: Handler, data: bytes) -> bool:
        handler.send(json.dumps(change(json.loads(data))).encode())
        return True

    return spoil


def slowly(seconds: float) -> Spoil:
    def spoil(_handler: Handler, _data: bytes) -> bool:
        time.sleep(seconds)
        return False

    return spoil
