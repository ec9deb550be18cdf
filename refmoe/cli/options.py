# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and the records that hold them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from refmoe.api.arguments import LEAST_SIGNIFICANCE
from refmoe.api.verifying import SIGNIFICANCE
from refmoe.cli.guard import OUTPUT, OUTPUT_FOLDER
from refmoe.cuda.place import DEVICES, Place
from refmoe.errors import InputError
from refmoe.files.numbers import decimal, integer
from refmoe.parallel import parse_executor
from refmoe.report.terminal import can_move, error_console
from refmoe.spec.config import PRESETS
from refmoe.suite.golden_folder import VARIABLE, golden_folder
from refmoe.traces.script import Call

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = TypeVar("Command", bound=Callable[..., Any])
Record = TypeVar("Record", bound="DataclassInstance")

PATH = click.Path(path_type=Path)
LAYOUTS = ("hf", "mistral")
TAPS_HELP = "The taps to keep: shell patterns separated by commas, such as logits,layers.0.*"


def record_of(kind: type[Record], options: dict[str, Any]) -> Record:
    """A dataclass made of the options that have the names of its fields. They leave the dictionary."""
    return kind(**{field.name: options.pop(field.name) for field in fields(kind)})


class Tokens(click.ParamType[Any]):
    """Token ids separated by commas, ``1,2,3``."""

    name = "IDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        ids = [integer(part.strip()) for part in value.split(",")]
        if None in ids:
            self.fail(f"'{value}' is not a list of token ids such as 1,2,3", param, ctx)
        return tuple(each for each in ids if each is not None)


class Integer(click.IntRange):
    """An integer in ASCII digits, within bounds that are optional."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and (value := integer(typed := value)) is None:
            self.fail(f"'{typed}' is not an integer of at most 19 digits, 0 to 9", param, ctx)
        return super().convert(value, param, ctx)


class Decimal(click.FloatRange):
    """A finite number in ASCII digits, within bounds that are optional."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and (value := decimal(typed := value)) is None:
            self.fail(f"'{typed}' is not a finite number such as 0.5 or 1e-3", param, ctx)
        return super().convert(value, param, ctx)


def json_option(command: Command) -> Command:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def _place(_context: click.Context, _option: click.Parameter, name: str) -> Place:
    """The place of this name, checked before anything is read. Raises InputError where there is no such device."""
    place = Place(name)
    place.require()
    return place


def _golden(_context: click.Context, _option: click.Parameter, given: Path | None) -> Path:
    return golden_folder(given)


def golden_option(command: Command) -> Command:
    """Add ``--golden``: the folder of cases to read. The command gets a path in any case."""
    return click.option(
        "--golden", type=PATH, metavar="DIR", callback=_golden, show_default=f"the package's own, or {VARIABLE}",
        help="The folder of golden cases.",
    )(command)  # fmt: skip


def written_golden_option(what: str, required: bool = False) -> Callable[[Command], Command]:
    """Add ``--golden`` to a command that may write there: the command gets None unless it is told where.

    what: the thing that is written, in words
    """
    return click.option(
        "--golden", type=OUTPUT_FOLDER, metavar="DIR", required=required,
        help=f"The folder of golden cases, where {what} written" + ("." if required else "; else nothing is written."),
    )  # fmt: skip


def case_option(what: str) -> Callable[[Command], Command]:
    """Add ``--case``: the golden case that is run.   what: the use of it, in words"""
    return click.option("--case", "case_name", metavar="NAME", help=f"{what} (refmoe cases lists them).")


def layout_option(command: Command) -> Command:
    """Add ``--layout`` for reading."""
    return click.option(
        "--layout", type=click.Choice(LAYOUTS), show_default="by the files of DIR",
        help="How DIR is laid out: as Hugging Face does, or Mistral.",
    )(command)  # fmt: skip


def taps_option(command: Command) -> Command:
    """Add ``--taps``."""
    return click.option("--taps", metavar="PATTERNS", default="*", show_default=True, help=TAPS_HELP)(command)


def _executor(_context: click.Context, _option: click.Parameter, spec: str | None) -> str | None:
    """The value, if it names an executor. Raises InputError if not."""
    if spec is not None:
        parse_executor(spec)
    return spec


ONE_PROCESS = "this process"
ALL_CORES = "processes"


def executor_option(what: str, default: str = ALL_CORES) -> Callable[[Command], Command]:
    """Add ``--executor``.   what: the work that is spread, in words   default: where it happens without the option"""
    return click.option(
        "--executor", metavar="processes[:N]|dask:ADDRESS", callback=_executor, show_default=default,
        help=f"{what} in N processes of this machine (one per core if N is not given), or on a Dask cluster.",
    )  # fmt: skip


