# SPDX-License-Identifier: Apache-2.0
"""Bugs of tokenizers, each a `refmoe.bugs.vector_checks.Text` with one method replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from refmoe.bugs.mutant import TOKENIZER, mutant
from refmoe.bugs.vector_checks import Text
from refmoe.text.tokenizer import SPACE, Tokenizer

LONGEST_PIECE = 20
"""Characters: more than any piece of the two vocabularies has, except runs of spaces."""


def without_prefix(text: Tokenizer, segment: str) -> list[int]:
    """The ids of a text without a space before it. A newline before the text, which never merges, prevents the
    space."""
    return Tokenizer.encode(text, "\n" + segment, bos=False)[2:]


@mutant(
    "tok-legacy-space-after-special", breaks=["TOK-1", "TOK-4"], touches=["ids"], changes=TOKENIZER,
    fix="put a space before the text once, not before each piece between control tokens",
    sources=[
        "https://github.com/huggingface/tokenizers/issues/1448",
        "https://github.com/huggingface/transformers/pull/25224",
        "https://github.com/huggingface/transformers/issues/31513",
    ],
)  # fmt: skip
class SpaceAfterSpecial(Text):
    """The text is cut at control strings, and each segment is encoded separately, with its own leading space. The
    legacy wrapper of SentencePiece does this."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        specials = {"<unk>": int(self.processor.unk_id()), "<s>": self.bos_id, "</s>": self.eos_id}
        ids = [self.bos_id] if bos else []
        for segment in re.split("(<unk>|</?s>)", text):
            ids += [specials[segment]] if segment in specials else super().encode(segment, bos=False)
        return ids


@mutant(
    "tok-no-dummy-prefix", breaks=["TOK-1"], touches=["ids"], changes=TOKENIZER,
    fix="put one space before a text that is not empty (add_dummy_prefix)",
    sources=[
        "https://github.com/ggml-org/llama.cpp/pull/2805",
        "https://github.com/huggingface/transformers/pull/28010",
        "https://github.com/ggml-org/llama.cpp/pull/3538",
    ],
)  # fmt: skip
class NoDummyPrefix(Text):
    """No space is put before the text, so its first word is not the piece that begins with a space."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [self.bos_id] * bos + without_prefix(self, text)


@mutant(
    "tok-double-bos", breaks=["TOK-5", "TOK-4"], touches=["ids"], changes=TOKENIZER,
    fix="add BOS in one place: the template's text or the tokenizer, not both",
    sources=[
        "https://github.com/mdegans/drama_llama/issues/93",
        "https://github.com/vllm-project/vllm/pull/16081",
        "https://github.com/vllm-project/vllm/pull/16976",
        "https://github.com/InfiniTensor/InfiniLM/issues/388",
    ],
)  # fmt: skip
class DoubleBos(Text):
    """'<s>' at the beginning of a text is parsed as BOS, and the tokenizer adds its own BOS before it. The text of a
    template begins with '<s>'."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        if not text.startswith("<s>"):
            return super().encode(text, bos)
        return [self.bos_id] * (1 + bos) + without_prefix(self, text.removeprefix("<s>"))

    def chat(self, messages: Any) -> list[int]:
        return [self.bos_id, *super().chat(messages)]


@mutant(
    "tok-byte-fallback-unk", breaks=["TOK-3"], touches=["ids"], severity="medium", changes=TOKENIZER,
    fix="spell a character that is no piece in byte tokens",
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/28862",
        "https://github.com/ariannamethod/notorch/pull/41",
    ],
)  # fmt: skip
class UnknownForBytes(Text):
    """A character that is no piece becomes <unk> instead of its bytes. Newline is such a character."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        unknown = int(self.processor.unk_id())
        return [unknown if self.is_byte(token) else token for token in super().encode(text, bos)]


@cache
def ordinary_pieces(text: Text) -> dict[str, int]:
    """The pieces that a text can consist of, with their ids."""
    tokens = range(text.vocab_size)
    special = {t for t in tokens if text.is_control(t) or text.is_byte(t) or text.is_unknown(t)}
    return {text.piece(token): token for token in tokens if token not in special}


@mutant(
    "tok-greedy-longest-match", breaks=["TOK-2"], touches=["ids"], changes=TOKENIZER,
    fix="merge the pair with the highest score first; the longest piece is not always reached",
    sources=[
        "https://github.com/ggml-org/llama.cpp/pull/252",
        "https://github.com/ggml-org/llama.cpp/issues/13256",
    ],
)  # fmt: skip
class LongestMatch(Text):
    """The longest piece that fits is taken from the left, and bytes if none fits. Pairs are not merged by score."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        rest = (SPACE + text).replace(" ", SPACE) if text else ""
        ids, pieces = [self.bos_id] * bos, ordinary_pieces(self)
        while rest:
            lengths = range(min(len(rest), LONGEST_PIECE), 0, -1)
            longest = next((rest[:n] for n in lengths if rest[:n] in pieces), None)
            if longest is None:
                longest = rest[0]
                ids += [int(self.processor.piece_to_id(f"<0x{byte:02X}>")) for byte in longest.encode()]
            else:
                ids.append(pieces[longest])
            rest = rest[len(longest) :]
        return ids


@mutant(
    "tok-wrong-scheme", breaks=["TOK-1", "TOK-3"], touches=["ids"], severity="medium", changes=TOKENIZER,
    fix="write a space as U+2581, as SentencePiece does, not as the byte-level U+0120",
    sources=["https://github.com/ariannamethod/notorch/pull/41"],
)  # fmt: skip
class ByteLevelSpaces(Text):
    """GPT-2's byte-level scheme is used with a SentencePiece vocabulary. A space is written U+0120, which no piece
    contains, and unknown characters are dropped."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = without_prefix(self, text.replace(" ", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"))
        return [self.bos_id] * bos + [token for token in ids if not self.is_byte(token)]


@mutant(
    "tok-context-continuation-split", breaks=["TOK-1", "TOK-2"], touches=["ids"], severity="medium",
    changes=TOKENIZER, fix="encode prompt and continuation as one text, then cut the ids",
    sources=["https://github.com/ggml-org/llama.cpp/pull/2805"],
)  # fmt: skip
class PartsApart(Text):
    """A prompt and its continuation are encoded separately and their ids joined. The continuation gets its own leading
    space, and no piece crosses the border."""

    def continued(self, prompt: str, continuation: str) -> list[int]:
        return self.encode(prompt) + self.encode(continuation, bos=False)


@mutant(
    "tok-stream-utf8-split", breaks=["STREAM-2", "TOK-8"], touches=["text"], severity="medium", changes=TOKENIZER,
    fix="keep the bytes of an unfinished character until its last one has come",
    sources=[
        "https://github.com/waybarrios/vllm-mlx/pull/109",
        "https://github.com/exo-explore/exo/pull/1691",
        "https://github.com/google/sentencepiece/issues/906",
    ],
)  # fmt: skip
class OneByOne(Text):
    """Tokens are decoded one by one as they arrive, so each byte of a character becomes U+FFFD. Spaces are kept here;
    losing them would be another bug."""

    def stream(self, ids: Iterable[int]) -> tuple[list[str], str]:
        pieces: list[str] = []
        for token in ids:
            first = not any(pieces)
            text = self.decode([token])
            spaced = not first and not self.is_byte(token) and self.piece(token).startswith(SPACE)
            pieces.append(" " + text if spaced else text)
        return pieces, ""
