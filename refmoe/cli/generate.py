"""``refmoe generate``: stream text from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmoe.arithmetic.exact.slices import on_host
from refmoe.checkpoints.load import load_checkpoint
from refmoe.cli.options import PATH, Input, Tokens, device_option, json_option
from refmoe.cuda.decode import Decoder
from refmoe.cuda.memory import resident, widest
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.spec.model import Caches, Model, forward
from refmoe.text.generate import generate
from refmoe.text.sampling import SamplingSettings
from refmoe.text.stream import stream_text
from refmoe.text.tokenizer import Tokenizer

BLAS_HELP = """The library for products on the CPU. mkl: Intel's, weights packed once (pip install 'refmoe[mkl]').
Faster from the second use of a weight on; much faster with bfloat16 weights on a processor with AMX."""


class Session:
    """The state of one sequence that is being generated: its model, and the caches of its tokens."""

    def __init__(self, ops: Any, model: Model) -> None:
        self.ops = ops
        self.model = model
        self.caches: Caches | None = None
        self.past = 0

    def step(self, tokens: Sequence[int]) -> Any:
        """Append tokens and return the logits [V] after the last one."""
        positions = self.ops.integers(range(self.past, self.past + len(tokens)))
        logits, self.caches = forward(self.ops, self.model, self.ops.integers(tokens), positions, self.caches)
        self.past += len(tokens)
        return on_host(logits[-1])


class OnDevice:
    """The state of one sequence on a GPU, in memory that was allocated before."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def step(self, tokens: Sequence[int]) -> Any:
        """Append tokens and return the logits [V] after the last one."""
        one = len(tokens) == 1 and self.decoder.past
        return on_host(self.decoder.step(tokens[0]) if one else self.decoder.read(tokens))[0]


@dataclass(frozen=True)
class GenerateOptions:
    """The values of the options of ``refmoe generate`` beside its input."""

    checkpoint: Path
    layout: str | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    dtype: str
    blas: str
    device: Place
    as_json: bool


def session(device: Place, model: Model, capacity: int, dtype: str, blas: str) -> Session | OnDevice:
    """An empty sequence with room for `capacity` tokens."""
    if device.on_gpu and dtype == "float32" and blas == "numpy":
        return OnDevice(device.decoder(model, capacity))
    return Session(device.native(np.dtype(dtype), blas=blas), model)


@click.command("generate", short_help="Stream text from a checkpoint.")
@click.option("--checkpoint", type=PATH, metavar="DIR", required=True, help="Hugging Face's layout or Mistral's own.")
@click.option("--layout", type=click.Choice(["hf", "mistral"]), help="How DIR is laid out; told by its files.")
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--chat", type=PATH, metavar="FILE", help="A JSON list of chat messages to answer.")
@click.option("--tokens", type=Tokens(), help="Token ids to continue; prints ids where there is no tokenizer.model.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, help="Sample from the k most likely tokens only.")
@click.option("--top-p", type=float, default=1.0, help="Sample from the smallest set of tokens with this probability.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same tokens.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--blas", type=click.Choice(["numpy", "mkl"]), default="numpy", show_default=True, help=BLAS_HELP)
@device_option("Weights stay there in their stored dtype; everything else has the --dtype.")
@json_option
def generate_command(prompt: str | None, chat: Path | None, tokens: Any, **options: Any) -> None:
    """Continue a prompt, or answer a chat, and stream the text as it comes.

    \b
    refmoe generate --checkpoint DIR --prompt 'Once upon a time' --max-new-tokens 20
    refmoe generate --checkpoint DIR --chat messages.json --temperature 0.7 --top-p 0.9 --seed 1
    """
    asked = GenerateOptions(**options)
    loaded = load_checkpoint(asked.checkpoint, asked.layout)
    (prefill,) = Input(tokens, prompt, chat).calls(asked.checkpoint)
    start = prefill.tokens
    for token in start:
        if not 0 <= token < loaded.config.vocab:
            raise InputError(f"token {token} of the prompt is outside the model's vocabulary of {loaded.config.vocab}")
    settings = SamplingSettings(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p)
    vocabulary = asked.checkpoint / "tokenizer.model"
    tokenizer = Tokenizer.load(vocabulary) if vocabulary.exists() else None
    stop = {tokenizer.eos_id} if tokenizer else set()
    device, dtype, count = asked.device, asked.dtype, asked.max_new_tokens
    device.require_memory(resident(loaded.config, len(start), count, widest(loaded.dtypes), dtype))
    model = Model(loaded.config, loaded.parameters, device.steps(dtype))
    step = session(device, model, len(start) + count, dtype, asked.blas).step
    new = generate(step, list(start), settings, max_new_tokens=count, stop_ids=stop, seed=asked.seed)
    if asked.as_json:
        ids = list(new)
        text = "".join(stream_text(tokenizer, ids)) if tokenizer else None
        click.echo(json.dumps({"prompt": list(start), "tokens": ids, "text": text}))
        return
    for piece in stream_text(tokenizer, new) if tokenizer else (f"{token} " for token in new):
        click.echo(piece, nl=False)
    click.echo()
