# SPDX-License-Identifier: Apache-2.0
"""Numbers in options are ASCII digits, in every option of every command; `int` and `float` of Python take more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from refmoe.cli.options import Decimal, Integer, Tokens
from refmoe.errors import InputError
from refmoe.files.numbers import decimal, integer
from refmoe.jobs.job import parse_layers
from refmoe.parallel import parse_executor
from tests.cli.every_command import COMMANDS
from tests.command_line import Refmoe
from tests.models import SMALL

NOT_INTEGERS = ["²", "1_0", "\uff11", "\u0663", "9" * 5000, "1.0", "1e3", "0x1", "", " ", "--1", "1\n", "nan", "\u2460"]
NOT_NUMBERS = [
    "²",
    "1_0",
    "\uff11.5",
    "\u0663",
    "9" * 5000,
    "1e400",
    "nan",
    "inf",
    "-infinity",
    "0x1p3",
    "",
    "1\n",
    ".",
]
INTEGERS, DECIMALS, IDS = (
    [(name, option) for name, command in COMMANDS.items() for option in command.params if isinstance(option.type, kind)]
    for kind in (Integer, Decimal, Tokens)
)


def named(pairs: list[tuple[str, click.Parameter]]) -> list[str]:
    return [f"{name} {option.opts[0]}" for name, option in pairs]


def test_no_option_reads_numbers_in_another_way() -> None:
    """Click's own types take whatever Python's `int` and `float` take."""
    theirs = (click.types.IntParamType, click.types.FloatParamType)
    found = [
        f"{name} {option.opts[0]}"
        for name, command in COMMANDS.items()
        for option in command.params
        for kind in getattr(option.type, "types", [option.type])
        if isinstance(kind, theirs) and not isinstance(kind, Integer | Decimal)
    ]
    assert found == []
    assert (len(INTEGERS), len(DECIMALS), len(IDS)) > (10, 4, 4)


def refused(option: click.Parameter, value: Any) -> bool:
    try:
        option.type.convert(value, option, None)
    except click.BadParameter:
        return True
    return False


@pytest.mark.parametrize(("name", "option"), INTEGERS, ids=named(INTEGERS))
def test_every_integer_is_in_ascii_digits(name: str, option: click.Parameter) -> None:
    assert option.type.convert("7", option, None) == 7
    assert [value for value in NOT_INTEGERS if not refused(option, value)] == []


@pytest.mark.parametrize(("name", "option"), DECIMALS, ids=named(DECIMALS))
def test_every_other_number_too(name: str, option: click.Parameter) -> None:
    assert option.type.convert("0.25", option, None) == 0.25
    assert [value for value in NOT_NUMBERS if not refused(option, value)] == []


@pytest.mark.parametrize(("name", "option"), IDS, ids=named(IDS))
def test_every_list_of_token_ids_too(name: str, option: click.Parameter) -> None:
    assert option.type.convert("1,2,3", option, None) == (1, 2, 3)
    assert [value for value in NOT_INTEGERS if not refused(option, f"1,{value}")] in ([], ["1\n"])


@pytest.mark.parametrize("value", NOT_INTEGERS)
def test_so_are_those_of_layers_and_executors(value: str) -> None:
    if value:
        for text in (f"{value}:", f":{value}", f"0:{value}"):
            with pytest.raises(InputError, match="--layers"):
                parse_layers(text, SMALL)
        with pytest.raises(InputError, match="--executor"):
            parse_executor(f"processes:{value}")


@for_all(st.integers(-(10**18), 10**18))
def test_an_integer_is_read_as_it_is(value: int) -> None:
    assert integer(str(value)) == value


@for_all(st.floats(allow_nan=False, allow_infinity=False))
def test_a_finite_number_is_read_as_it_is(value: float) -> None:
    assert decimal(repr(value)) == value


@for_all(st.text())
def test_what_is_read_is_ascii(text: str) -> None:
    for read in (integer, decimal):
        assert read(text) is None or text.isascii()


@pytest.mark.parametrize("value", ["²", "9" * 5000])
def test_the_message_is_a_sentence_of_bounded_length(refmoe: Refmoe, tmp_path: Path, value: str) -> None:
    out = str(tmp_path / "t")
    for words in (
        ("emit", "--checkpoint", "mixtral-8x7b", "--seed", 1, "--tokens", 1, "--layers", f"0:{value}", "--out", out),
        ("emit", "--checkpoint", "x", "--tokens", value, "--out", out),
        ("suite", "check", "--executor", f"processes:{value}"),
    ):
        status, printed, said = refmoe(*words)
        assert (status, printed) == (2, "")
        assert len(said) < 4000
    assert not [*tmp_path.iterdir()]
