# SPDX-License-Identifier: Apache-2.0
"""The engine's side of the protocol: requests on standard input, answers on standard output, for an adapter.

    python -m refmoe.engines.serve transformers attention=sdpa

Everything that the engine prints goes to standard error, from the first import on: answers have their own descriptor.
This module needs no packages but NumPy, ml_dtypes and safetensors.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save_file

from refmoe.engines.adapter import Adapter, Skipped, adapter_class
from refmoe.engines.options import made, options_of
from refmoe.engines.protocol import (
    DTYPES,
    EVERY_TAP,
    LONGEST_SENTENCE,
    PROTOCOL,
    UNREAD,
    Message,
    MessageError,
    encode,
    expect_fields,
    names_field,
    parse,
    text_field,
    wrong_field,
)
from refmoe.errors import InputError
from refmoe.files.sentences import one_line
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


def serve(make: Callable[[], Adapter]) -> None:
    """Answer requests on standard input until ``stop`` or the end of the input.

    make: the adapter's class or a factory. It is called at ``start``, so that its failure becomes an answer.
    """
    requests, answers = private_channel()
    server = Server(make)
    for line in requests:
        answer = server.answer(line)
        answers.write(encode(answer))
        answers.flush()
        if server.stopped:
            return


def private_channel() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output under new descriptors, which the engine cannot reach.

    Afterwards descriptor 0 is empty, and descriptor 1 is standard error.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


class Server:
    """One conversation with the runner."""

    def __init__(self, make: Callable[[], Adapter]) -> None:
        """make: as for `serve`."""
        self.make = make
        self.adapter: Adapter | None = None
        self.stopped = False

    def answer(self, line: bytes) -> Message:
        """The answer to one request. An exception of any kind becomes an answer too."""
        try:
            request = parse(line)
            command = request.get("command")
            if not isinstance(command, str) or command not in REQUESTS:
                raise wrong_field("command", command, f"one of {', '.join(REQUESTS)}")
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
            raise wrong_field("protocol", request["protocol"], f'"{PROTOCOL}"')
        try:
            self.adapter = self.make()
        except Skipped as skipped:
            raise InputError(skipped.reason) from None
        return description(self.adapter)

    def _load(self, request: Message) -> Message:
        checkpoint = Path(text_field(request, "checkpoint", os.pathconf("/", "PC_PATH_MAX")))
        if request["dtype"] not in DTYPES:
            raise wrong_field("dtype", request["dtype"], f"one of {', '.join(DTYPES)}")
        self._started().load(checkpoint, request["dtype"])
        return {"ok": True}

    def _run(self, request: Message) -> Message:
        runs = parse_runs(request["runs"])
        taps = names_field(request, "taps", EVERY_TAP)
        out = Path(text_field(request, "out", os.pathconf("/", "PC_PATH_MAX")))
        arrays = self._started().run(runs, frozenset(taps))
        read = {run.run for run in runs if run.read}
        wanted = {
            key: array
            for key, array in arrays.items()
            if key.partition("/")[0] in read and step_of(key.partition("/")[2]) in taps
        }
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
    """The answer to ``start``.

    Every adapter may be asked for a call that nobody reads, because the server leaves its arrays out.
    """
    abilities = [*dict.fromkeys((*adapter.abilities, UNREAD))]
    return {
        "protocol": PROTOCOL, "name": adapter.name, "version": adapter.version, "dtypes": list(adapter.dtypes),
        "taps": list(adapter.taps), "abilities": abilities, "policies": dict(adapter.policies),
        "layouts": list(getattr(adapter, "layouts", ("hf",))),
    }  # fmt: skip


def parse_runs(found: Any) -> tuple[Run, ...]:
    """The field `runs` of a request. Raises MessageError."""
    if not isinstance(found, list) or not found or not all(isinstance(item, dict) for item in found):
        raise wrong_field("runs", found, "a list of at least one object")
    return tuple(_parse_run(item) for item in found)


def _parse_run(item: Message) -> Run:
    expect_fields(item, RUN_FIELDS, ("read",))
    if item["op"] not in OPS:
        raise wrong_field("op", item["op"], f"one of {', '.join(OPS)}")
    for name in ("sequence", "past"):
        if not isinstance(item[name], int) or item[name] < 0:
            raise wrong_field(name, item[name], "an integer from 0")
    for name in ("tokens", "positions"):
        if not isinstance(item[name], list) or not all(isinstance(each, int) and each >= 0 for each in item[name]):
            raise wrong_field(name, item[name], "a list of integers from 0")
    if not isinstance(item.get("read", True), bool):
        raise wrong_field("read", item["read"], "true or false")
    return Run(
        run=text_field(item, "run"),
        op=item["op"],
        sequence=item["sequence"],
        tokens=tuple(item["tokens"]),
        positions=tuple(item["positions"]),
        past=item["past"],
        read=item.get("read", True),
    )


def _sentence(error: object) -> str:
    return one_line(error)[:LONGEST_SENTENCE] or type(error).__name__


def main(arguments: list[str]) -> None:
    """``python -m refmoe.engines.serve NAME key=value ...``"""
    if not arguments:
        sys.exit("usage: python -m refmoe.engines.serve NAME [key=value ...]")
    name, *rest = arguments
    serve(lambda: made(name, adapter_class(name), options_of(rest)))
    # leave at once: an engine that takes long to clean up would be killed anyway
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
