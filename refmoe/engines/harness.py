# SPDX-License-Identifier: Apache-2.0
"""A harness as the runner sees it: its description, the models that it loads, the runs that it executes."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from refmoe.engines.process import BROKEN, CRASHED, HarnessError, Process
from refmoe.engines.protocol import (
    ABILITIES,
    DTYPES,
    EVERY_TAP,
    LAYOUTS,
    LONGEST_NAME,
    PROTOCOL,
    Message,
    MessageError,
    expect_fields,
    names_field,
    text_field,
    wrong_field,
)
from refmoe.errors import InputError
from refmoe.parallel import in_background
from refmoe.profiles.load import policy as named_policy
from refmoe.spec.taps import IDS, LOGPROBS
from refmoe.traces.trace import Run

OTHERWISE = "started again, it describes itself in another way than the first time"
START_FIELDS = ("protocol", "name", "version", "dtypes", "taps", "abilities", "policies", "layouts")


class Refused(Exception):
    """The harness has skipped a request, and says why."""

    def __init__(self, reason: str, issue: str | None) -> None:
        """reason: one sentence.   issue: a URL."""
        super().__init__(reason)
        self.reason = reason
        self.issue = issue


class HarnessUnusable(InputError):
    """A harness does not start, or fails the smoke test by a fault of its own."""

    def __init__(self, reason: str, log: str) -> None:
        """log: the end of its standard error."""
        super().__init__(reason)
        self.log = log


class EngineError(HarnessError):
    """The engine reports an error of its own; the process goes on."""


@dataclass(frozen=True)
class Description:
    """The answer to ``start``."""

    name: str
    version: str
    dtypes: tuple[str, ...]
    taps: tuple[str, ...]
    abilities: tuple[str, ...]
    policies: Mapping[str, str]
    layout: str
    """The first of its layouts that refmoe can write."""


class Harness:
    """One harness over several lives of its process: after a crash or a hang it is started again."""

    def __init__(
        self,
        command: Sequence[str],
        limit: float,
        environment: Mapping[str, str] | None = None,
        label: str = "harness",
        more: int = 0,
    ) -> None:
        """Start it. Raises HarnessUnusable, or InputError when there is no such program.

        limit: seconds for each request.   environment: variables besides those of this process.
        label: its name in messages.   more: how many more processes start at the same time, for `another`
        """
        self._command, self._limit, self._environment, self._label = command, limit, environment, label
        self.log = ""
        """The end of its standard error at the last failure."""
        self._process: Process | None = None
        self._taken = Lock()
        """Held by the thread that takes the process away, to end it."""
        start = partial(Harness, command, limit, environment, label)
        self._more = deque(in_background(start) for _ in range(more))
        try:
            self.description = self._started()
        except HarnessError as error:
            raise HarnessUnusable(f"{label} cannot be used: {error.reason}", self.log) from None

    def another(self) -> Harness:
        """One more process of the same harness. Raises HarnessUnusable, also for another description."""
        try:
            starting = self._more.popleft()
        except IndexError:
            other = Harness(self._command, self._limit, self._environment, self._label)
        else:
            other = starting.result()
        if other.description != self.description:
            other.kill()
            raise HarnessUnusable(f"{self._label} cannot be used: {OTHERWISE}", other.log)
        return other

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load a model. Raises HarnessError or Refused."""
        self._ask({"command": "load", "checkpoint": str(checkpoint), "dtype": dtype})

    def run(self, runs: Sequence[Run], taps: Collection[str], out: Path) -> None:
        """Run a script; the harness writes the taps to `out`. Raises HarnessError or Refused."""
        listed = [{**run.to_json(), "tokens": list(run.tokens), "positions": list(run.positions)} for run in runs]
        self._ask({"command": "run", "runs": listed, "taps": list(taps), "out": str(out)})

    def stop(self) -> str | None:
        """Ask it to end.   returns: a sentence about an irregular end, or None"""
        process = self._take()
        return None if process is None else process.stop(self._limit)

    def kill(self) -> None:
        """End it at once, from any thread; the next request starts it again. Nobody asked for the others of `more`."""
        while self._more:
            self._more.popleft().add_done_callback(end)
        process = self._take()
        if process is not None:
            process.kill()
            self.log = process.errors.strip()

    def _take(self) -> Process | None:
        with self._taken:
            process, self._process = self._process, None
        return process

    def _started(self) -> Description:
        self._process = Process(self._command, self._environment)
        try:
            answer = self._process.ask({"command": "start", "protocol": PROTOCOL}, self._limit)
            try:
                _refuse_error(answer, "start")
                return describe(answer)
            except MessageError as error:
                raise HarnessError(BROKEN, f"its answer to start: {error}") from None
        except BaseException:
            self.kill()
            raise

    def _ask(self, request: Message) -> None:
        """Send a request after ``start``. A process that fails is killed, so that the next request starts a new one."""
        command = request["command"]
        if self._process is None and self._started() != self.description:
            self.kill()
            raise HarnessError(BROKEN, OTHERWISE)
        assert self._process is not None
        try:
            answer = self._process.ask(request, self._limit)
            try:
                expect_done(answer, command)
            except MessageError as error:
                raise HarnessError(BROKEN, f"its answer to {command}: {error}") from None
        except (EngineError, Refused):
            self.log = self._process.errors.strip()
            raise
        except BaseException:
            self.kill()
            raise


