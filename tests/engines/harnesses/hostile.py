# SPDX-License-Identifier: Apache-2.0
"""Harnesses that misbehave: ``python hostile.py NAME CASE`` is honest except in one case (``*``: in every case).

Every function below is one way to misbehave at the request `run`, which it is given. It writes an answer itself, or
writes a file and returns the answer. Its decorator states the verdict and words of the reason.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.engines.harnesses import honest

CONFORMANT, WRONG, SKIPPED = "conformant", "not conformant", "skipped"
CRASHED, TIMED_OUT, BROKEN = "crashed", "timed out", "broken answer"
OK = {"ok": True}
Request = dict[str, Any]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Hostile:
    """One way to misbehave."""

    act: Callable[[Request], Answer]
    verdict: str
    words: str


HOSTILE: dict[str, Hostile] = {}


def becomes(verdict: str, words: str) -> Callable[[Callable[[Request], Answer]], Callable[[Request], Answer]]:
    def register(act: Callable[[Request], Answer]) -> Callable[[Request], Answer]:
        HOSTILE[act.__name__] = Hostile(act, verdict, words)
        return act

    return register


def write(text: str | bytes) -> None:
    os.write(1, text.encode() if isinstance(text, str) else text)


def honest_arrays(request: Request) -> honest.Arrays:
    return honest.run(request["runs"], request["taps"])


def save(request: Request, arrays: honest.Arrays) -> Answer:
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, request["out"])
    return OK


# ---- processes


@becomes(CRASHED, "ended with status 3 before it answered")
def exits(request: Request) -> Answer:
    os._exit(3)


@becomes(CRASHED, "ended with status 0 before it answered")
def leaves_politely(request: Request) -> Answer:
    os._exit(0)


@becomes(CRASHED, "was ended by SIGSEGV")
def segfaults(request: Request) -> Answer:
    os.kill(os.getpid(), signal.SIGSEGV)
    return OK


@becomes(CRASHED, "in the middle of its answer")
def dies_half_way(request: Request) -> Answer:
    write('{"ok": tr')
    os._exit(1)


@becomes(CRASHED, "its own error at run: out of memory")
def reports_an_error(request: Request) -> Answer:
    return {"error": "out of memory"}


@becomes(CRASHED, "ended with status 1")
def leaves_a_child_with_the_pipes(request: Request) -> Answer:
    if os.fork() == 0:
        time.sleep(600)
    os._exit(1)


@becomes(TIMED_OUT, "no answer to run within")
def hangs(request: Request) -> Answer:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    time.sleep(600)
    return OK


@becomes(CONFORMANT, "")
def floods_its_errors(request: Request) -> Answer:
    for _ in range(1000):
        os.write(2, b"x" * 10_000 + b"\n")
    return save(request, honest_arrays(request))


@becomes(CONFORMANT, "")
def has_a_child_that_keeps_the_pipes(request: Request) -> Answer:
    if os.fork() == 0:
        time.sleep(600)
    return save(request, honest_arrays(request))


# ---- lines


@becomes(BROKEN, "is not a line of JSON")
def prints_progress(request: Request) -> Answer:
    write("loading: 10%\n")
    return OK


@becomes(BROKEN, "is not a line of JSON")
def prints_bytes(request: Request) -> Answer:
    write(bytes(range(128, 256)) + b"\n")
    return OK


@becomes(BROKEN, "is not a line of JSON")
def prints_nothing(request: Request) -> Answer:
    write("\n")
    return OK


@becomes(BROKEN, "is not a line of JSON")
def nests(request: Request) -> Answer:
    write("[" * 100_000 + "\n")
    return OK


@becomes(BROKEN, "has no end")
def never_ends_its_line(request: Request) -> Answer:
    while True:
        os.write(1, b"x" * 65536)


@becomes(BROKEN, "more than one line")
def answers_twice(request: Request) -> Answer:
    write('{"ok": true}\n{"ok": true}\n')
    time.sleep(600)
    return OK


@becomes(BROKEN, "closed its output")
def closes_its_output(request: Request) -> Answer:
    os.close(1)
    time.sleep(600)
    return OK


@becomes(BROKEN, "a JSON object was expected")
def answers_a_list(request: Request) -> Answer:
    return ["ok", True]  # type: ignore[return-value]


@becomes(BROKEN, "'speed' is unknown")
def boasts(request: Request) -> Answer:
    return {"ok": True, "speed": 9000}


@becomes(BROKEN, "'ok' is false")
def is_not_ok(request: Request) -> Answer:
    return {"ok": False}


@becomes(BROKEN, "more than once")
def says_yes_and_no(request: Request) -> Answer:
    write('{"ok": false, "ok": true}\n')
    time.sleep(600)
    return OK


@becomes(BROKEN, "'issue' is")
def links_to_a_script(request: Request) -> Answer:
    return {"skipped": "see there", "issue": "javascript:alert(1)"}


@becomes(BROKEN, "'skipped' is")
def clears_the_screen(request: Request) -> Answer:
    return {"skipped": "\x1b[2J"}


@becomes(SKIPPED, "no top-1 yet")
def skips(request: Request) -> Answer:
    return {"skipped": "no top-1 yet", "issue": "https://example.org/1"}


# ---- files


@becomes(BROKEN, "it wrote no file")
def lies(request: Request) -> Answer:
    return OK


@becomes(BROKEN, "it wrote no file")
def writes_elsewhere(request: Request) -> Answer:
    out = Path(request["out"])
    return save({**request, "out": str(out.with_name("elsewhere.safetensors"))}, honest_arrays(request))


@becomes(BROKEN, "not a whole safetensors file")
def cuts_its_file_short(request: Request) -> Answer:
    save(request, honest_arrays(request))
    os.truncate(request["out"], os.path.getsize(request["out"]) // 2)
    return OK


@becomes(BROKEN, "not a whole safetensors file")
def writes_an_empty_file(request: Request) -> Answer:
    Path(request["out"]).touch()
    return OK


@becomes(BROKEN, "cannot be read")
def links_to_another_file(request: Request) -> Answer:
    os.symlink("/etc/hostname", request["out"])
    return OK


@becomes(BROKEN, "no ordinary file")
def makes_a_pipe(request: Request) -> Answer:
    os.mkfifo(request["out"])
    return OK


@becomes(BROKEN, "no ordinary file")
def makes_a_folder(request: Request) -> Answer:
    os.mkdir(request["out"])
    return OK


@becomes(BROKEN, "bytes, but at most")
def writes_a_terabyte(request: Request) -> Answer:
    save(request, honest_arrays(request))
    os.truncate(request["out"], 1 << 40)
    return OK


@becomes(BROKEN, "it wrote no file")
def removes_the_folder(request: Request) -> Answer:
    os.rmdir(Path(request["out"]).parent)
    return OK


# ---- tensors


@becomes(BROKEN, "lacks the tensor 'prefill/logits'")
def forgets_the_logits(request: Request) -> Answer:
    arrays = honest_arrays(request)
    del arrays["prefill/logits"]
    return save(request, arrays)


@becomes(BROKEN, "'prefill/secret', which was not asked for")
def adds_a_tensor(request: Request) -> Answer:
    return save(request, honest_arrays(request) | {"prefill/secret": np.zeros(3)})


@becomes(BROKEN, "shape")
def transposes(request: Request) -> Answer:
    arrays = honest_arrays(request)
    return save(request, arrays | {"prefill/logits": arrays["prefill/logits"].T})


@becomes(BROKEN, "dtype")
def counts_its_logits(request: Request) -> Answer:
    arrays = honest_arrays(request)
    return save(request, arrays | {"prefill/logits": arrays["prefill/logits"].astype(np.int32)})


@becomes(WRONG, "")
def gives_nan(request: Request) -> Answer:
    return save(request, {k: a if a.dtype.kind == "i" else a * np.nan for k, a in honest_arrays(request).items()})


@becomes(WRONG, "")
def gives_zero(request: Request) -> Answer:
    return save(request, {key: np.zeros_like(array) for key, array in honest_arrays(request).items()})


@becomes(WRONG, "")
def rounds_to_bfloat16(request: Request) -> Answer:
    arrays = honest_arrays(request)
    rounded = arrays["prefill/logits"].astype(ml_dtypes.bfloat16).astype(np.float32)
    return save(request, arrays | {"prefill/logits": rounded})


@becomes(WRONG, "decisions are illegal")
def always_takes_the_first_experts(request: Request) -> Answer:
    arrays = honest_arrays(request)
    first = {key: np.zeros_like(array) + np.arange(array.shape[1]) for key, array in arrays.items() if "experts" in key}
    return save(request, arrays | first)


# ---- what is seen only at the end, or at the next start

ENDS = {
    "ignores_stop": "it was killed",
    "ends_with_status_3": "ended with status 3",
    "refuses_to_stop": "its answer to stop",
    "dies_at_stop": "stop: it ended with status 1",
}
"""Harnesses that are honest up to `stop`, and words of the note about each."""


def end(name: str) -> Answer:
    if name == "refuses_to_stop":
        return {"error": "no"}
    if name == "dies_at_stop":
        os._exit(1)
    write('{"ok": true}\n')
    if name == "ends_with_status_3":
        os._exit(3)
    time.sleep(600)
    return OK


def main(name: str, case: str) -> None:
    def answer(request: Request) -> Answer:
        if request["command"] == "stop" and name in ENDS:
            return end(name)
        mine = case in ("*", honest.loaded.get("case"))
        if request["command"] == "run" and mine and name in HOSTILE:
            return HOSTILE[name].act(request)
        return honest.answer(request)

    honest.converse(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
