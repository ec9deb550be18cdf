# SPDX-License-Identifier: Apache-2.0
"""The vocabulary in the metadata of a GGUF file, obeyed as llama.cpp obeys it, or refused.

TEXT-6  A vocabulary of the model ``llama`` is one of SentencePiece: its pieces, scores and kinds are those of a
        tokenizer.model, and the clauses TOK-1 to TOK-8 hold.
TEXT-7  A vocabulary of the model ``gpt2`` is byte-level byte-pair encoding. `tokenizer.ggml.pre` names how a text is
        cut before that; only names in `CUTS` are obeyed.
TEXT-8  A prompt that holds the text of a control token or of an added token is refused: the file does not say whether
        it is that token, and llama.cpp has a setting for it.
TEXT-9  A vocabulary without any piece of text is none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refmoe.errors import InputError, require
from refmoe.files.foreign import foreign_parser
from refmoe.files.gguf_tensors import tokenizer_fields
from refmoe.files.json_file import JsonFile
from refmoe.files.sentences import one_line, quoted, shown
from refmoe.text.settings import AddedToken, TextSettings
from refmoe.text.tokenizer import Tokenizer, check_conventions
from refmoe.text.tokenizer_json import JsonTokenizer, of_backend

EXPECTED = "a vocabulary of a GGUF file"
PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The kinds of pieces. GGUF and SentencePiece number them alike."""
ENDS = ("bos_token_id", "eos_token_id")
DEFAULTS = {"llama": (1, 2), "gpt2": (11, 11)}
"""The models of vocabularies, each with the ids of `ENDS` where a file has none."""

LLAMA_3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CUTS = {"llama-bpe": LLAMA_3, "llama3": LLAMA_3, "llama-v3": LLAMA_3, "gpt-2": GPT_2}
"""The names of ways to cut a text, each with its pattern."""
WHOLE = ("llama-bpe", "llama3", "llama-v3")
"""The names under which a part that is a piece stays whole, whatever the merges are, and a text begins with BOS."""


def read_vocabulary(path: Path) -> tuple[Tokenizer | JsonTokenizer | None, TextSettings, tuple[AddedToken, ...]]:
    """The tokenizer of a GGUF file, its settings, and the tokens whose text no prompt may hold.

    Raises InputError when a package is not installed, or for a vocabulary that cannot be obeyed.
    """
    fields = tokenizer_fields(path)
    file = JsonFile(path, {name.removeprefix(PREFIX): value for name, value in fields.items()}, PREFIX)
    pieces, kinds = _listed(file, "tokens", str), _listed(file, "token_type", int)
    if not {NORMAL, USER_DEFINED} & {*kinds}:
        return None, TextSettings(), ()
    model = file.need("model")
    if model not in DEFAULTS:
        raise file.refuse("model", model, f"one of {', '.join(DEFAULTS)} was expected")
    if len(kinds) != len(pieces):
        raise file.refuse("token_type", f"{len(kinds)} kinds", f"one for each of {len(pieces)} tokens was expected")
    begin, end = (_token(file, name, default, len(pieces)) for name, default in zip(ENDS, DEFAULTS[model], strict=True))
    build = _sentencepiece if model == "llama" else _byte_level
    template = fields.get("tokenizer.chat_template")
    settings = TextSettings(
        special={"bos_token": pieces[begin], "eos_token": pieces[end]},
        template=template if isinstance(template, str) else None, template_file=path, end=frozenset({end}),
    )  # fmt: skip
    wanted = (USER_DEFINED,) if model == "llama" else (USER_DEFINED, CONTROL)
    refused = tuple(AddedToken(piece) for piece, kind in zip(pieces, kinds, strict=True) if kind in wanted)
    return build(file, pieces, kinds, begin, end), settings, refused


def _listed(file: JsonFile, name: str, type_: type) -> list[Any]:
    """A list of the metadata, empty where it is not there. Raises InputError for one of another type."""
    found = file.values.get(name, [])
    if not isinstance(found, list) or not all(type(each) is type_ for each in found):
        raise file.refuse(name, shown(found), f"a list of {type_.__name__} was expected")
    return found


