# SPDX-License-Identifier: Apache-2.0
"""The text of a checkpoint: its vocabulary, added tokens, chat template and end tokens, obeyed or refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.reading import exists, is_folder
from refmoe.files.sentences import quoted
from refmoe.text.chat import check_messages, encode_chat
from refmoe.text.chat_template import ChatTemplate
from refmoe.text.gguf_vocabulary import read_vocabulary
from refmoe.text.settings import AddedToken, TextSettings, read_settings
from refmoe.text.stream import TextStream
from refmoe.text.tokenizer import Tokenizer
from refmoe.text.tokenizer_json import JsonStream, JsonTokenizer

JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


@dataclass(frozen=True)
class FolderText:
    """How a folder turns text into token ids, and back. Build it with `read_folder`."""

    folder: Path
    rows: int
    """The number of rows of the model's embedding: every id below it may be generated."""
    tokenizer: Tokenizer | JsonTokenizer | None
    """None where the folder has no vocabulary: then there are only token ids."""
    settings: TextSettings
    refused: tuple[AddedToken, ...] = ()
    """Tokens whose text no prompt may hold."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt.

        TEXT-1  Where the folder has a tokenizer.json, it alone says how a text is split, and what stands before it.
        TEXT-2  With a tokenizer.model alone, TOK-1 to TOK-5 say so. A text that holds an added token is refused: the
                file does not say how the text beside such a token is split, and engines differ.

        Raises InputError when the folder has no vocabulary, or for such a text.
        """
        tokenizer = self._need()
        self._refuse_added(text, (*self.beyond.values(), *self.refused))
        return tokenizer.encode(text)

    def encode_chat(self, messages: object) -> list[int]:
        """The prompt of a dialogue. messages: a list of {"role": …, "content": …}

        TEXT-3  The folder's chat template is obeyed: its text has the special tokens already, so none are added.
        TEXT-4  Without a template, the clauses CHAT-1 to CHAT-6 of Mixtral's own hold, with a tokenizer.model.

        Raises InputError for a dialogue that CHAT-1 or the template refuses, and when there is no way to encode it.
        """
        tokenizer, settings = self._need(), self.settings
        if settings.template is None or settings.template_file is None:
            if isinstance(tokenizer, Tokenizer):
                return encode_chat(tokenizer, messages)
            if not exists(self.folder / SENTENCEPIECE):
                raise InputError(
                    f"{self.folder}: has neither a chat template nor {SENTENCEPIECE}, but a dialogue needs one"
                )
            return encode_chat(Tokenizer.load(self.folder / SENTENCEPIECE), messages)
        checked = check_messages(messages)
        text = ChatTemplate(settings.template_file, settings.template, settings.special).render(checked)
        if isinstance(tokenizer, Tokenizer):
            self._refuse_added(text, (*settings.added.values(), *map(AddedToken, settings.special.values())))
        return tokenizer.encode(text, bos=False)

    @cached_property
    def beyond(self) -> dict[int, AddedToken]:
        """The added tokens that a tokenizer.model does not have."""
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, Tokenizer):
            return {}
        pieces = tokenizer.vocab_size
        return {
            token: added for token, added in self.settings.added.items()
            if token >= pieces or tokenizer.piece(token) != added.content
        }  # fmt: skip

    @property
    def end(self) -> frozenset[int]:
        """The tokens that end a reply: those of generation_config.json, of config.json, or of the vocabulary."""
        if self.settings.end is not None:
            return self.settings.end
        return frozenset({self.tokenizer.eos_id}) if isinstance(self.tokenizer, Tokenizer) else frozenset()

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of token ids as they arrive, in pieces that are never empty; the ids where there is no vocabulary.

        TEXT-5  Every id below the number of rows can be written. One without a piece has no text.
        """
        stream: JsonStream | FolderStream
        if self.tokenizer is None:
            yield from (f"{token} " for token in tokens)
            return
        if isinstance(self.tokenizer, JsonTokenizer):
            stream = JsonStream(self.tokenizer)
        else:
            stream = FolderStream(self.tokenizer, self.beyond)
        for token in tokens:
            if text := stream.feed(token):
                yield text
        if text := stream.finish():
            yield text

    def _need(self) -> Tokenizer | JsonTokenizer:
        if self.tokenizer is None:
            if not is_folder(self.folder):
                raise InputError(f"{self.folder}: its vocabulary has no piece of text, but text needs one")
            raise InputError(f"{self.folder}: neither {JSON} nor {SENTENCEPIECE} is there, but text needs one of them")
        return self.tokenizer

    def _refuse_added(self, text: str, tokens: Iterable[AddedToken]) -> None:
        """Raises InputError for a text that holds one of these added tokens."""
        for added in tokens:
            if added.content in text:
                raise InputError(
                    f"{self._need().path}: does not say how the text beside the token {quoted(added.content)} is "
                    f"split, so {JSON} was expected"
                )


class FolderStream(TextStream):
    """A stream that takes added tokens, and rows without a piece, beside the pieces of a tokenizer.model."""

    def __init__(self, tokenizer: Tokenizer, added: dict[int, AddedToken]) -> None:
        super().__init__(tokenizer)
        self.added = added

    def feed(self, token: int) -> str:
        if token in self.added:
            text, added = self.finish(), self.added[token]
            self.at_start = self.at_start and added.special
            return text if added.special else text + added.content
        return "" if token >= self.tokenizer.vocab_size else super().feed(token)


def read_folder(folder: Path, rows: int) -> FolderText:
    """The text of a checkpoint's folder, or of a GGUF file.   rows: the number of rows of the model's embedding

    Raises InputError for files that cannot be obeyed, and for a vocabulary of more tokens than there are rows.
    """
    tokenizer: Tokenizer | JsonTokenizer | None = None
    refused: tuple[AddedToken, ...] = ()
    if exists(folder) and not is_folder(folder):
        tokenizer, settings, refused = read_vocabulary(folder)
    else:
        settings = read_settings(folder)
        if exists(folder / JSON):
            tokenizer = JsonTokenizer.load(folder / JSON, settings)
        elif exists(folder / SENTENCEPIECE):
            tokenizer = Tokenizer.load(folder / SENTENCEPIECE)
    text = FolderText(folder=folder, rows=rows, tokenizer=tokenizer, settings=settings, refused=refused)
    if tokenizer is not None:
        count = max(tokenizer.vocab_size, 1 + max(settings.added, default=-1))
        if count > rows:
            raise InputError(
                f"{tokenizer.path}: the vocabulary and its added tokens need {count} rows, but the model has {rows}"
            )
    return text
