# SPDX-License-Identifier: Apache-2.0
"""Mixtral's tokenizer: byte-pair encoding over a SentencePiece `tokenizer.model`.

The `sentencepiece` package does the merging. This module states promises about its result, and refuses a file that
would break them. A small vocabulary is accepted, as only the conventions matter.

The clauses TOK-1 to TOK-5 are stated at `Tokenizer.encode`, TOK-6 to TOK-8 at `Tokenizer.decode`.

Kudo and Richardson 2018 (SentencePiece); Sennrich, Haddow and Birch 2016 (byte-pair encoding).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

from refmoe.errors import InputError, require
from refmoe.files.foreign import by_name
from refmoe.files.reading import read_bytes

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
UNKNOWN_TEXT = " \N{DOUBLE QUESTION MARK} "


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and its merge order, read from one file. Build it with `Tokenizer.load`."""

    path: Path
    processor: Any  # sentencepiece.SentencePieceProcessor: imported only where it is needed

    @staticmethod
    def load(path: str | PathLike[str]) -> "Tokenizer":
        """Read a SentencePiece model.

        Raises InputError when sentencepiece is not installed, or the file cannot be read or is no SentencePiece model.
        Raises it also when the model's conventions are not Mixtral's (see `check_conventions`).
        """
        sentencepiece = require("sentencepiece", "text", "the tokenizer")
        path = Path(path)
        content = read_bytes(path, "a SentencePiece file (tokenizer.model)")
        if not content:  # sentencepiece 0.2.0 takes empty bytes for "no model given" and silently loads nothing
            raise InputError(f"{path}: the file is empty, but a SentencePiece model was expected")
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError, ValueError):  # the error's text names a C++ line, which helps no user
            raise InputError(
                f"{path}: {len(content)} bytes that sentencepiece cannot load, but a complete SentencePiece model "
                f"(tokenizer.model) was expected{by_name(path)}"
            ) from None
        tokenizer = Tokenizer(path, processor)
        check_conventions(tokenizer)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of ids: 32000 for Mixtral 8x7B, 32768 for 8x22B Instruct."""
        return int(self.processor.vocab_size())

    @property
    def bos_id(self) -> int:
        """The id of the token that begins a text, `<s>`."""
        return int(self.processor.bos_id())

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a reply, `</s>`."""
        return int(self.processor.eos_id())

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The token ids of a text, after BOS unless `bos` is false.

        TOK-1  One space is put before a text that is not empty, and every space is written as the character '▁'
               (U+2581). The empty text has no tokens.
        TOK-2  The adjacent pair of symbols whose merged piece has the highest score is merged first, the leftmost
               on ties. Merging ends when no adjacent pair forms a piece. (The rule is not: the longest piece first.)
        TOK-3  A character that is no piece becomes its UTF-8 bytes, one token `<0xHH>` each; text never yields `<unk>`.
        TOK-4  Control tokens are never produced from text. In a text, '<s>', '</s>' and '[INST]' are spelled out in
               ordinary pieces. They do not split the text around them.
        TOK-5  BOS stands before the text exactly once when it is asked for, whatever the text says.

        Two texts encoded apart do not give the tokens of their concatenation: pieces form across the seam, and the
        second part gets a leading space of its own.
        Raises InputError when `text` holds a lone surrogate, which UTF-8 cannot express.
        """
        need_unicode(text)
        ids = [int(token) for token in self.processor.encode(text)]
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        TOK-6  The pieces are joined, with '▁' as a space. The space that TOK-1 added is dropped: one leading '▁' of the
               first token that is no control token. A byte token or `<unk>` in that place has none to drop.
        TOK-7  Control tokens (BOS and EOS among them) have no text, and `<unk>` reads ' ⁇ ' (space, U+2047, space).
        TOK-8  A run of byte tokens is read as UTF-8, and each byte that is part of no valid sequence as one U+FFFD. Any
               other token ends the run, also a control token.

        Raises InputError for an id outside the vocabulary.
        `SentencePieceProcessor::Decode` of google/sentencepiece 0.2.
        """
        return str(self.processor.decode([self.checked(token) for token in ids]))

    def piece(self, token: int) -> str:
        """The piece as the vocabulary writes it: '▁the', '<0x0A>', '<s>'. Raises InputError outside the vocabulary."""
        return str(self.processor.id_to_piece(self.checked(token)))

    def is_control(self, token: int) -> bool:
        """Whether the token is a control token (TOK-4, TOK-7). Raises InputError outside the vocabulary."""
        return bool(self.processor.is_control(self.checked(token)))

    def is_byte(self, token: int) -> bool:
        """Whether the token is one of the 256 byte tokens (TOK-3). Raises InputError outside the vocabulary."""
        return bool(self.processor.is_byte(self.checked(token)))

    def is_unknown(self, token: int) -> bool:
        """Whether the token is `<unk>` (TOK-7). Raises InputError outside the vocabulary."""
        return bool(self.processor.is_unknown(self.checked(token)))

    def control_id(self, piece: str) -> int | None:
        """The id of the control token written `piece`, or None where the vocabulary has no such control token."""
        token = int(self.processor.piece_to_id(piece))  # the id of <unk> for a string that is no piece
        return token if self.is_control(token) else None

    def checked(self, token: int) -> int:
        """`token` as an int. Raises InputError when the vocabulary has no such id."""
        number = index(token)
        if not 0 <= number < self.vocab_size:
            raise InputError(
                f"token id {number} is outside the vocabulary of {self.path}: 0 to {self.vocab_size - 1} was expected"
            )
        return number


def need_unicode(text: str) -> None:
    """Raises InputError when a text holds a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has the lone surrogate U+{ord(text[error.start]):04X} at index {error.start}, "
            "but Unicode text was expected"
        ) from None


def check_conventions(tokenizer: Tokenizer) -> None:
    """Refuse a SentencePiece model that would break TOK-1 to TOK-8.

    The trainer's settings come last in the file, so a file cut short between two pieces loads without complaint and
    tokenizes differently. The checks therefore test the processor's behaviour, not the settings that it reports.
    Raises InputError.
    """
    path, processor = tokenizer.path, tokenizer.processor
    for name, token in (("BOS", processor.bos_id()), ("EOS", processor.eos_id()), ("<unk>", processor.unk_id())):
        if token < 0:
            raise InputError(f"{path}: the vocabulary has no {name} token, but Mixtral's has one")
    byte_tokens = [token for token in range(tokenizer.vocab_size) if processor.is_byte(token)]
    if len(byte_tokens) != 256:  # sentencepiece itself refuses byte tokens when the setting byte_fallback is off
        raise InputError(f"{path}: the vocabulary has {len(byte_tokens)} byte tokens, but 256 were expected")
    space = processor.piece_to_id(SPACE)
    if space == processor.unk_id():
        raise InputError(f"{path}: the vocabulary has no piece '{SPACE}', but Mixtral's has one")
    two_spaces = processor.decode([space, space])
    if two_spaces != " ":  # "" where all leading spaces go, "  " where none does
        raise InputError(f"{path}: decodes two space pieces as {two_spaces!r}, but ' ' was expected (one dropped)")
    unknown = processor.decode([processor.unk_id()])
    if unknown != UNKNOWN_TEXT:
        raise InputError(f"{path}: decodes <unk> as {unknown!r}, but {UNKNOWN_TEXT!r} was expected")
