# SPDX-License-Identifier: Apache-2.0
"""The command line is a layer over the API: a program can do all that a command does."""

from __future__ import annotations

from tests.test_house import MODULES, imported, room

ROOTS = ("", "errors")
"""The package itself with its version, and the error that every room raises."""


def reached(starts: set[str]) -> set[str]:
    """The modules that these import, directly or not, with themselves."""
    found, waiting = set(), [*starts]
    while waiting:
        module = waiting.pop()
        if module in MODULES and module not in found:
            found.add(module)
            waiting += imported(module)
    return found


def test_a_command_imports_only_what_the_api_does() -> None:
    """Beside that only the report room, whose functions print what the API gives."""
    api = reached({module for module in MODULES if room(module) in ("api", "testing")})
    commands = {module for module in MODULES if room(module) == "cli"}
    beyond = {
        f"{module} imports {other}"
        for module in commands
        for other in imported(module)
        if room(other) not in ("cli", "report") and other not in {*api, *ROOTS}
    }
    assert beyond == set()


def test_a_command_does_its_work_through_the_api() -> None:
    """Of the rooms below it takes only types, places, policies and sizes, and no function that computes."""
    plain = {
        "cuda.place", "errors", "files.numbers", "files.sentences", "files.writable", "profiles.cut_points", "signals",
        "parallel", "profiles.load", "profiles.policy", "spec.config",
        "suite.golden_folder", "traces.script", "verifier.findings",
    }  # fmt: skip
    taken = {other for module in MODULES if room(module) == "cli" for other in imported(module)}
    assert {other for other in taken if room(other) not in ("api", "cli", "report", "testing")} <= plain
