# SPDX-License-Identifier: Apache-2.0
"""GEN-1 to GEN-4, with a step function that records what it is given."""

import numpy as np
import pytest

from refmoe.errors import InputError
from refmoe.text.chat import encode_chat
from refmoe.text.generate import generate, generate_text
from refmoe.text.sampling import SamplingSettings, sample

GREEDY = SamplingSettings()
WARM = SamplingSettings(temperature=1.0)


class Script:
    """A model that returns the given tokens for any input, and records its inputs."""

    def __init__(self, tokens, vocab_size=10) -> None:
        self.tokens, self.vocab_size, self.told = list(tokens), vocab_size, []

    def __call__(self, new_tokens) -> np.ndarray:
        self.told.append(list(new_tokens))
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        logits[self.tokens[len(self.told) - 1]] = 1
        return logits


def reply(step, prompt=(1,), settings=GREEDY, *, max_new_tokens=100, stop_ids=(2,), seed=0) -> list[int]:
    return list(generate(step, prompt, settings, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed))


def test_the_step_is_given_the_prompt_and_then_each_new_token():
    """GEN-1, GEN-2: no step follows the last token."""
    step = Script([5, 6, 7, 8])
    assert reply(step, [1, 4, 3], max_new_tokens=3) == [5, 6, 7]
    assert step.told == [[1, 4, 3], [5], [6]]


def test_an_eos_inside_the_prompt_is_a_token_like_any_other(v1):
    """GEN-1, bug gen-pad-eq-eos: a second turn's prompt holds a real EOS, and it reaches the model unmasked."""
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    prompt = encode_chat(v1, [{"role": role, "content": content} for role, content in turns])
    assert prompt.count(v1.eos_id) == 1
    step = Script([5, v1.eos_id], v1.vocab_size)
    assert reply(step, prompt, stop_ids={v1.eos_id}) == [5, v1.eos_id]
    assert step.told == [prompt, [5]]


def test_the_stop_token_is_the_last_one():
    """GEN-2"""
    assert reply(Script([5, 2, 7])) == [5, 2]
    assert reply(Script([2])) == [2]
    assert reply(Script([5, 7, 2]), stop_ids={7, 8}) == [5, 7]
    assert reply(Script([5, 2, 6]), stop_ids=(), max_new_tokens=3) == [5, 2, 6]


def test_no_token_asked_for_is_no_step():
    step = Script([])
    assert reply(step, max_new_tokens=0) == []
    assert step.told == []


def test_each_token_is_computed_when_it_is_asked_for():
    """GEN-2"""
    step = Script([5, 6, 7])
    tokens = generate(step, [1], GREEDY, max_new_tokens=3, stop_ids=(), seed=0)
    assert step.told == []
    assert next(tokens) == 5
    assert step.told == [[1]]


def test_the_penalty_counts_the_prompt_and_the_reply():
    """GEN-3: the logits never change, so each token is taken once, and then the least penalised token leads."""

    def step(new_tokens):
        return np.array([4.0, 3.0, 2.5, 0.5])

    settings = SamplingSettings(repetition_penalty=2.0)
    assert reply(step, [3], settings, max_new_tokens=4, stop_ids=()) == [0, 1, 2, 0]
    assert reply(step, [0], settings, max_new_tokens=3, stop_ids=()) == [1, 2, 0]


def test_a_seed_fixes_the_reply():
    """GEN-4: one generator serves the whole reply, PCG64 of the seed."""

    def step(new_tokens):
        return np.zeros(50)

    first, again, other = (reply(step, [1], WARM, stop_ids=(), max_new_tokens=20, seed=s) for s in (3, 3, 4))
    assert first == again != other
    rng = np.random.Generator(np.random.PCG64(3))
    assert first == [sample(np.zeros(50), WARM, rng) for _ in range(20)]
    assert len(set(first)) > 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_a_bad_request_is_refused_at_the_call(changes, sentence):
    """InputError is raised before the first token is asked for."""
    arguments = {"prompt": [1], "max_new_tokens": 1, "seed": 0} | changes
    with pytest.raises(InputError, match=sentence):
        generate(Script([5]), settings=GREEDY, stop_ids=(), **arguments)


def test_logits_that_no_choice_can_be_made_from_end_the_reply_with_an_error():
    with pytest.raises(InputError, match="token 0 is nan"):
        reply(lambda new_tokens: np.array([np.nan, 1.0]))


def test_a_reply_streams_as_text_up_to_eos(tokenizer):
    """GEN-2 and STREAM-1: an emoji of four byte tokens comes whole, and EOS has no text."""
    text = "Hi \N{GRINNING FACE} there"
    ids = tokenizer.encode(text, bos=False)
    step = Script([*ids, tokenizer.eos_id, ids[0]], tokenizer.vocab_size)
    pieces = list(generate_text(tokenizer, step, [tokenizer.bos_id], GREEDY, max_new_tokens=100, seed=0))
    assert "".join(pieces) == text
    assert "\N{GRINNING FACE}" in pieces
    assert "" not in pieces


def test_a_reply_cut_inside_a_character_ends_with_replacements(v1):
    ids = v1.encode("\N{GRINNING FACE}" * 2 + "\U0010ffff", bos=False)
    step = Script(ids, v1.vocab_size)
    pieces = generate_text(v1, step, [1], GREEDY, max_new_tokens=len(ids) - 1, seed=0)
    assert "".join(pieces) == v1.decode(ids[:-1]) == "\N{GRINNING FACE}" * 2 + "\ufffd" * 3
