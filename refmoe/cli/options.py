"""Options that several commands share, and the records that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from refmoe.cuda.place import DEVICES, Place
from refmoe.errors import InputError
from refmoe.jobs.source import SIZES
from refmoe.traces.script import Call

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = TypeVar("Command", bound=Callable[..., Any])
Record = TypeVar("Record", bound="DataclassInstance")

PATH = click.Path(path_type=Path)
GOLDEN = Path("golden")


def record_of(kind: type[Record], options: dict[str, Any]) -> Record:
    """A dataclass made of the options that have the names of its fields. They leave the dictionary."""
    return kind(**{field.name: options.pop(field.name) for field in fields(kind)})


class Tokens(click.ParamType[Any]):
    """Token ids separated by commas, ``1,2,3``."""

    name = "IDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of token ids such as 1,2,3", param, ctx)


def json_option(command: Command) -> Command:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def jobs_option(command: Command) -> Command:
    """Add ``--jobs``: processes that work on cases."""
    option = click.option(
        "--jobs", type=click.IntRange(1), metavar="N", help="Cases to work on at once; one per core if not given."
    )
    return option(command)


def _place(_context: click.Context, _option: click.Parameter, name: str) -> Place:
    """The place of this name, checked before anything is read. Raises InputError where there is no such device."""
    place = Place(name)
    place.require()
    return place


def device_option(what: str) -> Callable[[Command], Command]:
    """Add ``--device``: the command gets a `Place`.   what: the work that runs on the GPU, in words."""
    return click.option(
        "--device", type=click.Choice(DEVICES), default="cpu", show_default=True, callback=_place,
        help=f"cuda: an NVIDIA GPU, through CuPy (pip install 'refmoe[cuda13]'). {what}",
    )  # fmt: skip


def checkpoint_options(command: Command) -> Command:
    """Add ``--checkpoint`` and ``--layout``: the model."""
    command = click.option(
        "--layout", type=click.Choice(["hf", "mistral"]), help="How DIR is laid out; told by its files if not given."
    )(command)
    return click.option(
        "--checkpoint", type=PATH, metavar="DIR", help="A checkpoint: Hugging Face's layout or Mistral's own."
    )(command)


def synthetic_option(command: Command) -> Command:
    """Add ``--synthetic``: weights from the weight formula."""
    return click.option(
        "--synthetic", type=click.IntRange(0), metavar="SEED",
        help=f"With --checkpoint {' or '.join(SIZES)}: weights from the formula, no download.",
    )(command)  # fmt: skip


def input_options(command: Command) -> Command:
    """Add the options of the script: one prefill, then chunks and decode steps."""
    for option in (
        click.option("--decode", type=Tokens(), help="After the prefill, decode these tokens one by one."),
        click.option("--chunk", type=Tokens(), multiple=True, help="After the prefill, a chunk of tokens; repeatable."),
        click.option("--chat", type=PATH, metavar="FILE", help="A JSON list of chat messages for the prefill."),
        click.option("--prompt", metavar="TEXT", help="Text for the prefill, by the checkpoint's tokenizer.model."),
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

    def calls(self, folder: Path) -> list[Call]:
        """The script. Raises InputError when not exactly one prefill is given.

        folder: the checkpoint, whose tokenizer.model turns text into tokens.
        """
        if sum(item is not None for item in (self.tokens, self.prompt, self.chat)) != 1:
            raise InputError("exactly one of --tokens, --prompt and --chat was expected")
        calls = [Call("prefill", 0, self._prefill(folder)), *(Call("chunk", 0, piece) for piece in self.chunk)]
        return [*calls, Call("decode", 0, self.decode)] if self.decode else calls

    def _prefill(self, folder: Path) -> tuple[int, ...]:
        if self.tokens is not None:
            return self.tokens
        from refmoe.text.chat import encode_chat, load_chat
        from refmoe.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(folder / "tokenizer.model")
        if self.chat is not None:
            return tuple(encode_chat(tokenizer, load_chat(self.chat)))
        return tuple(tokenizer.encode(self.prompt or ""))


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error, if that is a terminal. Yields a function to call after each item."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
