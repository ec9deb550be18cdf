# SPDX-License-Identifier: Apache-2.0
"""The protocol: both sides, the schema and the document accept and refuse the same messages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from refmoe.engines.adapter import Skipped
from refmoe.engines.adapters import SHIPPED
from refmoe.engines.harness import EngineError, Refused, describe, expect_done
from refmoe.engines.options import options_of
from refmoe.engines.process import Process
from refmoe.engines.protocol import MessageError, parse
from refmoe.engines.serve import Server
from refmoe.errors import InputError
from tests.engines.harnesses import honest
from tests.engines.running import HONEST, LIMIT

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(files("refmoe.engines").joinpath("protocol.schema.json").read_text())
DOCUMENT = files("refmoe.engines").joinpath("PROTOCOL.md").read_text()


def valid(message: Any, kind: str) -> bool:
    """Whether the schema takes a message as one of `$defs`."""
    return bool(Draft202012Validator({**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{kind}"}]}).is_valid(message))


def changed(message: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A message with some fields changed; a field of value `...` is removed."""
    return {key: value for key, value in {**message, **fields}.items() if value is not ...}


DESCRIPTIONS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"taps": ["logits"], "abilities": [], "policies": {"bfloat16": "hf-bfloat16"}}, True),
    ({"layouts": ["mistral", "hf"]}, True),
    ({"protocol": "2"}, False),
    ({"protocol": 1}, False),
    ({"name": ""}, False),
    ({"name": "x" * 201}, False),
    ({"name": None}, False),
    ({"version": 5}, False),
    ({"version": ...}, False),
    ({"dtypes": []}, False),
    ({"dtypes": ["int8"]}, False),
    ({"dtypes": ["float32", "float32"]}, False),
    ({"dtypes": "float32"}, False),
    ({"taps": ["logprobs", "logprobs.ids"]}, True),
    ({"taps": ["logits", "logprobs"]}, True),
    ({"taps": ["logits", "logprobs.ids"]}, False),
    ({"taps": ["embedding"]}, False),
    ({"taps": ["logits", "layers.0.residual"]}, False),
    ({"taps": ["logits", 3]}, False),
    ({"abilities": ["unread"]}, True),
    ({"abilities": ["fly"]}, False),
    ({"policies": []}, False),
    ({"policies": {"int8": "float32"}}, False),
    ({"policies": {"float32": 3}}, False),
    ({"policies": {"float32": "/tmp/mine.toml"}}, False),
    ({"layouts": []}, False),
    ({"layouts": ["gguf"]}, False),
    ({"layouts": ...}, False),
    ({"speed": 3}, False),
]


@pytest.mark.parametrize(("fields", "good"), DESCRIPTIONS, ids=lambda value: json.dumps(value, default=str)[:40])
def test_answers_to_start(fields: dict[str, Any], good: bool) -> None:
    answer = changed(dict(honest.DESCRIPTION), **fields)
    assert valid(answer, "start_answer") is good
    if good:
        assert describe(answer).layout == answer["layouts"][0]
    else:
        with pytest.raises(MessageError):
            describe(answer)


@pytest.mark.parametrize(
    "policies", [{"float32": "no-such-policy"}, {"float64": "float64"}, {"float32": "float32+cache=int3"}]
)
def test_a_policy_must_be_one_of_a_dtype_that_it_has(policies: dict[str, str]) -> None:
    """A schema cannot express this rule."""
    with pytest.raises(MessageError, match="policies"):
        describe({**honest.DESCRIPTION, "policies": policies})