def _token(file: JsonFile, name: str, default: int, count: int) -> int:
    found = file.values.get(name, default)
    if type(found) is not int or not 0 <= found < count:
        raise file.refuse(name, found, f"the id of one of {count} tokens was expected")
    return found


def _flag(file: JsonFile, name: str, default: bool) -> bool:
    return default if file.values.get(name) is None else file.flag(name)


# ---- SentencePiece


def _sentencepiece(file: JsonFile, pieces: list[str], kinds: list[int], begin: int, end: int) -> Tokenizer:
    """The vocabulary of a tokenizer.model. Raises InputError for settings by which the clauses do not hold."""
    for name, wanted in {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}.items():
        if _flag(file, name, wanted) is not wanted:
            raise file.refuse(name, not wanted, f"{str(wanted).lower()} was expected, as Mixtral's vocabulary has it")
    scores = _listed(file, "scores", float)
    if len(scores) != len(pieces):
        raise file.refuse("scores", f"{len(scores)} scores", f"one for each of {len(pieces)} tokens was expected")
    sentencepiece: Any = require("sentencepiece", "text", "the tokenizer")
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    try:
        processor = sentencepiece.SentencePieceProcessor(
            model_proto=model_of(zip(pieces, scores, kinds, strict=True), (unknown, begin, end))
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"{file.path}: sentencepiece does not take {EXPECTED}: {one_line(error)}") from None
    tokenizer = Tokenizer(file.path, processor)
    check_conventions(tokenizer)
    return tokenizer


def model_of(pieces: Iterable[tuple[str, float, int]], ids: tuple[int, int, int]) -> bytes:
    """A SentencePiece model of byte-pair encoding, as a protocol buffer.

    pieces: each with its score and its kind   ids: of <unk>, BOS and EOS
    `sentencepiece_model.proto` of google/sentencepiece numbers the fields.
    """
    made = [
        _message(1, _message(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for piece, score, kind in pieces
    ]
    byte_pairs, fallback, no_pad = _number(3, 2), _number(35, 1), _number(43, (1 << 64) - 1)
    numbers = b"".join(_number(40 + at, token) for at, token in enumerate(ids))
    rules = _message(1, b"identity") + _number(3, 1) + _number(4, 0) + _number(5, 1)  # a blank before, none removed
    return b"".join([*made, _message(2, byte_pairs + fallback + numbers + no_pad), _message(3, rules)])


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes([*made, number])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


# ---- byte-level byte-pair encoding


def _byte_level(file: JsonFile, pieces: list[str], kinds: list[int], begin: int, end: int) -> JsonTokenizer:
    """The vocabulary as the tokenizers library has it. Raises InputError for a way to cut that is not known."""
    name = file.values.get("pre")
    if not isinstance(name, str) or name not in CUTS:
        raise file.refuse("pre", name, f"one of {', '.join(CUTS)} was expected")
    if _flag(file, "add_eos_token", False):
        raise file.refuse("add_eos_token", True, "false was expected")
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        twice = next(piece for token, piece in enumerate(pieces) if vocabulary[piece] != token)
        raise InputError(f"{file.path}: the piece {quoted(twice)} is there twice, but {EXPECTED} was expected")
    merges = [_pair(file, merge) for merge in _listed(file, "merges", str)]
    library: Any = require("tokenizers", "text", "the vocabulary of a GGUF file")
    with foreign_parser(file.path, EXPECTED):
        model = library.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in WHOLE)
        backend = library.Tokenizer(model)
    backend.pre_tokenizer = library.pre_tokenizers.Sequence([
        library.pre_tokenizers.Split(library.Regex(CUTS[name]), behavior="isolated"),
        library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = library.decoders.ByteLevel()
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            backend.add_tokens([library.AddedToken(piece, special=special, normalized=False)])
    if _flag(file, "add_bos_token", name in WHOLE):
        backend.post_processor = library.processors.TemplateProcessing(
            single=[pieces[begin], "$A"], special_tokens=[(pieces[begin], begin)]
        )
    return of_backend(file.path, backend)


def _pair(file: JsonFile, merge: str) -> tuple[str, str]:
    """The two pieces of a merge. The first may begin with a blank."""
    at = merge.find(" ", 1)
    if at < 0:
        raise file.refuse("merges", merge, "two pieces with a blank between them were expected")
    return merge[:at], merge[at + 1 :]
