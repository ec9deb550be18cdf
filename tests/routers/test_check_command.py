# SPDX-License-Identifier: Apache-2.0
"""`refmoe router check` on routers that do what no router should: leave, crash, never return, print, raise anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from refmoe.api.contract_process import Asked
from refmoe.api.routing import check_router, check_router_apart
from refmoe.errors import InputError
from tests.command_line import Refmoe

pytest.importorskip("hypothesis")

ROUTERS = """
import os, sys, time
import numpy as np

def good(x):
    ids = np.argsort(-x, axis=1, kind="stable")[:, :2]
    e = np.exp(np.take_along_axis(x, ids, 1) - x.max(axis=1, keepdims=True))
    return ids, e / e.sum(axis=1, keepdims=True)

class Odd(Exception):
    def __str__(self):
        raise KeyError

class Array:
    def __array__(self, *_, **__):
        raise RuntimeError("no \\x1b[1m array")

class Pair(tuple):
    def __len__(self):
        raise RuntimeError
    __iter__ = __len__

def leaves(x): sys.exit(0)
def leaves_at_once(x): os._exit(0)
def leaves_on_nan(x): sys.exit(0) if np.isnan(x).any() else None; return good(x)
def crashes(x): os.kill(os.getpid(), 11)
def never_returns(x):
    while True: pass
def ends_as_a_generator(x): raise GeneratorExit
def interrupts(x): raise KeyboardInterrupt
def raises_something_odd(x): raise Odd
def returns_odd_arrays(x): return Array(), Array()
def returns_an_odd_pair(x): return Pair((1, 2))
def turns_its_input(x): x.shape = x.shape[::-1]; return good(x.T)
def closes_everything(x): os.closerange(3, 256); return good(x)
def prints(x): print("loud \\x1b[31m", os.system("echo louder"), file=sys.stderr); print("{}"); return good(x)

def no_router(experts, k): raise ValueError("none today")
def no_router_but_an_end(experts, k): sys.exit(0)
def nothing(experts, k): return None
def maker(experts, k): return good
"""
FAIL = [
    "leaves", "leaves_at_once", "crashes", "never_returns", "ends_as_a_generator", "interrupts", "raises_something_odd",
    "returns_odd_arrays", "returns_an_odd_pair", "closes_everything",
]  # fmt: skip
FACTORIES = ["no_router", "no_router_but_an_end", "nothing"]
CLAIMS = {"experts": 4, "top_k": 2}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the routers. At the end it holds nothing else."""
    (tmp_path / "bad.py").write_text(ROUTERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYPOTHESIS_STORAGE_DIRECTORY", raising=False)
    return tmp_path


def checked(refmoe: Refmoe, router: str, *options: Any) -> tuple[int, dict[str, Any], str]:
    status, printed, said = refmoe(
        "router", "check", router, "--experts", 4, "--top-k", 2, "--examples", 3, "--timeout", 5, "--json",
        *(options or ("--law", "distinct-ids")),
    )  # fmt: skip
    return status, json.loads(printed), said


@pytest.mark.parametrize("name", FAIL)
def test_a_router_that_misbehaves_breaks_a_law(refmoe: Refmoe, here: Path, name: str) -> None:
    status, found, said = checked(refmoe, f"bad.py:{name}")
    assert status == 1
    assert [law["outcome"] for law in found["laws"]] == ["fail"]
    assert "\x1b" not in said
    assert {path.name for path in here.iterdir()} <= {"bad.py", "__pycache__"}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_that_makes_no_router_breaks_a_law(refmoe: Refmoe, here: Path, name: str) -> None:
    status, found, _ = checked(
        refmoe, f"bad.py:{name}", "--factory", "--law", "distinct-ids", "--law", "dense-at-k-equals-E"
    )
    assert status == 1
    assert {law["outcome"] for law in found["laws"]} <= {"fail", "not judged"}


def test_the_laws_after_an_end_are_not_judged(refmoe: Refmoe, here: Path) -> None:
    status, found, _ = checked(refmoe, "bad.py:leaves_at_once", "--law", "distinct-ids", "--law", "repetition")
    assert (status, [law["outcome"] for law in found["laws"]]) == (1, ["fail", "not judged"])


def test_to_leave_is_not_to_raise(refmoe: Refmoe, here: Path) -> None:
    """A router that is declared to raise for NaN must raise an exception that a caller can catch."""
    status, found, _ = checked(refmoe, "bad.py:leaves_on_nan", "--law", "nan", "--nan", "raise")
    assert (status, found["laws"][0]["outcome"]) == (1, "fail")


def test_an_input_of_another_shape_is_told(refmoe: Refmoe, here: Path) -> None:
    status, found, _ = checked(refmoe, "bad.py:turns_its_input", "--law", "input-untouched")
    assert (status, found["laws"][0]["outcome"]) == (1, "fail")


def test_what_a_router_prints_is_not_in_the_answer(refmoe: Refmoe, here: Path) -> None:
    status, found, said = checked(refmoe, "bad.py:prints")
    assert (status, found["laws"][0]["outcome"]) == (0, "pass")
    assert "loud" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "text", ["import sys; sys.exit(0)", "import os; os._exit(0)", "while True: pass", "raise GeneratorExit", "x = ("]
)
def test_a_module_that_cannot_be_imported_is_unusable(refmoe: Refmoe, here: Path, text: str) -> None:
    (here / "module.py").write_text(text)
    status, _, said = refmoe("router", "check", "module.py:x", "--experts", 4, "--top-k", 2, "--timeout", 2)
    assert status == 2
    assert "module.py" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [("--experts", 10**9, "--top-k", 2), ("--experts", 513, "--top-k", 2), ("--experts", 4, "--top-k", 5),
     ("--experts", 4, "--top-k", 2, "--law", "none")],
)  # fmt: skip
def test_what_cannot_be_checked_is_said_at_once(refmoe: Refmoe, here: Path, options: tuple[Any, ...]) -> None:
    assert refmoe("router", "check", "bad.py:good", *options)[0] == 2


def test_the_verdicts_are_those_of_a_check_in_this_process(here: Path) -> None:
    asked = Asked(function="bad.py:good", examples=5, claims=CLAIMS)
    apart, within = check_router_apart(asked).verdicts, check_router("bad.py:good", examples=5, **CLAIMS)
    assert [(v.law.name, v.outcome, v.words, v.examples) for v in apart] == [
        (v.law.name, v.outcome, v.words, v.examples) for v in within
    ]


@pytest.mark.parametrize("name", ["leaves", "ends_as_a_generator", "raises_something_odd", "returns_odd_arrays"])
def test_in_this_process_too_an_exception_breaks_a_law(here: Path, name: str) -> None:
    (verdict,) = check_router(f"bad.py:{name}", examples=3, laws=["distinct-ids"], **CLAIMS)
    assert verdict.outcome == "fail"


def test_nothing_is_left_running(here: Path) -> None:
    """Not even a process that the router started."""
    (here / "starts.py").write_text(
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
        "open('pid', 'w').write(str(child.pid))\ndef route(x):\n    while True: pass\n"
    )
    asked = Asked(function="starts.py:route", laws=("distinct-ids",), examples=1, claims=CLAIMS)
    check_router_apart(asked, timeout=2)
    status = Path(f"/proc/{(here / 'pid').read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] in "ZX"


def test_a_router_that_is_no_function_is_unusable(here: Path) -> None:
    with pytest.raises(InputError, match="has no function"):
        check_router_apart(Asked(function="bad.py:np", examples=1, claims=CLAIMS))
    assert os.getcwd() == str(here)
