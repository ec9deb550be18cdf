# SPDX-License-Identifier: Apache-2.0
"""``refmoe generate``: stream text from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from refmoe.api.generating import BLAS, DTYPES, Generation, continuation
from refmoe.cli.guard import GuardedCommand
from refmoe.cli.options import PATH, Decimal, Input, Integer, Tokens, device_option, json_option, layout_option
from refmoe.cli.streams import reader_gone
from refmoe.cuda.place import Place
from refmoe.report.json_text import json_text

BLAS_HELP = """The library for products on the CPU. mkl: Intel's, weights packed once (pip install 'refmoe[mkl]').
Faster from the second use of a weight on; much faster with bfloat16 weights on a processor with AMX."""


@click.command("generate", cls=GuardedCommand, short_help="Stream text from a checkpoint.")
@click.option("--checkpoint", type=PATH, metavar="DIR", required=True, help="Hugging Face's layout or Mistral's own.")
@layout_option
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--chat", type=PATH, metavar="FILE", help="A JSON list of chat messages to answer.")
@click.option("--tokens", type=Tokens(), help="Token ids to continue; prints ids where there is no tokenizer.")
@click.option("--max-new-tokens", default=64, show_default=True, type=Integer(min=1), help="The most tokens to add.")
@click.option("--temperature", type=Decimal(), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=Integer(), help="Sample from the k most likely tokens only.")
@click.option(
    "--top-p", type=Decimal(), default=1.0, show_default=True,
    help="Sample from the smallest set of tokens with this probability.",
)  # fmt: skip
@click.option("--seed", type=Integer(), default=0, show_default=True, help="The same seed gives the same tokens.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="The dtype of the arithmetic."
)
@click.option("--blas", type=click.Choice(BLAS), default="numpy", show_default=True, help=BLAS_HELP)
@device_option("Weights stay there in their stored dtype; everything else has the --dtype.")
@json_option
def generate_command(
    checkpoint: Path,
    layout: str | None,
    prompt: str | None,
    chat: Path | None,
    tokens: Any,
    device: Place,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt, or answer a chat, and stream the text as it comes.

    \b
    refmoe generate --checkpoint DIR --prompt 'Once upon a time' --max-new-tokens 20
    refmoe generate --checkpoint DIR --chat messages.json --temperature 0.7 --top-p 0.9 --seed 1
    """
    (prefill,) = Input(tokens, prompt, chat).calls(checkpoint, layout)
    start = prefill.tokens
    new = continuation(checkpoint, start, Generation(place=device, **options), layout)
    if as_json:
        ids = list(new.tokens)
        text = "".join(new.pieces(ids)) if new.text.tokenizer else None
        click.echo(json_text({"prompt": list(start), "tokens": ids, "text": text}))
        return
    for piece in new.pieces():
        click.echo(piece, nl=False)
        if reader_gone():
            break
    click.echo()
