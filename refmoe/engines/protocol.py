# SPDX-License-Identifier: Apache-2.0
"""The conformance protocol: its vocabulary, and its messages, one JSON object on one line. PROTOCOL.md specifies it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from refmoe.files.parsing import strict_json
from refmoe.files.sentences import one_line, quoted, shown
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS, READ_OUT_TAPS

PROTOCOL = "1"
"""The version of the protocol."""

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""The dtypes in which an engine can be asked to compute, the widest first."""

TAPS = ("embedding", *LAYER_TAPS, "final_norm", "logits")
"""Every tap of the model without its layer, in order of computation."""
assert set(TAPS) == {*LAYER_TAPS, *MODEL_TAPS}
EVERY_TAP = (*TAPS, *READ_OUT_TAPS)
"""All that an engine may give: the taps, and what it reads out of the logits."""

UNREAD = "unread"
ABILITIES = ("chunk", "decode", "sequences", UNREAD)
"""chunk: several tokens on top of a cache. decode: one token on top of a cache. sequences: more than one sequence, each
with a cache of its own. unread: a call whose outputs nobody reads, of which nothing is written."""

LAYOUTS = ("hf", "mistral")
"""The layouts of a checkpoint on disk."""

LONGEST_NAME = 200
"""Characters in a name: of an engine, a version, a policy."""
LONGEST_SENTENCE = 2000
"""Characters in a reason or an error."""

Message = dict[str, Any]


class MessageError(ValueError):
    """A message breaks the protocol; its text is one sentence."""


def parse(line: str | bytes) -> Message:
    """The JSON object on a line. Raises MessageError."""
    try:
        decoded = line.decode() if isinstance(line, bytes) else line
        message = strict_json(decoded)
    except ValueError as error:
        start = line[:60].decode(errors="replace") if isinstance(line, bytes) else line[:60]
        raise MessageError(f"{quoted(start.strip())} is not a line of JSON: {one_line(error)}") from None
    if not isinstance(message, dict):
        raise MessageError(f"{shown(message)} was found, but a JSON object was expected")
    return message


def encode(message: Mapping[str, Any]) -> bytes:
    """The line of a message."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def expect_fields(message: Message, needed: Collection[str], possible: Collection[str] = ()) -> None:
    """Raises MessageError where a field is missing or unknown."""
    for name in needed:
        if name not in message:
            raise MessageError(f"the field {quoted(name)} is missing")
    for name in message:
        if name not in needed and name not in possible:
            raise MessageError(f"the field {quoted(name)} is unknown; {', '.join([*needed, *possible])} were expected")


def wrong_field(name: str, found: Any, expected: str) -> MessageError:
    """The error for a field's value."""
    return MessageError(f"the field {quoted(name)} is {shown(found)}, but {expected} was expected")


def text_field(message: Message, name: str, longest: int = LONGEST_SENTENCE) -> str:
    """A field that is one line of text, not empty. Raises MessageError."""
    found = message[name]
    if not isinstance(found, str) or not found.strip() or not found.isprintable() or len(found) > longest:
        raise wrong_field(name, found, f"1 to {longest} printable characters")
    return found


def names_field(message: Message, name: str, known: Collection[str]) -> tuple[str, ...]:
    """A field that is a list of different known names. Raises MessageError."""
    found = message[name]
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise wrong_field(name, found, "a list of names")
    for item in found:
        if item not in known:
            raise wrong_field(name, found, f"a list of some of {', '.join(known)}")
    if len(set(found)) < len(found):
        raise wrong_field(name, found, "each name once")
    return tuple(found)