def end(started: Future[Harness]) -> None:
    """End a harness that has been started in the background, if it could be."""
    if started.exception() is None:
        started.result().kill()


def _refuse_error(answer: Message, command: str) -> None:
    if "error" in answer:
        expect_fields(answer, ("error",))
        raise EngineError(CRASHED, f"its own error at {command}: {text_field(answer, 'error')}")


def expect_done(answer: Message, command: str) -> None:
    """Check an answer to ``load`` or ``run``.

    Raises MessageError for one that breaks the protocol, EngineError for an error, Refused for a skip.
    """
    _refuse_error(answer, command)
    if "skipped" in answer:
        expect_fields(answer, ("skipped",), ("issue",))
        issue = answer.get("issue")
        if issue is not None and not text_field(answer, "issue").startswith(("https://", "http://")):
            raise wrong_field("issue", issue, "a URL or null")
        raise Refused(text_field(answer, "skipped"), issue)
    expect_fields(answer, ("ok",))
    if answer["ok"] is not True:
        raise wrong_field("ok", answer["ok"], "true")


def describe(answer: Message) -> Description:
    """The description in an answer to ``start``. Raises MessageError."""
    expect_fields(answer, START_FIELDS)
    if answer["protocol"] != PROTOCOL:
        raise wrong_field("protocol", answer["protocol"], f'"{PROTOCOL}"')
    dtypes, taps = names_field(answer, "dtypes", DTYPES), names_field(answer, "taps", EVERY_TAP)
    if not dtypes:
        raise wrong_field("dtypes", answer["dtypes"], "at least one dtype")
    if not {"logits", LOGPROBS} & {*taps}:
        raise wrong_field("taps", answer["taps"], f'at least "logits" or "{LOGPROBS}"')
    if IDS in taps and LOGPROBS not in taps:
        raise wrong_field("taps", answer["taps"], f'"{LOGPROBS}" beside "{IDS}"')
    layouts = names_field(answer, "layouts", LAYOUTS)
    if not layouts:
        raise wrong_field("layouts", answer["layouts"], f"at least one of {', '.join(LAYOUTS)}")
    _check_policies(answer["policies"], dtypes)
    return Description(
        name=text_field(answer, "name", LONGEST_NAME),
        version=text_field(answer, "version", LONGEST_NAME),
        dtypes=dtypes,
        taps=taps,
        abilities=names_field(answer, "abilities", ABILITIES),
        policies=answer["policies"],
        layout=layouts[0],
    )


def _check_policies(policies: object, dtypes: Collection[str]) -> None:
    """Raises MessageError unless each policy is one of refmoe's own, for a dtype of the harness."""
    if not isinstance(policies, dict) or not all(isinstance(each, str) for each in policies.values()):
        raise wrong_field("policies", policies, "an object of the names of policies")
    for dtype, name in policies.items():
        if dtype not in dtypes:
            raise wrong_field("policies", policies, f"dtypes of its own, {', '.join(dtypes)},")
        if ".toml" in name:
            raise wrong_field("policies", policies, "the names of refmoe's own policies")
        try:
            named_policy(name)
        except InputError as error:
            raise MessageError(f"the field 'policies': {error}") from None
