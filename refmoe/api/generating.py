# SPDX-License-Identifier: Apache-2.0
"""Generation: continue a prompt with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.arithmetic.exact.slices import on_host
from refmoe.checkpoints.load import load_checkpoint, read_configuration
from refmoe.cuda.decode import Decoder
from refmoe.cuda.memory import resident, widest
from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.spec.model import Caches, Model, forward
from refmoe.text.chat import load_chat
from refmoe.text.folder import FolderText, read_folder
from refmoe.text.generate import generate
from refmoe.text.sampling import SamplingSettings

DTYPES = ("float32", "float64")
BLAS = ("numpy", "mkl")


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


def session(device: Place, model: Model, capacity: int, dtype: str, blas: str) -> Session | OnDevice:
    """An empty sequence with room for `capacity` tokens."""
    if device.on_gpu and dtype == "float32" and blas == "numpy":
        return OnDevice(device.decoder(model, capacity))
    return Session(device.native(np.dtype(dtype), blas=blas), model)


@dataclass(frozen=True)
class Generation:
    """How text is generated."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    """One of `DTYPES`."""
    blas: str = "numpy"
    """One of `BLAS`."""
    place: Place = CPU


def prompt_tokens(
    checkpoint: Path, prompt: str, chat: Path | None = None, layout: str | None = None
) -> tuple[int, ...]:
    """The token ids of a text, or of a chat, as the folder of a checkpoint says.

    chat: a JSON list of messages, which takes the place of the text.   Raises InputError when a file cannot be read.
    """
    text = read_folder(checkpoint, read_configuration(checkpoint, layout).config.vocab)
    return tuple(text.encode(prompt) if chat is None else text.encode_chat(load_chat(chat)))


@dataclass(frozen=True)
class Continuation:
    """New tokens, computed as they are taken."""

    tokens: Iterator[int]
    text: FolderText

    def pieces(self, tokens: Sequence[int] | None = None) -> Iterator[str]:
        """The text piece by piece; token ids where there is no tokenizer.   tokens: those to write; None: its own"""
        return self.text.pieces(self.tokens if tokens is None else tokens)


def continuation(checkpoint: Path, prompt: Sequence[int], how: Generation, layout: str | None = None) -> Continuation:
    """Continue a prompt.   prompt: token ids

    Raises InputError for a token outside the vocabulary, and when there is too little memory.
    """
    loaded = load_checkpoint(checkpoint, layout)
    for token in prompt:
        if not 0 <= token < loaded.config.vocab:
            raise InputError(f"token {token} of the prompt is outside the model's vocabulary of {loaded.config.vocab}")
    settings = SamplingSettings(temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)
    text = read_folder(checkpoint, loaded.config.vocab)
    place, dtype, count = how.place, how.dtype, how.max_new_tokens
    place.require_memory(resident(loaded.config, len(prompt), count, widest(loaded.dtypes), dtype))
    model = Model(loaded.config, loaded.parameters, place.steps(dtype))
    step = session(place, model, len(prompt) + count, dtype, how.blas).step
    new = generate(step, list(prompt), settings, max_new_tokens=count, stop_ids=text.end, seed=how.seed)
    return Continuation(new, text)
