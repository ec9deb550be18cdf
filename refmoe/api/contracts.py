# SPDX-License-Identifier: Apache-2.0
"""Shared by all checks by a contract: the function by its name, the laws by theirs, and verdicts in words."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refmoe.errors import InputError
from refmoe.files.python_file import module_from_file
from refmoe.files.sentences import one_line

if TYPE_CHECKING:
    from refmoe.contracts.checking import Verdict
    from refmoe.contracts.law import Law, Subject


def named_laws(names: Sequence[str], laws: Collection[str]) -> list[str]:
    """The names of the laws to try; without names, all. Raises InputError for an unknown one."""
    if unknown := [name for name in names if name not in laws]:
        raise InputError(f"--law {unknown[0]}: no such law, one of {', '.join(laws)} was expected")
    return [*(names or laws)]


def judge_laws(
    laws: Sequence[Law], subject: Subject, examples: int | None, tell: Callable[[Verdict], None]
) -> list[Verdict]:
    """Judge a subject by each law, and tell each verdict.   examples: per law; those of the contract if not given"""
    from refmoe.contracts.checking import judge

    verdicts = []
    for law in laws:
        verdicts.append(judge(law, subject, examples))
        tell(verdicts[-1])
    return verdicts


def verdict_facts(verdict: Verdict) -> dict[str, Any]:
    """A verdict about a law as plain values."""
    from refmoe.contracts.report import as_data

    return as_data(verdict)


def verdict_words(verdict: Verdict) -> str:
    """A broken law with its smallest example, in words."""
    from refmoe.contracts.report import explain

    return explain(verdict)


def verdict_summary(verdicts: list[Verdict]) -> str:
    """All verdicts in a line."""
    from refmoe.contracts.report import summary

    return summary(verdicts)


def load_function(where: str, what: str) -> Callable[..., Any]:
    """The function that ``module:function`` or ``file.py:function`` names. Raises InputError.

    what: the function in words, such as "a router"
    """
    module_name, _, name = where.rpartition(":")
    if not module_name or not name:
        raise InputError(f"'{where}' is not MODULE:FUNCTION, such as my_package.moe:route")
    sys.path.insert(0, "")
    try:
        module = module_of(module_name, what)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too
        raise InputError(f"{module_name} cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"{module_name} has no function '{name}'")
    return found  # type: ignore[no-any-return]


def module_of(name: str, what: str) -> Any:
    """Import a module by its name, or execute a file. Raises InputError for a file that cannot be read."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    return module_from_file(Path(name), Path(name).stem, f"a Python file with {what}")
