# SPDX-License-Identifier: Apache-2.0
"""Decode token ids to text as they arrive, with the text that decoding all of them at once would give.

`Tokenizer.decode` asks sentencepiece. This module implements the rules TOK-6 to TOK-8 itself, so that a test of
STREAM-1 compares two implementations.
"""

from codecs import utf_8_decode
from collections.abc import Iterable, Iterator

from refmoe.text.tokenizer import SPACE, UNKNOWN_TEXT, Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of token ids: `feed` them one by one, and call `finish` after the last.

    STREAM-1  The pieces of text returned, joined, are `Tokenizer.decode` of all ids fed.
    STREAM-2  A character whose bytes are spread over several byte tokens is returned whole, with its last byte.
    STREAM-3  Only the bytes of an unfinished UTF-8 sequence wait, at most three. Text before them is never held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.at_start = True  # only control tokens so far, so the next leading space is the one that TOK-1 added
        self.unfinished = b""  # the beginning of a UTF-8 sequence

    def feed(self, token: int) -> str:
        """The text that this token completes: "" for a control token or the first bytes of a character.

        Raises InputError for an id outside the vocabulary; the stream is then as before.
        """
        if self.tokenizer.is_byte(token):
            self.at_start = False
            byte = int(self.tokenizer.piece(token)[1:-1], 16)  # '<0x0A>'
            text, self.unfinished = decode_utf8(self.unfinished + bytes([byte]), final=False)
            return text
        return self.finish() + self.text_of(token)

    def finish(self) -> str:
        """The bytes still waiting, each as U+FFFD: no token will complete them. More tokens may be fed afterwards."""
        text, self.unfinished = decode_utf8(self.unfinished, final=True)
        return text

    def text_of(self, token: int) -> str:
        """The text of a token that is no byte token, at the current place of the stream (TOK-6, TOK-7)."""
        if self.tokenizer.is_control(token):
            return ""
        at_start, self.at_start = self.at_start, False
        if self.tokenizer.is_unknown(token):
            return UNKNOWN_TEXT
        piece = self.tokenizer.piece(token)
        return (piece.removeprefix(SPACE) if at_start else piece).replace(SPACE, " ")


def decode_utf8(data: bytes, final: bool) -> tuple[str, bytes]:
    """The text of UTF-8 bytes, and the bytes at the end that further bytes could still complete to a character.

    By TOK-8, each byte that is part of no valid sequence gives one U+FFFD. Python's errors="replace" gives one for a
    whole truncated sequence, so it cannot be used. When `final`, no bytes are kept back. Python also keeps back the two
    bytes that begin an encoded surrogate (ED A0 to ED BF). No byte completes them, so they turn to U+FFFD one byte
    later.
    """
    text = ""
    while True:
        try:
            valid, used = utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + REPLACEMENT
            data = data[error.start + 1 :]
        else:
            return text + valid, data[used:]


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of token ids as they arrive, in pieces that are never empty (STREAM-1).

    Raises InputError for an id outside the vocabulary.
    """
    stream = TextStream(tokenizer)
    for token in tokens:
        if text := stream.feed(token):
            yield text
    if text := stream.finish():
        yield text