ANSWERS: list[tuple[dict[str, Any], type[Exception] | None]] = [
    ({"ok": True}, None),
    ({"skipped": "no window"}, Refused),
    ({"skipped": "no window", "issue": None}, Refused),
    ({"skipped": "no window", "issue": "https://example.org"}, Refused),
    ({"error": "out of memory"}, EngineError),
    ({}, MessageError),
    ({"ok": False}, MessageError),
    ({"ok": 1}, MessageError),
    ({"ok": True, "skipped": "x"}, MessageError),
    ({"ok": True, "seconds": 3}, MessageError),
    ({"skipped": ""}, MessageError),
    ({"skipped": "x" * 2001}, MessageError),
    ({"skipped": True}, MessageError),
    ({"skipped": "x", "issue": "file:///etc/passwd"}, MessageError),
    ({"skipped": "x", "issue": 12}, MessageError),
    ({"skipped": "x", "error": "y"}, MessageError),
    ({"error": ""}, MessageError),
    ({"error": {"code": 3}}, MessageError),
]


@pytest.mark.parametrize(("answer", "raised"), ANSWERS, ids=lambda value: str(value)[:40])
def test_answers_to_load_and_run(answer: dict[str, Any], raised: type[Exception] | None) -> None:
    assert valid(answer, "run_answer") is (raised is not MessageError)
    assert valid(answer, "load_answer") is (raised is not MessageError)
    if raised is None:
        expect_done(answer, "run")
    else:
        with pytest.raises(raised):
            expect_done(answer, "run")


RUN = {"run": "prefill", "op": "prefill", "sequence": 0, "tokens": [1], "positions": [0], "past": 0}
REQUESTS: list[tuple[dict[str, Any], str | None]] = [
    ({"command": "start", "protocol": "1"}, None),
    ({"command": "load", "checkpoint": "/model", "dtype": "float32"}, None),
    ({"command": "run", "runs": [RUN], "taps": ["logits"], "out": "/out"}, None),
    ({"command": "run", "runs": [{**RUN, "read": False}], "taps": ["logits"], "out": "/out"}, None),
    ({"command": "run", "runs": [{**RUN, "read": 0}], "taps": ["logits"], "out": "/out"}, "'read' is 0"),
    ({"command": "stop"}, None),
    ({}, "'command' is null"),
    ({"command": "dance"}, "'command' is \"dance\""),
    ({"command": "start"}, "'protocol' is missing"),
    ({"command": "start", "protocol": "0"}, "'protocol' is \"0\""),
    ({"command": "load", "checkpoint": "/model"}, "'dtype' is missing"),
    ({"command": "load", "checkpoint": "/model", "dtype": "int8"}, "'dtype' is \"int8\""),
    ({"command": "load", "checkpoint": "/model", "dtype": "float32", "speed": 1}, "'speed' is unknown"),
    ({"command": "run", "runs": [], "taps": ["logits"], "out": "/out"}, "'runs' is []"),
    ({"command": "run", "runs": [{**RUN, "op": "fly"}], "taps": ["logits"], "out": "/out"}, "'op' is \"fly\""),
    ({"command": "run", "runs": [{**RUN, "past": -1}], "taps": ["logits"], "out": "/out"}, "'past' is -1"),
    ({"command": "run", "runs": [{**RUN, "tokens": ["a"]}], "taps": ["logits"], "out": "/out"}, "'tokens' is"),
    ({"command": "run", "runs": [{**RUN, "pad": 0}], "taps": ["logits"], "out": "/out"}, "'pad' is unknown"),
    ({"command": "run", "runs": [RUN], "taps": ["gist"], "out": "/out"}, "'taps' is"),
    ({"command": "run", "runs": [RUN], "taps": ["logits"], "out": ""}, "'out' is"),
    ({"command": "stop", "now": True}, "'now' is unknown"),
]


class Idle:
    """An adapter that does nothing."""

    name, version, dtypes, taps, abilities = "idle", "1", ("float32",), ("logits",), ()
    policies: dict[str, str] = {}  # noqa: RUF012

    def load(self, checkpoint: Any, dtype: str) -> None:
        pass

    def run(self, runs: Any, taps: Any) -> Any:
        raise Skipped("idle")


