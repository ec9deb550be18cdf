# SPDX-License-Identifier: Apache-2.0
"""A running server, judged over HTTP: by what it answers, given its own tokens."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from refmoe.api.progress import Bars, silent
from refmoe.engines.process import CRASHED
from refmoe.engines.results import Results
from refmoe.engines.server.asking import Address, Client, ServerFault, Unwilling
from refmoe.engines.server.interview import WAYS
from refmoe.engines.server.judging import TOKEN_VERDICTS, Model, by_way
from refmoe.engines.server.kinds import KINDS
from refmoe.engines.server.outcome import results_of
from refmoe.engines.server.served import NAME, served_case
from refmoe.engines.server.serving import PLACES, Started, filled, shown_commands, started, write_files
from refmoe.engines.server.verdict import POLICIES, Asking, Verdict, examine
from refmoe.engines.server.verdict import facts as verdict_facts
from refmoe.errors import InputError
from refmoe.files.scratch import Scratch
from refmoe.files.sentences import quoted
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.signals import ended_by_signals
from refmoe.suite import Case, read_case
from refmoe.suite.golden_folder import case_folder, golden_folder
from refmoe.verifier.segments import SIGNIFICANCE

Names = Sequence[str]
DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes in which a server may compute."""
STEPS = len(WAYS) - 1
"""The steps of the progress bar. What a server says of prompts comes with the generated tokens."""


@dataclass(frozen=True)
class Served:
    """A server, and how it is judged."""

    url: str
    """Such as ``http://127.0.0.1:8000``."""
    kind: str | None = None
    """One of `KINDS`; None: found by asking."""
    model: str | None = None
    """The name of the model in requests; None: the first that the server lists."""
    dtype: str | None = None
    """One of `DTYPES`, in which the server computes; None: the one that the policy stores."""
    policy: str | None = None
    """None: the one that describes this kind of server at this dtype."""
    case: str | None = None
    """The case whose model it serves; None: refmoe's own model for servers."""
    golden: Path | None = None
    files: Path | None = None
    """The folder for the files that a started server loads; None: a temporary one."""
    command: Names = ()
    """The command that starts the server, with ``{checkpoint}``, ``{gguf}`` and ``{decision}``; empty: it runs."""
    timeout: float = 300.0
    """Seconds for its start, and for each request."""
    significance: float = SIGNIFICANCE
    diagnose: bool = True

    def check(self) -> None:
        """Raises InputError for fields that contradict each other."""
        Address(self.url)
        if self.dtype is None and self.policy is None:
            raise InputError("--server needs --dtype or --policy: it cannot be asked in which dtype it computes")
        if self.policy is not None:
            stored = named_policy(self.policy).storage.name
            if stored not in DTYPES:
                raise InputError(f"--policy {self.policy} stores {stored}, but one of {', '.join(DTYPES)} was expected")
            if self.dtype not in (None, stored):
                raise InputError(f"--policy {self.policy} stores {stored}, but --dtype {self.dtype} was given")
        if self.command and not any(place in word for place in PLACES for word in self.command):
            raise InputError(
                f"'{shlex.join(self.command)}' serves none of refmoe's files, but a command with "
                f"{' or '.join(PLACES)} was expected"
            )

    @property
    def harness(self) -> Names:
        """The command that starts it, as a run of cases names the one of its engine."""
        return self.command

    def repeated(self) -> dict[str, Names]:
        """The options of ``refmoe conform`` that a run on another machine needs too, each with its values."""
        options = {
            "server": self.url, "server-kind": self.kind, "server-model": self.model, "case": self.case,
            "dtype": self.dtype, "policy": self.policy, "timeout": f"{self.timeout:g}",
        }  # fmt: skip
        return {name: [value] for name, value in options.items() if value is not None}

    @property
    def computed(self) -> str:
        """The dtype in which the server computes."""
        return named_policy(self.policy).storage.name if self.policy is not None else self.dtype or DTYPES[0]

    def policy_for(self, kind: str) -> Policy:
        """The policy by which a kind of server is judged."""
        if self.policy is not None:
            return named_policy(self.policy)
        return named_policy(POLICIES.get(kind, {}).get(self.computed, self.computed))


def model_case(case: str | None, golden: Path | None) -> Case:
    """The case whose model is served. Raises InputError where there is none, or none that can be served."""
    if case is None:
        return served_case()
    found = read_case(case_folder(case, golden_folder(golden)))
    if found.layers is not None or found.full_size:
        raise InputError(f"case {quoted(case)} is not of a whole small model, but such a case was expected")
    return found


def write_server_files(
    folder: Path, dtype: str | None = None, url: str = "http://127.0.0.1:8000", case: str | None = None,
    golden: Path | None = None,
) -> Mapping[str, tuple[str, str]]:  # fmt: skip
    """Write the files that servers load, and return per server the command that serves them, and a remark.

    dtype: of the weights, one of `DTYPES`; None: float32.   Raises InputError.
    """
    address, model = Address(url), model_case(case, golden)
    write_files(folder, model.config, model.checkpoint().parameters, dtype or DTYPES[0])
    return shown_commands(folder, address, dtype or DTYPES[0])


def judge_server(asked: Served, bars: Bars = silent) -> Verdict:
    """The verdict on a server. It is started where there is a command, and is then ended.

    Whatever it does to a request is a verdict. Raises InputError where it cannot be started or reached, or is no server
    of a known kind.
    """
    asked.check()
    case = model_case(asked.case, asked.golden)
    parameters = case.checkpoint().parameters
    address = Address(asked.url)
    client = Client(address, asked.timeout)
    server: Started | None = None
    with ended_by_signals(), ExitStack() as stack:
        if asked.command:
            folder = asked.files or stack.enter_context(Scratch("server")).path
            gguf = any("{gguf}" in word for word in asked.command)
            write_files(folder, case.config, parameters, asked.computed, gguf)
            server = stack.enter_context(started(filled(asked.command, folder), address, asked.timeout))
        else:
            need_answer(client)
        advance = stack.enter_context(bars("ask", STEPS))
        name = f"case {NAME if asked.case is None else case.name}"
        model = Model(
            name=name, config=case.config, parameters=parameters, policy=asked.policy_for(asked.kind or ""),
            significance=asked.significance,
        )  # fmt: skip
        asking = Asking(
            client=client, wanted=asked.kind, model_name=asked.model, diagnose=asked.diagnose, progress=advance
        )  # fmt: skip
        verdict = examine(asking, model, asked.policy_for)
        if server is None or server.lives:
            return verdict
        return replace(verdict, notes=(*verdict.notes, f"its process {server.ending()}"))


def server_results(asked: Served, found: Verdict) -> Results:
    """The verdict on a server as results with one outcome, for the files and reports of a run.   asked: as it was"""
    identity = {"command": shlex.join(asked.command)} if asked.command else {}
    return results_of(found, model_case(asked.case, asked.golden), asked.significance, identity)


def need_answer(client: Client) -> None:
    """Raises InputError where no server is at the address."""
    try:
        client.get("/health")
    except Unwilling:
        pass
    except ServerFault as fault:
        if fault.kind == CRASHED:
            raise InputError(
                f"{client.address.url}: no server answers: {fault.reason}; --server-files DIR writes a model, and "
                "shows the commands that serve it"
            ) from None


__all__ = [
    "DTYPES", "KINDS", "TOKEN_VERDICTS", "WAYS", "Served", "Verdict", "by_way", "judge_server", "server_results",
    "verdict_facts", "write_server_files",
]  # fmt: skip
