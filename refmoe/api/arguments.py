# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, at the moment that they are passed: paths, token ids, numbers."""

from __future__ import annotations

import errno
import math
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refmoe.errors import InputError
from refmoe.files.sentences import one_line, quoted
from refmoe.files.writable import refuse_output
from refmoe.traces.script import AnyCall, Call

Tokens = Sequence[int] | Sequence[Sequence[int]]
"""The token ids of one sequence, or of several. Integer arrays of NumPy, PyTorch and JAX serve as well."""

LEAST_SIGNIFICANCE = 1e-100
"""Below it every threshold goes to infinity."""


def path_of(value: object, name: str) -> Path:
    """A path that the system can look up. Raises InputError for a wrong type, an empty or an impossible name."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name}: is {kind(value)}, but a path was expected, a str or a Path")
    text = os.fspath(value)
    if not isinstance(text, str) or not text:
        raise InputError(f"{name}: is {shown(text)}, but the name of a file or folder was expected")
    try:
        os.stat(text)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise InputError(f"{name}: {quoted(text)} cannot be used as a path: {error.strerror}") from None
        # later messages have the name as it is; Python stands for a byte that is no text by a lone surrogate
        if not re.sub("[\udc80-\udcff]", "", text).isprintable():
            raise InputError(f"{name}: {quoted(text)} has control characters, but a path was expected") from None
    except ValueError as error:  # a null character, or letters that the file system cannot encode
        raise InputError(f"{name}: {quoted(text)} cannot be used as a path: {one_line(error)}") from None
    return Path(text)


def writable_file(value: object, name: str) -> Path:
    """The path of a file to write. Raises InputError when it cannot be one."""
    path = path_of(value, name)
    refuse_output(path)
    return path


def name_of(value: object, name: str, expected: str) -> str:
    """A text. Raises InputError for another type.   expected: in words, for the message"""
    if not isinstance(value, str):
        raise InputError(f"{name}: is {kind(value)}, but {expected} was expected")
    return value


def whole_number(value: object, name: str) -> int:
    """An integer from 0. Raises InputError for all else, True and 1.0 included."""
    if not _is_integer(value) or operator.index(value) < 0:  # type: ignore[arg-type]
        raise InputError(f"{name} is {shown(value)}, but an integer from 0 was expected")
    return operator.index(value)  # type: ignore[arg-type]


def probability(value: object) -> float:
    """A significance. Raises InputError when it is no number from `LEAST_SIGNIFICANCE` to below 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not LEAST_SIGNIFICANCE <= value < 1:  # type: ignore[arg-type, operator]
        raise InputError(
            f"significance is {shown(value)}, but a probability from {LEAST_SIGNIFICANCE:g} to below 1 was expected"
        )
    return float(value)  # type: ignore[arg-type]


def calls_of(tokens: Tokens, decode: Tokens | None, chunks: Sequence[Any]) -> list[AnyCall]:
    """The script of `Model.run`. Raises InputError when the arguments do not fit each other.

    With several sequences, `chunks` and `decode` have an entry for each. The vocabulary is checked by `plan`.
    """
    given = plain_list(tokens, "tokens")
    several = bool(given) and _is_list(given[0])
    pieces, last = plain_list(chunks, "chunks"), [] if decode is None else plain_list(decode, "decode")
    if not several:
        given, pieces, last = [given], [pieces], [last]
    count = len(given)
    for name, entries in (("chunks", pieces), ("decode", last)):
        if len(entries) not in (0, count):
            raise InputError(
                f"{name}: has {len(entries)} entries, but one for each of the {count} sequences was expected"
            )
    pieces, last = pieces or [[]] * count, last or [[]] * count
    where = [f" of sequence {i}" if several else "" for i in range(count)]
    calls: list[AnyCall] = [Call("prefill", i, token_ids(each, f"tokens{where[i]}")) for i, each in enumerate(given)]
    for i in range(count):
        listed = plain_list(pieces[i], f"chunks{where[i]}")
        calls += [Call("chunk", i, token_ids(piece, f"chunk {n}{where[i]}")) for n, piece in enumerate(listed, 1)]
    for i in range(count):
        ids = token_ids(last[i], f"decode{where[i]}")
        calls += [Call("decode", i, ids)] if ids else []
    return calls


def token_ids(tokens: object, name: str) -> tuple[int, ...]:
    """Token ids as integers. Raises InputError for anything else; the vocabulary is checked by `plan`."""
    listed = plain_list(tokens, name)
    for each in listed:
        if not _is_integer(each):
            raise InputError(f"{name}: has {shown(each)} in it, but token ids, integers, were expected")
    return tuple(operator.index(each) for each in listed)


def plain_list(values: object, name: str) -> list[Any]:
    """A sequence or an array as a list. Raises InputError for a text, a number, a mapping and the like."""
    if not isinstance(values, list | tuple | range) and hasattr(values, "tolist"):
        try:
            values = values.tolist()
        except Exception as error:  # the error of any array library, such as one for a tensor without storage
            raise InputError(f"{name}: cannot be read as a list: {one_line(error)}") from None
    if not _is_list(values):
        raise InputError(f"{name}: is {kind(values)}, but a list of token ids was expected")
    return list(values)  # type: ignore[call-overload, no-any-return]


def _is_list(value: object) -> bool:
    if isinstance(value, str | bytes | bytearray | memoryview):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0)


def _is_integer(value: object) -> bool:
    """Whether this is an integer and no truth value: of Python, NumPy, or a tensor with one element."""
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "i") not in "iu":
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except Exception:  # TypeError, or that of an array library
        return False
    return True


def kind(value: object) -> str:
    """The type of a value in words, for messages."""
    return "None" if value is None else type(value).__name__


def shown(value: object) -> str:
    """A value in a message: short, on one line."""
    try:
        text = repr(value)
    except Exception:
        text = kind(value)
    text = one_line(text)
    return text if len(text) <= 80 else f"{text[:60]}..."
