"""`tokenizer-v1.json` and `tokenizer-v3.json` against refmoe, and against the known bugs of tokenizers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
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
    """STREAM-1 to STREAM-3."""
    stream = TextStream(tokenizer)
    assert [stream.feed(token) for token in vector["ids"]] == vector["expected"]["pieces"]
    assert stream.finish() == vector["expected"]["rest"]
    assert "".join([*vector["expected"]["pieces"], vector["expected"]["rest"]]) == vector["expected"]["decoded"]


def right(tokenizer: Tokenizer, vector: Vector) -> Any:
    """What refmoe says; a variation says something else on the vectors that catch it."""
    if vector["kind"] == "text":
        return tokenizer.encode(vector["text"])
    if vector["kind"] == "chat":
        return encode_chat(tokenizer, vector["messages"])
    return tokenizer.decode(vector["ids"])


def expected(vector: Vector) -> Any:
    return vector["expected"]["ids" if vector["kind"] in ("text", "chat") else "decoded"]


def without_prefix(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text with no space put before it: a newline, which never merges, keeps the space away."""
    return tokenizer.encode("\n" + text, bos=False)[2:]


def no_dummy_prefix(tokenizer: Tokenizer, vector: Vector) -> Any:
    if vector["kind"] != "text":
        return right(tokenizer, vector)
    return [tokenizer.bos_id, *without_prefix(tokenizer, vector["text"])]


def double_bos(tokenizer: Tokenizer, vector: Vector) -> Any:
    """'<s>' at the beginning of a text is parsed; a template's '<s>' is there beside the tokenizer's own."""
    if vector["kind"] == "chat":
        return [tokenizer.bos_id, *right(tokenizer, vector)]
    if vector["kind"] != "text" or not vector["text"].startswith("<s>"):
        return right(tokenizer, vector)
    return [tokenizer.bos_id, tokenizer.bos_id, *without_prefix(tokenizer, vector["text"].removeprefix("<s>"))]


def space_after_special(tokenizer: Tokenizer, vector: Vector) -> Any:
    """The text is cut at control strings, and each segment gets a leading space of its own."""
    if vector["kind"] != "text":
        return right(tokenizer, vector)
    specials = {"<unk>": tokenizer.processor.unk_id(), "<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id}
    ids = [tokenizer.bos_id]
    for segment in re.split("(<unk>|</?s>)", vector["text"]):
        ids += [specials[segment]] if segment in specials else tokenizer.encode(segment, bos=False)
    return ids


def unknown_for_bytes(tokenizer: Tokenizer, vector: Vector) -> Any:
    if vector["kind"] != "text":
        return right(tokenizer, vector)
    unknown = int(tokenizer.processor.unk_id())
    return [unknown if tokenizer.is_byte(token) else token for token in right(tokenizer, vector)]


def longest_match(tokenizer: Tokenizer, vector: Vector) -> Any:
    """From the left, the longest piece that fits, and bytes where none does."""
    if vector["kind"] != "text":
        return right(tokenizer, vector)
    rest = ("▁" + vector["text"]).replace(" ", "▁") if vector["text"] else ""
    ids, pieces = [tokenizer.bos_id], ORDINARY[tokenizer.path]
    while rest:
        longest = next((rest[:n] for n in range(min(len(rest), 20), 0, -1) if rest[:n] in pieces), None)
        ids += (
            [pieces[longest]]
            if longest
            else [tokenizer.processor.piece_to_id(f"<0x{b:02X}>") for b in rest[0].encode()]
        )
        rest = rest[len(longest or rest[0]) :]
    return ids


ORDINARY = {
    tokenizer.path: {
        tokenizer.piece(token): token
        for token in range(tokenizer.vocab_size)
        if not (tokenizer.is_control(token) or tokenizer.is_byte(token) or tokenizer.is_unknown(token))
    }
    for tokenizer in TOKENIZERS.values()
}


def byte_level_spaces(tokenizer: Tokenizer, vector: Vector) -> Any:
    """GPT-2's 'Ġ' for a space, over a vocabulary that has no such piece: what is not found is dropped."""
    if vector["kind"] != "text":
        return right(tokenizer, vector)
    ids = without_prefix(tokenizer, vector["text"].replace(" ", "Ġ"))
    return [tokenizer.bos_id, *(token for token in ids if not tokenizer.is_byte(token))]


def parts_apart(tokenizer: Tokenizer, vector: Vector) -> Any:
    if "parts" not in vector:
        return right(tokenizer, vector)
    return [tokenizer.bos_id, *(token for part in vector["parts"] for token in tokenizer.encode(part, bos=False))]


def one_by_one(tokenizer: Tokenizer, vector: Vector) -> Any:
    """Each token decoded apart, bytes too. (It loses spaces besides; the vectors that claim the bug have none.)"""
    if vector["kind"] != "stream":
        return right(tokenizer, vector)
    return "".join(tokenizer.decode([token]) for token in vector["ids"])


VARIATIONS: dict[str, tuple[Callable[[Tokenizer, Vector], Any], str]] = {
    "tok-legacy-space-after-special": (space_after_special, "eos-in-text"),
    "tok-no-dummy-prefix": (no_dummy_prefix, "letter"),
    "tok-double-bos": (double_bos, "bos-in-text"),
    "tok-byte-fallback-unk": (unknown_for_bytes, "newline"),
    "tok-greedy-longest-match": (longest_match, "longest-match"),
    "tok-wrong-scheme": (byte_level_spaces, "sentence"),
    "tok-context-continuation-split": (parts_apart, "continuation"),
    "tok-stream-utf8-split": (one_by_one, "stream-emoji"),
}
# Every bug of the class is in the table above. gen-pad-eq-eos (class decode-sampling) is not a tokenizer's: the
# vector chat-five-turns gives ids with genuine EOS tokens inside, and a trace of them shows whether they are masked.


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("bug", VARIATIONS)
def test_each_known_bug_is_caught(version: str, bug: str) -> None:
    """The vector named here catches it, and so does each vector that says so."""
    variation, name = VARIATIONS[bug]
    tokenizer, content = TOKENIZERS[version], CONTENT[version]["vectors"]
    caught = {vector["name"] for vector in content if variation(tokenizer, vector) != expected(vector)}
    assert name in caught
    claimed = {vector["name"] for vector in content if bug in vector["bugs"]}
    assert name in claimed
    assert claimed - caught == set()


@pytest.mark.parametrize("version", FILES)
def test_a_dialogue_with_genuine_eos_tokens_is_among_the_vectors(version: str) -> None:
    """What gen-pad-eq-eos needs: EOS inside the context, which a mask `ids != eos` would hide."""
    (ids,) = (v["expected"]["ids"] for v in CONTENT[version]["vectors"] if v["name"] == "chat-five-turns")
    assert ids.count(CONTENT[version]["tokenizer"]["eos_id"]) == 2


def test_no_vector_claims_a_bug_without_a_variation() -> None:
    claimed = {bug for content in CONTENT.values() for vector in content["vectors"] for bug in vector["bugs"]}
    assert claimed <= set(VARIATIONS)
