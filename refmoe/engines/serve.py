"""The engine's side of the protocol: requests on standard input, answers on standard output, for an adapter.

    python -m refmoe.engines.serve transformers attention=sdpa

What the engine prints goes to standard error, from the first import on: answers have a descriptor of their own.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save_file

from refmoe.engines.adapter import DTYPES, PROTOCOL, TAPS, Adapter, Skipped
from refmoe.engines.find_adapter import adapter_class
from refmoe.engines.messages import (
    LONGEST_SENTENCE,
    Message,
    MessageError,
    encode,
    expect_fields,
    names,
    parse,
    text,
    wrong,
)
from refmoe.errors import InputError
from refmoe.files.safetensors_file import one_line
from refmoe.spec.taps import step_of
from refmoe.traces.trace import OPS, Run

REQUESTS = {
    "start": ("protocol",),
    "load": ("checkpoint", "dtype"),
    "run": ("runs", "taps", "out"),
    "stop": (),
}
"""Per command its fields, all of them needed."""
RUN_FIELDS = ("run", "op", "sequence", "tokens", "positions", "past")


def serve(make: Callable[[], Adapter], requests: BinaryIO | None = None, answers: BinaryIO | None = None) -> None:
    """Answer requests until ``stop`` or the end of the input.

    make: what makes the adapter, such as its class; called at ``start``, so that a failure is an answer.
    requests, answers: standard input and output where not given, which the engine then cannot reach any more.
    """
    if requests is None or answers is None:
        requests, answers = private_channel()
    server = _Server(make)
    for line in requests:
        answer = server.answer(line)
        answers.write(encode(answer))
        answers.flush()
        if server.stopped:
            return


def private_channel() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output under descriptors of their own; descriptor 0 is empty, and 1 is standard error."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


class _Server:
    """One conversation."""

    def __init__(self, make: Callable[[], Adapter]) -> None:
        self.make = make
        self.adapter: Adapter | None = None
        self.stopped = False

    def answer(self, line: bytes) -> Message:
        """The answer to one request; whatever goes wrong is an answer too."""
        try:
            request = parse(line)
            command = request.get("command")
            if not isinstance(command, str) or command not in REQUESTS:
                raise wrong("command", command, f"one of {', '.join(REQUESTS)}")
            expect_fields(request, ("command", *REQUESTS[command]))
            answered: Message = getattr(self, f"_{command}")(request)
            return answered
        except Skipped as skipped:
            return {"skipped": _sentence(skipped.reason), "issue": skipped.issue}
        except (MessageError, InputError) as error:
            return {"error": _sentence(error)}
        except Exception as error:  # the engine's own, of any type
            traceback.print_exc()
            return {"error": _sentence(f"{type(error).__name__}: {error}")}

    def _start(self, request: Message) -> Message:
        if request["protocol"] != PROTOCOL:
            raise wrong("protocol", request["protocol"], f'"{PROTOCOL}"')
        try:
            self.adapter = self.make()
        except Skipped as skipped:
            raise InputError(skipped.reason) from None
        return description(self.adapter)

    def _load(self, request: Message) -> Message:
        checkpoint = Path(text(request, "checkpoint", os.pathconf("/", "PC_PATH_MAX")))
        if request["dtype"] not in DTYPES:
            raise wrong("dtype", request["dtype"], f"one of {', '.join(DTYPES)}")
        self._started().load(checkpoint, request["dtype"])
        return {"ok": True}

    def _run(self, request: Message) -> Message:
        runs = parse_runs(request["runs"])
        taps = names(request, "taps", TAPS)
        out = Path(text(request, "out", os.pathconf("/", "PC_PATH_MAX")))
        arrays = self._started().run(runs, frozenset(taps))
        wanted = {key: array for key, array in arrays.items() if step_of(key.partition("/")[2]) in taps}
        save_file({key: np.ascontiguousarray(array) for key, array in wanted.items()}, out)
        return {"ok": True}

    def _stop(self, _request: Message) -> Message:
        self.stopped = True
        return {"ok": True}

    def _started(self) -> Adapter:
        if self.adapter is None:
            raise MessageError("a request came before start")
        return self.adapter


def description(adapter: Adapter) -> Message:
    """The answer to ``start``."""
    return {
        "protocol": PROTOCOL, "name": adapter.name, "version": adapter.version, "dtypes": list(adapter.dtypes),
        "taps": list(adapter.taps), "abilities": list(adapter.abilities), "policies": dict(adapter.policies),
        "layouts": list(getattr(adapter, "layouts", ("hf",))),
    }  # fmt: skip


def parse_runs(found: Any) -> tuple[Run, ...]:
    """The field `runs` of a request. Raises MessageError."""
    if not isinstance(found, list) or not found or not all(isinstance(item, dict) for item in found):
        raise wrong("runs", found, "a list of at least one object")
    return tuple(_parse_run(item) for item in found)


def _parse_run(item: Message) -> Run:
    expect_fields(item, RUN_FIELDS)
    if item["op"] not in OPS:
        raise wrong("op", item["op"], f"one of {', '.join(OPS)}")
    for name in ("sequence", "past"):
        if not isinstance(item[name], int) or item[name] < 0:
            raise wrong(name, item[name], "an integer from 0")
    for name in ("tokens", "positions"):
        if not isinstance(item[name], list) or not all(isinstance(each, int) and each >= 0 for each in item[name]):
            raise wrong(name, item[name], "a list of integers from 0")
    return Run(
        text(item, "run"), item["op"], item["sequence"], tuple(item["tokens"]), tuple(item["positions"]), item["past"]
    )


def _sentence(error: object) -> str:
    return one_line(error)[:LONGEST_SENTENCE] or type(error).__name__


def options_of(arguments: list[str]) -> Mapping[str, str]:
    """The options of an adapter from arguments ``key=value``. Raises InputError."""
    options = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"option '{argument}': key=value was expected")
        options[key] = value
    return options


def main(arguments: list[str]) -> None:
    """``python -m refmoe.engines.serve NAME key=value ...``"""
    if not arguments:
        sys.exit("usage: python -m refmoe.engines.serve NAME [key=value ...]")
    name, *rest = arguments
    serve(lambda: adapter_class(name)(**options_of(rest)))
    # all is answered: an engine that takes its time to clear up would only be killed
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
