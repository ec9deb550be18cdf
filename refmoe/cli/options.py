"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from refmoe.cuda.place import DEVICES, Place
from refmoe.errors import InputError
from refmoe.traces.script import Call

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
GOLDEN = Path("golden")


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
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(command)


def jobs_option(command: Command) -> Command:
    option = click.option(
        "--jobs", type=click.IntRange(1), metavar="N", help="Cases worked on at once; as many as there are cores."
    )
    return option(command)


def _place(_context: click.Context, _option: click.Parameter, name: str) -> Place:
    """Before anything is read or written: InputError where there is no such device."""
    place = Place(name)
    place.require()
    return place


def device_option(what: str) -> Callable[[Command], Command]:
    """Where to compute; the command gets a `Place`.   what: runs on the GPU, in words."""
    return click.option(
        "--device", type=click.Choice(DEVICES), default="cpu", show_default=True, callback=_place,
        help=f"cuda: an NVIDIA GPU, through CuPy (pip install 'refmoe[cuda13]'). {what}",
    )  # fmt: skip


def checkpoint_options(command: Command) -> Command:
    """Where the model comes from."""
    command = click.option(
        "--layout", type=click.Choice(["hf", "mistral"]), help="How DIR is laid out; told by its files if not given."
    )(command)
    return click.option(
        "--checkpoint", type=PATH, metavar="DIR", help="A checkpoint: Hugging Face's layout or Mistral's own."
    )(command)


def input_options(command: Command) -> Command:
    """What the model is run on."""
    for option in (
        click.option("--decode", type=Tokens(), help="After the prefill, decode these tokens one by one."),
        click.option("--chunk", type=Tokens(), multiple=True, help="After the prefill, a chunk of tokens; repeatable."),
        click.option("--chat", type=PATH, metavar="FILE", help="A JSON list of chat messages for the prefill."),
        click.option("--prompt", metavar="TEXT", help="Text for the prefill, by the checkpoint's tokenizer.model."),
        click.option("--tokens", type=Tokens(), help="Token ids for the prefill, such as 1,2,3."),
    ):
        command = option(command)
    return command


def input_calls(
    folder: Path, tokens: tuple[int, ...] | None, prompt: str | None, chat: Path | None,
    chunk: tuple[tuple[int, ...], ...] = (), decode: tuple[int, ...] | None = None,
) -> list[Call]:  # fmt: skip
    """The script that the input options ask for. Raises InputError when not exactly one prefill is given."""
    if sum(item is not None for item in (tokens, prompt, chat)) != 1:
        raise InputError("exactly one of --tokens, --prompt and --chat was expected")
    if tokens is None:
        from refmoe.text.chat import encode_chat, load_chat
        from refmoe.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(folder / "tokenizer.model")
        tokens = tuple(encode_chat(tokenizer, load_chat(chat)) if chat else tokenizer.encode(prompt or ""))
    calls = [Call("prefill", 0, tokens), *(Call("chunk", 0, piece) for piece in chunk)]
    return [*calls, Call("decode", 0, decode)] if decode else calls


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error when that is a terminal, else nothing. Yields what to call after each item."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
