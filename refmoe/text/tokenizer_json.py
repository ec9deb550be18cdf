# SPDX-License-Identifier: Apache-2.0
"""A vocabulary in Hugging Face's `tokenizer.json`, by the `tokenizers` library.

The file says how a text is split, and how tokens are written. It also says which tokens are added, and what stands
before a text. So the clauses of `Tokenizer` do not hold here: a control token in a text is found if the file says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.errors import InputError, require
from refmoe.files.foreign import foreign_parser
from refmoe.files.parsing import strict_json
from refmoe.files.reading import read_text
from refmoe.files.sentences import quoted
from refmoe.text.settings import TextSettings
from refmoe.text.tokenizer import need_unicode

EXPECTED = "a vocabulary of the tokenizers library (tokenizer.json)"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
GROWING = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
"""Decoders under which the text of more tokens begins with that of fewer, but for bytes of an unfinished character."""


@dataclass(frozen=True)
class JsonTokenizer:
    """A vocabulary and all its rules, read from one file and the settings beside it. Build it with `load`."""

    path: Path
    backend: Any  # tokenizers.Tokenizer
    vocab_size: int
    """One more than the largest id."""
    decoders: tuple[str, ...]
    """The types of its decoders, in their order."""
    silent: frozenset[int]
    """The special tokens, which have no text."""
    contradiction: str | None
    """The refusal of a text where tokenizer_config.json says otherwise about BOS and EOS; None where the files agree.

    Engines follow the one file or the other.
    """

    @staticmethod
    def load(path: Path, settings: TextSettings) -> JsonTokenizer:
        """Read a tokenizer.json. settings: those of the folder, as transformers applies them

        Raises InputError when tokenizers is not installed, the file cannot be read, or the settings contradict it.
        """
        tokenizers: Any = require("tokenizers", "text", "tokenizer.json")
        text = read_text(path, EXPECTED)
        with foreign_parser(path, EXPECTED):
            backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        _add(tokenizers, backend, settings, path)
        return of_backend(path, backend, _contradiction(backend, settings, path))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The token ids of a text.   bos: whether to add what the file puts around a text, such as BOS

        Raises InputError when `text` holds a lone surrogate, or another file says otherwise about BOS and EOS.
        """
        need_unicode(text)
        if bos and self.contradiction is not None:
            raise InputError(self.contradiction)
        return [int(token) for token in self.backend.encode(text, add_special_tokens=bos).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Special tokens, and ids without a token, have none."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def piece(self, token: int) -> str | None:
        """The piece of a token that has text; None for a special token, and for an id without a token."""
        return None if token in self.silent else self.backend.id_to_token(token)


def of_backend(path: Path, backend: Any, contradiction: str | None = None) -> JsonTokenizer:
    """A tokenizer of the tokenizers library.   contradiction: as `JsonTokenizer` has it

    Raises InputError for one without tokens.
    """
    ids = backend.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise InputError(f"{path}: holds no token, but {EXPECTED} was expected")
    silent = frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)
    return JsonTokenizer(
        path=path, backend=backend, vocab_size=max(ids) + 1, decoders=_decoders(backend), silent=silent,
        contradiction=contradiction,
    )  # fmt: skip


def _add(tokenizers: Any, backend: Any, settings: TextSettings, path: Path) -> None:
    """Add to `backend` the tokens of the settings that the file does not have, and mark the special ones.

    Raises InputError where a token would have another id than its own, or the file has another token under that id.
    """
    for token, added in sorted(settings.added.items()):
        found = backend.id_to_token(token)
        if found != added.content:
            backend.add_tokens([tokenizers.AddedToken(added.content, special=added.special, **added.flags)])
        if backend.token_to_id(added.content) != token or found not in (None, added.content):
            has = f"token {token} is {'missing' if found is None else quoted(found)}"
            raise InputError(
                f"{path}: {has}, but tokenizer_config.json or added_tokens.json says that it is {quoted(added.content)}"
            )
    known = {added.content: added for added in backend.get_added_tokens_decoder().values()}
    for content in (*settings.special.values(), *settings.unnamed):
        if backend.token_to_id(content) is not None:
            plain = tokenizers.AddedToken(content, special=True, normalized=False)
            backend.add_special_tokens([known.get(content, plain)])


def _contradiction(backend: Any, settings: TextSettings, path: Path) -> str | None:
    """The sentence for a tokenizer_config.json that says otherwise about BOS and EOS; None where the files agree."""
    around = backend.encode("", add_special_tokens=True).tokens
    for name, wanted in {"bos_token": settings.add_bos, "eos_token": settings.add_eos}.items():
        piece = settings.special.get(name)
        if wanted is not None and wanted != (piece in around):
            says = "adds none" if wanted else f"adds {quoted(str(piece))}"
            return (
                f"{path}: {says} to a text, but tokenizer_config.json says that 'add_{name}' is {str(wanted).lower()}"
            )
    return None


def _decoders(backend: Any) -> tuple[str, ...]:
    """The types of the decoders, in their order."""
    if backend.decoder is None:
        return ()
    state: Any = strict_json(backend.decoder.__getstate__())
    return tuple(str(each["type"]) for each in (state["decoders"] if state["type"] == "Sequence" else [state]))


class JsonStream:
    """The text of a growing list of token ids: `feed` them one by one, and call `finish` after the last.

    The pieces returned, joined, are `JsonTokenizer.decode` of all ids fed. The bytes of an unfinished character wait.
    Where bytes are tokens, all of a run wait: one wrong byte makes the library replace them all. Under a decoder that
    may change earlier text, all text waits.
    """

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.written = ""
        self.in_bytes = False

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        self.ids.append(token)
        decoders, piece = self.tokenizer.decoders, self.tokenizer.piece(token)
        if "ByteFallback" in decoders and piece is not None:
            self.in_bytes = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        if self.in_bytes or not set(decoders) <= GROWING:
            return ""
        return self._new(self.tokenizer.decode(self.ids).rstrip(REPLACEMENT))

    def finish(self) -> str:
        """The text still waiting."""
        return self._new(self.tokenizer.decode(self.ids))

    def _new(self, text: str) -> str:
        new = text[len(self.written) :]
        self.written += new
        return new
