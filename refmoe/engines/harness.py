"""A harness as the runner sees it: what it says of itself, models it loads, runs it makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from refmoe.engines.adapter import ABILITIES, DTYPES, LAYOUTS, PROTOCOL, TAPS
from refmoe.engines.messages import LONGEST_NAME, Message, MessageError, expect_fields, names, text, wrong
from refmoe.engines.process import BROKEN, CRASHED, HarnessError, Process
from refmoe.errors import InputError
from refmoe.policy.load import policy as named_policy
from refmoe.traces.trace import Run

START_FIELDS = ("protocol", "name", "version", "dtypes", "taps", "abilities", "policies", "layouts")


class Refused(Exception):
    """The harness has skipped a request, for a reason."""

    def __init__(self, reason: str, issue: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.issue = issue


class HarnessUnusable(InputError):
    """A harness that does not start, or in which the smoke test finds a fault of its own."""

    def __init__(self, reason: str, log: str) -> None:
        """log: the end of its standard error."""
        super().__init__(reason)
        self.log = log


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
        self, command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None, label: str = "harness"
    ) -> None:
        """limit: seconds for each request.   environment: variables besides those of this process.

        label: what it is called in messages.   Raises HarnessUnusable, or InputError when there is no such program."""
        self._command, self._limit, self._environment = command, limit, environment
        self.log = ""
        """The end of its standard error at the last failure."""
        self._process: Process | None = None
        try:
            self.description = self._started()
        except HarnessError as error:
            raise HarnessUnusable(f"{label} cannot be used: {error.reason}", self.log) from None

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load a model. Raises HarnessError or Refused."""
        self._ask({"command": "load", "checkpoint": str(checkpoint), "dtype": dtype})

    def run(self, runs: Sequence[Run], taps: Collection[str], out: Path) -> None:
        """Run a script; the taps are in a file afterwards. Raises HarnessError or Refused."""
        listed = [{**asdict(run), "tokens": list(run.tokens), "positions": list(run.positions)} for run in runs]
        self._ask({"command": "run", "runs": listed, "taps": list(taps), "out": str(out)})

    def stop(self) -> str | None:
        """End it.   returns: what was wrong with its end, in a sentence, or None"""
        if self._process is None:
            return None
        process, self._process = self._process, None
        return process.stop()

    def kill(self) -> None:
        """End it at once; the next request starts it again."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            self.log = process.errors.strip()

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
        """A request after ``start``. What fails is killed, so that the next request finds a fresh process."""
        command = request["command"]
        if self._process is None and self._started() != self.description:
            self.kill()
            raise HarnessError(BROKEN, "started again, it describes itself in another way than the first time")
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


class EngineError(HarnessError):
    """The engine reports an error of its own; the process goes on."""


def _refuse_error(answer: Message, command: str) -> None:
    if "error" in answer:
        expect_fields(answer, ("error",))
        raise EngineError(CRASHED, f"its own error at {command}: {text(answer, 'error')}")


def expect_done(answer: Message, command: str) -> None:
    """Raises MessageError for a broken answer to ``load`` or ``run``, EngineError and Refused for one that says so."""
    _refuse_error(answer, command)
    if "skipped" in answer:
        expect_fields(answer, ("skipped",), ("issue",))
        issue = answer.get("issue")
        if issue is not None and not text(answer, "issue").startswith(("https://", "http://")):
            raise wrong("issue", issue, "a URL or null")
        raise Refused(text(answer, "skipped"), issue)
    expect_fields(answer, ("ok",))
    if answer["ok"] is not True:
        raise wrong("ok", answer["ok"], "true")


def describe(answer: Message) -> Description:
    """What a harness says of itself. Raises MessageError."""
    expect_fields(answer, START_FIELDS)
    if answer["protocol"] != PROTOCOL:
        raise wrong("protocol", answer["protocol"], f'"{PROTOCOL}"')
    dtypes, taps, layouts = names(answer, "dtypes", DTYPES), names(answer, "taps", TAPS), answer["layouts"]
    if not dtypes:
        raise wrong("dtypes", answer["dtypes"], "at least one dtype")
    if "logits" not in taps:
        raise wrong("taps", answer["taps"], 'at least "logits"')
    if not names(answer, "layouts", LAYOUTS):
        raise wrong("layouts", layouts, f"at least one of {', '.join(LAYOUTS)}")
    policies = answer["policies"]
    if not isinstance(policies, dict) or not all(isinstance(each, str) for each in policies.values()):
        raise wrong("policies", policies, "an object of the names of policies")
    for dtype, name in policies.items():
        if dtype not in dtypes:
            raise wrong("policies", policies, f"dtypes of its own, {', '.join(dtypes)},")
        if ".toml" in name:
            raise wrong("policies", policies, "the names of refmoe's own policies")
        try:
            named_policy(name)
        except InputError as error:
            raise MessageError(f"the field 'policies': {error}") from None
    return Description(
        text(answer, "name", LONGEST_NAME), text(answer, "version", LONGEST_NAME), dtypes, taps,
        names(answer, "abilities", ABILITIES), policies, layouts[0],
    )  # fmt: skip
