# SPDX-License-Identifier: Apache-2.0
"""`tokenizer-v1.json` and `tokenizer-v3.json` against refmoe. The known bugs: `tests/bugs/test_outside.py`."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from refmoe.text.chat import encode_chat
from refmoe.text.stream import TextStream
from refmoe.text.tokenizer import Tokenizer

pytest.importorskip("mistral_common")

from tests.vectors.files import load
from tests.vectors.tokenizer import DATA, FILES

Vector = dict[str, Any]
CONTENT = {version: load(f"tokenizer-{version}.json") for version in FILES}
TOKENIZERS = {version: Tokenizer.load(DATA / name) for version, name in FILES.items()}


def vectors(*kinds: str) -> list[Any]:
    """(tokenizer, vector) for both versions."""
    return [
        pytest.param(TOKENIZERS[version], vector, id=f"{version}-{vector['name']}")
        for version, content in CONTENT.items()
        for vector in content["vectors"]
        if vector["kind"] in kinds
    ]


@pytest.mark.parametrize("version", FILES)
def test_the_file_is_the_one_that_the_vectors_are_of(version: str) -> None:
    about, tokenizer = CONTENT[version]["tokenizer"], TOKENIZERS[version]
    assert about["file"] == tokenizer.path.name
    assert about["sha256"] == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert [about[name] for name in ("vocab_size", "bos_id", "eos_id")] == [
        tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id,
    ]  # fmt: skip
    assert tokenizer.is_unknown(about["unk_id"])


@pytest.mark.parametrize(("tokenizer", "vector"), vectors("text"))
def test_texts_are_encoded_and_decoded(tokenizer: Tokenizer, vector: Vector) -> None:
    """TOK-1 to TOK-8."""
    assert bytes.fromhex(vector["utf8"]).decode() == vector["text"]
    assert tokenizer.encode(vector["text"]) == vector["expected"]["ids"]
    assert tokenizer.decode(vector["expected"]["ids"]) == vector["expected"]["decoded"]


@pytest.mark.parametrize(("tokenizer", "vector"), vectors("chat"))
def test_dialogues_are_encoded(tokenizer: Tokenizer, vector: Vector) -> None:
    """CHAT-2 to CHAT-5."""
    assert encode_chat(tokenizer, vector["messages"]) == vector["expected"]["ids"]


@pytest.mark.parametrize(("tokenizer", "vector"), vectors("decode"))
def test_ids_are_decoded(tokenizer: Tokenizer, vector: Vector) -> None:
    """TOK-6 to TOK-8, for ids that no text gives."""
    assert tokenizer.decode(vector["ids"]) == vector["expected"]["decoded"]


@pytest.mark.parametrize(("tokenizer", "vector"), vectors("stream"))
def test_ids_are_decoded_as_they_come(tokenizer: Tokenizer, vector: Vector) -> None:
    """STREAM-1 to STREAM-3 for the vectors of streams."""
    stream = TextStream(tokenizer)
    assert [stream.feed(token) for token in vector["ids"]] == vector["expected"]["pieces"]
    assert stream.finish() == vector["expected"]["rest"]
    assert "".join([*vector["expected"]["pieces"], vector["expected"]["rest"]]) == vector["expected"]["decoded"]


@pytest.mark.parametrize("version", FILES)
def test_a_dialogue_with_genuine_eos_tokens_is_among_the_vectors(version: str) -> None:
    """The bug gen-pad-eq-eos shows only with an EOS inside the context, which a mask `ids != eos` would hide."""
    (ids,) = (v["expected"]["ids"] for v in CONTENT[version]["vectors"] if v["name"] == "chat-five-turns")
    assert ids.count(CONTENT[version]["tokenizer"]["eos_id"]) == 2
