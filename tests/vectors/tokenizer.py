# SPDX-License-Identifier: Apache-2.0
"""`golden/vectors/tokenizer-*.json`: texts and dialogues encoded by mistral-common's tokenizers and templates."""

from __future__ import annotations

import hashlib
import itertools
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from tests.vectors.tokenizer_tables import CHATS, DECODES, STREAMS, TEXTS, Chat, Ids, Text

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
MODELS = {"v1": "Mixtral 8x7B and its Instruct", "v3": "Mixtral 8x22B Instruct"}
MESSAGES = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
BYTES = [bytes([last]) * n for n in (1, 2, 3) for last in (0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF)]


def build(name: str) -> dict[str, Any]:
    """The whole file for the tokenizer "v1" or "v3"."""
    theirs = Theirs(name)
    return {
        "format_version": "1",
        "kind": "tokenizer",
        "why": f"Text to token ids and back, and dialogues to prompts, by the tokenizer of {MODELS[name]}.",
        "source": "mistral-common's tokenizer and chat template over the file named here, without refmoe.",
        "generator": {"mistral-common": version("mistral-common"), "sentencepiece": version("sentencepiece")},
        "tokenizer": theirs.about(),
        "vectors": [
            *map(theirs.text, TEXTS),
            *map(theirs.chat, CHATS),
            *map(theirs.decoded, DECODES),
            *map(theirs.stream, STREAMS),
        ],
    }


class Theirs:
    """mistral-common's tokenizer over one of the files that it ships."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = DATA / FILES[name]
        self.mistral = MistralTokenizer.from_file(os.fspath(self.path), mode=ValidationMode.test)
        self.plain: Any = self.mistral.instruct_tokenizer.tokenizer
        self.pieces: dict[str, int] = {piece: token for token, piece in enumerate(self.plain.vocab())}

    def about(self) -> dict[str, Any]:
        """The name of the file, and its conventions."""
        return {
            "file": self.path.name,
            "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "vocab_size": self.plain.n_words,
            "bos_id": self.plain.bos_id,
            "eos_id": self.plain.eos_id,
            "unk_id": self.plain.unk_id,
        }

    def text(self, case: Text) -> dict[str, Any]:
        """The ids of a text, with BOS, and the text decoded from them."""
        ids = self.plain.encode(case.text, bos=True, eos=False)
        result = {**head(case, "text"), "text": case.text, "utf8": case.text.encode().hex()}
        if case.parts:
            assert "".join(case.parts) == case.text
            result["parts"] = list(case.parts)
        return {**result, "expected": {"ids": ids, "decoded": self.plain.decode(ids)}}

    def chat(self, case: Chat) -> dict[str, Any]:
        """The ids of a dialogue's prompt."""
        template = {"v1": "CHAT-3", "v3": "CHAT-4"}[self.name]
        case = case._replace(clauses=(template, *case.clauses))
        messages = [{"role": role, "content": content} for role, content in case.messages]
        request: Any = ChatCompletionRequest(messages=[MESSAGES[role](content=text) for role, text in case.messages])
        return {
            **head(case, "chat"),
            "messages": messages,
            "expected": {"ids": self.mistral.encode_chat_completion(request).tokens},
        }

    def decoded(self, case: Ids) -> dict[str, Any]:
        """The text of ids."""
        ids = self.ids(case)
        return {**head(case, "decode"), "ids": ids, "expected": {"decoded": self.plain.decode(ids)}}

    def stream(self, case: Ids) -> dict[str, Any]:
        """The text that each id adds: the text that no continuation can change, less the text returned before."""
        ids, pieces, settled = self.ids(case), [], ""
        for count in range(1, len(ids) + 1):
            now = self.settled(ids[:count])
            assert now.startswith(settled)
            pieces.append(now[len(settled) :])
            settled = now
        whole = self.plain.decode(ids)
        assert whole.startswith(settled)
        return {
            **head(case, "stream"),
            "ids": ids,
            "expected": {"pieces": pieces, "rest": whole[len(settled) :], "decoded": whole},
        }

    def settled(self, ids: list[int]) -> str:
        """The longest beginning that the texts of `ids` with any continuation share."""
        tails = [[], [self.pieces["a"]], *([self.byte(b) for b in tail] for tail in BYTES)]
        texts: list[str] = [self.plain.decode([*ids, *tail]) for tail in tails]
        same = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
        return "".join(characters[0] for characters in same)

    def byte(self, value: int) -> int:
        """The id of a byte token."""
        return self.pieces[f"<0x{value:02X}>"]

    def ids(self, case: Ids) -> list[int]:
        """Pieces as the vocabulary writes them, and bytes, to ids."""
        return [self.byte(piece) if isinstance(piece, int) else self.pieces[piece] for piece in case.pieces]


def head(case: Text | Chat | Ids, kind: str) -> dict[str, Any]:
    """The fields that every vector begins with."""
    return {"name": case.name, "why": case.why, "kind": kind, "clauses": list(case.clauses), "bugs": list(case.bugs)}
