# SPDX-License-Identifier: Apache-2.0
"""Mixtral's chat template: a dialogue becomes the token ids that the Instruct models were trained on.

Source: `InstructTokenizerV1` and `InstructTokenizerV3` of mistralai/mistral-common, `tokens/tokenizers/instruct.py`.
It also merges neighbouring messages of one role and collects system messages from the middle. CHAT-1 refuses both,
because a specification should not guess.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from refmoe.errors import InputError
from refmoe.files.parsing import read_json_value
from refmoe.text.tokenizer import Tokenizer

BEGIN, END = "[INST]", "[/INST]"


class Message(NamedTuple):
    """One turn of a dialogue, checked."""

    role: str
    content: str


def check_messages(messages: object, source: str = "the dialogue") -> list[Message]:
    """The messages of a dialogue, checked.

    CHAT-1  A dialogue is at most one system message, then user and assistant messages in turn, from a first user
            message to a last user message. Nothing else is accepted, and nothing is repaired.

    source: a name for the input, such as the file's, with which the error's sentence begins.
    Raises InputError with the number of the first message that is wrong, counted from 1.
    """
    if not isinstance(messages, list | tuple) or not messages:
        found = "an empty list" if isinstance(messages, list | tuple) else f"a value of type {type(messages).__name__}"
        raise InputError(f"{source}: found {found}, but a list of messages was expected")
    checked = [check_message(message, f"{source}: message {n}") for n, message in enumerate(messages, start=1)]
    _, turns = split_system(checked)
    first = len(checked) - len(turns) + 1
    for n, turn in enumerate(turns, start=first):
        expected = "user" if (n - first) % 2 == 0 else "assistant"
        if turn.role != expected:
            raise InputError(f"{source}: message {n} has the role '{turn.role}', but '{expected}' was expected")
    if checked[-1].role != "user":
        raise InputError(
            f"{source}: the last message has the role '{checked[-1].role}', but the dialogue must end with 'user'"
        )
    return checked


def encode_chat(tokenizer: Tokenizer, messages: object) -> list[int]:
    """The prompt of a dialogue. messages: a list of {"role": …, "content": …}

    CHAT-2  The ids begin with one BOS, and EOS follows each assistant message.

    Raises InputError for a dialogue that CHAT-1 or CHAT-5 refuses, and for a vocabulary of a later template.
    """
    system, turns = split_system(check_messages(messages))
    brackets = control_brackets(tokenizer)
    if brackets is None:
        return encode_spelled_out(tokenizer, system, turns)
    return encode_with_control_tokens(tokenizer, system, turns, *brackets)


def encode_spelled_out(tokenizer: Tokenizer, system: str, turns: Sequence[Message]) -> list[int]:
    """The template of 8x7B Instruct, whose brackets are ordinary text.

    CHAT-3  A user message is the text "[INST] " + content + " [/INST]", encoded as one text, with its own leading
            space. An assistant message is encoded as it is. The system prompt stands before the first user message's
            content, with a blank line between.
    """
    ids = [tokenizer.bos_id]
    for position, turn in enumerate(turns):
        if turn.role == "user":
            content = with_system(system, turn.content) if position == 0 else turn.content
            ids += tokenizer.encode(f"{BEGIN} {content} {END}", bos=False)
        else:
            ids += [*tokenizer.encode(turn.content, bos=False), tokenizer.eos_id]
    return ids


def encode_with_control_tokens(
    tokenizer: Tokenizer, system: str, turns: Sequence[Message], begin: int, end: int
) -> list[int]:
    """The template of 8x22B Instruct, whose brackets are the control tokens `begin` and `end`.

    CHAT-4  A user message is `begin`, the encoded content and `end`. An assistant message is encoded without the spaces
            at its end. The system prompt stands before the *last* user message's content, with a blank line between.
    """
    ids = [tokenizer.bos_id]
    for position, turn in enumerate(turns):
        if turn.role == "user":
            content = with_system(system, turn.content) if position == len(turns) - 1 else turn.content
            ids += [begin, *tokenizer.encode(content, bos=False), end]
        else:
            ids += [*tokenizer.encode(turn.content.rstrip(" "), bos=False), tokenizer.eos_id]
    return ids


def with_system(system: str, content: str) -> str:
    """A user message's content after the system prompt, if there is one (CHAT-5)."""
    return f"{system}\n\n{content}" if system else content


def split_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """The system prompt, "" when there is none, and the turns."""
    if messages[0].role == "system":
        return messages[0].content, messages[1:]
    return "", messages


def check_message(message: object, source: str) -> Message:
    """One message, checked.

    CHAT-5  An empty system prompt counts as none. An empty user message is allowed, an empty assistant message is not.

    Raises InputError when the message is not exactly a role and a text, or is an empty assistant message.
    """
    if not isinstance(message, dict):
        raise InputError(
            f"{source} is of type {type(message).__name__}, but an object with 'role' and 'content' was expected"
        )
    if set(message) != {"role", "content"}:
        keys = ", ".join(map(repr, message)) or "none"
        raise InputError(f"{source} has the keys {keys}, but 'role' and 'content' were expected")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise InputError(f"{source} has the role {role!r}, but 'system', 'user' or 'assistant' was expected")
    if not isinstance(content, str):
        raise InputError(f"{source} has content of type {type(content).__name__}, but a text was expected")
    if any("\ud800" <= character <= "\udfff" for character in content):  # JSON can escape one alone
        raise InputError(f"{source} has a lone surrogate in its content, but Unicode text was expected")
    if role == "assistant" and not content:
        raise InputError(f"{source} is an empty assistant message, but a text was expected")
    return Message(role, content)


def control_brackets(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The ids of the control tokens '[INST]' and '[/INST]', or None where '[INST]' is ordinary text.

    CHAT-6  The template is CHAT-4's where '[INST]' is a control token of the vocabulary, and CHAT-3's where it is not.

    Raises InputError for the control tokens of a later template.
    """
    begin, end = tokenizer.control_id(BEGIN), tokenizer.control_id(END)
    if begin is None:
        return None
    if end is None or tokenizer.control_id("[SYSTEM_PROMPT]") is not None:
        raise InputError(
            f"{tokenizer.path}: the control tokens are not those of a Mixtral model, "
            f"but '{BEGIN}' and '{END}' without '[SYSTEM_PROMPT]' were expected"
        )
    return begin, end


def load_chat(path: str | PathLike[str]) -> list[dict[str, str]]:
    """The messages of a JSON file, as `encode_chat` takes them: a list of {"role": …, "content": …}.

    Raises InputError when the file cannot be read, is not JSON in UTF-8, or holds no such dialogue.
    """
    path = Path(path)
    messages = read_json_value(path, "a JSON file of messages")
    return [message._asdict() for message in check_messages(messages, str(path))]
