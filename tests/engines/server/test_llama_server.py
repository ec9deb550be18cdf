# SPDX-License-Identifier: Apache-2.0
"""The options of `python -m refmoe.engines.server.llama_server`: any other value is refused before anything starts."""

from __future__ import annotations

import pytest

from refmoe.engines.server.llama_server import main

WRONG = {
    "no port": ["model.gguf"],
    "a port that is none": ["model.gguf", "http"],
    "a port beyond the last one": ["model.gguf", "70000"],
    "an option that is none": ["model.gguf", "8080", "threads=2"],
    "a dtype of the cache": ["model.gguf", "8080", "cache=f64"],
    "flash attention": ["model.gguf", "8080", "flash=maybe"],
    "slots that are no number": ["model.gguf", "8080", "slots=many"],
    "no tokens at once": ["model.gguf", "8080", "batch=0"],
    "no slots": ["model.gguf", "8080", "slots=0"],
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
def test_a_word_that_it_does_not_take_is_one_sentence(words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert isinstance(left.value.code, str)
    assert left.value.code.startswith("usage: ")