def _significance(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """The value, if it is one. Raises InputError if not."""
    if not LEAST_SIGNIFICANCE <= value < 1:
        raise InputError(
            f"--significance is {value:g}, but a probability from {LEAST_SIGNIFICANCE:g} to below 1 was expected"
        )
    return value


def significance_option(what: str) -> Callable[[Command], Command]:
    """Add ``--significance``.   what: the event that has this probability, in words"""
    return click.option(
        "--significance", type=Decimal(), default=SIGNIFICANCE, show_default=True, callback=_significance,
        help=f"The probability that {what}.",
    )  # fmt: skip


def device_option(what: str) -> Callable[[Command], Command]:
    """Add ``--device``: the command gets a `Place`.   what: the work that runs on the GPU, in words."""
    return click.option(
        "--device", type=click.Choice(DEVICES), default="cpu", show_default=True, callback=_place,
        help=f"cuda: an NVIDIA GPU, through CuPy (pip install 'refmoe[cuda13]'). {what}",
    )  # fmt: skip


def sarif_options(command: Command) -> Command:
    """Add ``--sarif``, ``--source`` and ``--refmoe-from``."""
    for option in (
        click.option(
            "--refmoe-from", metavar="OWNER/REPOSITORY[@REF]",
            help="Where refmoe is on GitHub: alerts link there, and CI systems get it and the cases from there.",
        ),
        click.option(
            "--source", "sources", multiple=True, metavar="[STEP=]FILE[:PLACE]",
            help="With --sarif: the line of a step, by its number or a text in it; without STEP, of all others.",
        ),
        click.option(
            "--sarif", type=OUTPUT, metavar="FILE", help="Write SARIF: GitHub shows what is wrong at lines of source."
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def words_of(text: str) -> list[str]:
    """The words of a command line; none where it is no whole one."""
    try:
        return shlex.split(text)
    except ValueError:  # a quote that is never closed
        return []


def checkpoint_options(command: Command) -> Command:
    """Add ``--checkpoint`` and ``--layout``: the model."""
    command = layout_option(command)
    return click.option("--checkpoint", type=PATH, metavar="DIR", help="The folder of a checkpoint, or a GGUF file.")(
        command
    )


def seed_option(command: Command) -> Command:
    """Add ``--seed``: weights from the weight formula."""
    return click.option(
        "--seed", type=Integer(0), metavar="SEED",
        help=f"With --checkpoint {' or '.join(PRESETS)}: weights from the formula of this seed, no download.",
    )(command)  # fmt: skip


def input_options(command: Command) -> Command:
    """Add the options of the script: one prefill, then chunks and decode steps."""
    for option in (
        click.option("--decode", type=Tokens(), help="After the prefill, decode these tokens one by one."),
        click.option("--chunk", type=Tokens(), multiple=True, help="After the prefill, a chunk of tokens; repeatable."),
        click.option("--chat", type=PATH, metavar="FILE", help="A JSON list of chat messages for the prefill."),
        click.option("--prompt", metavar="TEXT", help="Text for the prefill, by the checkpoint's tokenizer."),
        click.option("--tokens", type=Tokens(), help="Token ids for the prefill, such as 1,2,3."),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Input:
    """The values of the input options."""

    tokens: tuple[int, ...] | None
    prompt: str | None
    chat: Path | None
    chunk: tuple[tuple[int, ...], ...] = ()
    decode: tuple[int, ...] | None = None

    @property
    def given(self) -> bool:
        """Whether any of the options is given."""
        return any(value not in (None, ()) for value in vars(self).values())

    def calls(self, folder: Path, layout: str | None = None) -> list[Call]:
        """The script. Raises InputError when not exactly one prefill is given.

        folder, layout: the checkpoint, whose tokenizer turns text into tokens.
        """
        if sum(item is not None for item in (self.tokens, self.prompt, self.chat)) != 1:
            raise InputError("exactly one of --tokens, --prompt and --chat was expected")
        calls = [Call("prefill", 0, self._prefill(folder, layout)), *(Call("chunk", 0, piece) for piece in self.chunk)]
        return [*calls, Call("decode", 0, self.decode)] if self.decode else calls

    def _prefill(self, folder: Path, layout: str | None) -> tuple[int, ...]:
        if self.tokens is not None:
            return self.tokens
        from refmoe.api.generating import prompt_tokens

        return prompt_tokens(folder, self.prompt or "", self.chat, layout)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error, if that is a terminal. Yields a function to call after each item."""
    console = error_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not can_move(console), redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