@pytest.mark.parametrize(("request_", "wrong"), REQUESTS, ids=lambda value: str(value)[:60])
def test_requests(request_: dict[str, Any], wrong: str | None) -> None:
    """The server and the schema agree on each request."""
    server = Server(Idle)
    server.answer(b'{"command": "start", "protocol": "1"}')
    answer = server.answer(json.dumps(request_).encode())
    assert valid(request_, "request") is (wrong is None)
    assert (wrong or "") in answer.get("error", "")
    assert ("error" in answer) is (wrong is not None)
    assert valid(answer, f"{request_['command']}_answer" if wrong is None else "error")


def test_requests_before_start_are_refused() -> None:
    answer = Server(Idle).answer(b'{"command": "load", "checkpoint": "/m", "dtype": "float32"}')
    assert answer == {"error": "a request came before start"}


@pytest.mark.parametrize("line", ["", "[]", "3", "{", '{"a": 1, "a": 2}', "nonsense", '"' + "x" * 10_000, b"\xff\xfe"])
def test_what_is_no_object_is_one_short_sentence(line: str | bytes) -> None:
    with pytest.raises(MessageError) as raised:
        parse(line)
    assert len(str(raised.value)) < 300
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("error", [RuntimeError("\x1b[2J" + "long " * 10_000), AssertionError(), KeyError("x\ny")])
def test_whatever_an_engine_raises_is_an_answer(error: Exception) -> None:
    class Broken(Idle):
        def load(self, checkpoint: Any, dtype: str) -> None:
            raise error

    server = Server(Broken)
    server.answer(b'{"command": "start", "protocol": "1"}')
    answer = server.answer(b'{"command": "load", "checkpoint": "/m", "dtype": "float32"}')
    assert valid(answer, "error")
    with pytest.raises(EngineError, match=type(error).__name__):
        expect_done(answer, "load")


def test_every_example_of_the_document_is_valid() -> None:
    """A block of the document is indented lines that hold one or several messages."""
    seen = set()
    for block in re.findall(r"\n\n((?:    .*\n)+)", DOCUMENT):
        decoder, text = json.JSONDecoder(), block.strip()
        while text.startswith("{"):
            message, end = decoder.raw_decode(text)
            text = text[end:].lstrip()
            kinds = [kind for kind in ("request", "description", "done", "skipped", "error") if valid(message, kind)]
            assert len(kinds) == 1, message
            seen.add(message.get("command", kinds[0]))
    assert seen == {"start", "load", "run", "stop", "description", "done", "skipped", "error"}


def test_the_honest_harness_speaks_as_the_schema_says() -> None:
    process = Process(HONEST)
    assert valid(process.ask({"command": "start", "protocol": "1"}, LIMIT), "description")
    assert process.stop() is None


def test_the_engines_side_needs_no_packages_but_three() -> None:
    """An engine's environment has them and the engine; refmoe need not be installed there."""
    script = """
import sys
for name in ("refmoe.engines.serve", *(f"refmoe.engines.adapters.{each}" for each in sys.argv[1:])):
    __import__(name)
print(*sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *SHIPPED], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert {*done.stdout.split()} - {"__main__"} == {"refmoe", "numpy", "ml_dtypes", "safetensors"}


def test_options_are_keys_and_values() -> None:
    assert options_of(["attention=sdpa", "path=/a=b"]) == {"attention": "sdpa", "path": "/a=b"}
    for wrong in ("attention", "=x", "a b=c"):
        with pytest.raises(InputError, match="key=value was expected"):
            options_of([wrong])


def test_a_changed_policy_may_be_declared() -> None:
    described = describe({**honest.DESCRIPTION, "policies": {"float32": "float32+cache=float16"}})
    assert described.policies == {"float32": "float32+cache=float16"}


def test_the_document_names_every_option_that_leaves_a_file() -> None:
    for option in ("--out", "--known", "--keep", "--write-ci"):
        assert f"`{option}" in DOCUMENT, option
