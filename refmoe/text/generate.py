# SPDX-License-Identifier: Apache-2.0
"""Generate tokens one after another from any engine that turns new tokens into logits.

The stop token is yielded, so that a caller sees why the reply ended and can continue from the complete reply. A control
token such as EOS has no text (TOK-7).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.errors import InputError
from refmoe.text.sampling import SamplingSettings, sample
from refmoe.text.stream import stream_text
from refmoe.text.tokenizer import Tokenizer

Step = Callable[[Sequence[int]], NDArray[Any]]
"""From new tokens to the logits [V] after the last of them. The function owns the cache of the earlier tokens."""


def generate(
    step: Step,
    prompt: Sequence[int],
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    seed: int,
) -> Iterator[int]:
    """The ids of a reply, one by one, each computed when it is asked for.

    GEN-1  The step function is given the prompt once, whole, and then each generated token alone, in order. EOS
           tokens in the prompt (a dialogue has one after each reply) are tokens like any other.
    GEN-2  The reply ends after `max_new_tokens` tokens, or after the first generated token in `stop_ids`. That token is
           the last one yielded. No step is taken that the next token does not need.
    GEN-3  The repetition penalty counts the prompt's tokens and the generated ones.
    GEN-4  The same logits, settings and seed give the same tokens. One PCG64 generator serves the whole reply.

    Raises InputError, at the call, for an empty prompt, or for a count or seed that is no whole number of 0 or more.
    Raises it during the iteration for logits that `sample` refuses.
    """
    if not len(prompt):
        raise InputError("the prompt is empty, but at least one token was expected")
    for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed)):
        if type(value) is not int or value < 0:
            raise InputError(f"{name} is {value!r}, but a whole number, 0 or more, was expected")
    return generate_checked(step, list(prompt), settings, max_new_tokens, frozenset(stop_ids), seed)


def generate_checked(
    step: Step, prompt: list[int], settings: SamplingSettings, max_new_tokens: int, stop_ids: frozenset[int], seed: int
) -> Iterator[int]:
    """`generate` after its checks, which a generator function would delay until the first token is asked for."""
    rng = np.random.Generator(np.random.PCG64(seed))
    seen = set(prompt)
    new_tokens = prompt
    for _ in range(max_new_tokens):
        token = sample(step(new_tokens), settings, rng, seen)
        yield token
        if token in stop_ids:
            return
        seen.add(token)
        new_tokens = [token]


def generate_text(
    tokenizer: Tokenizer,
    step: Step,
    prompt: Sequence[int],
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    seed: int,
) -> Iterator[str]:
    """The text of a reply in pieces, as it is generated, up to EOS. Raises InputError as `generate` does."""
    tokens = generate(step, prompt, settings, max_new_tokens=max_new_tokens, stop_ids={tokenizer.eos_id}, seed=seed)
    return stream_text(tokenizer, tokens)
