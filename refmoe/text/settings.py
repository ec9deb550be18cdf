# SPDX-License-Identifier: Apache-2.0
"""The settings of text in a folder of Hugging Face's layout: added tokens, chat template, end tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refmoe.errors import InputError
from refmoe.files.json_file import JsonFile, read_json
from refmoe.files.reading import exists, read_text
from refmoe.files.sentences import quoted, shown

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that have names, which templates use."""
LISTED = ("additional_special_tokens", "extra_special_tokens")
"""Fields that list more special tokens."""
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
"""The settings of an added token, by their names in tokenizer_config.json."""
DEFAULT_END = 2
"""The end token of a config.json that names none: the default of transformers' MixtralConfig."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is added to a vocabulary: its text, and how it is found in a text."""

    content: str
    special: bool = False
    """Whether it has no text of its own in a reply."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    """The other settings of the file, by their names in the tokenizers library."""


@dataclass(frozen=True)
class TextSettings:
    """The settings of a folder; all are empty where it has no such files."""

    added: Mapping[int, AddedToken] = field(default_factory=dict)
    """By id, the tokens of tokenizer_config.json and added_tokens.json."""
    special: Mapping[str, str] = field(default_factory=dict)
    """The special tokens that have a name, such as ``bos_token``."""
    unnamed: tuple[str, ...] = ()
    """The other special tokens."""
    add_bos: bool | None = None
    """Whether a text begins with BOS; None: as the vocabulary says."""
    add_eos: bool | None = None
    template: str | None = None
    """The chat template."""
    template_file: Path | None = None
    """The file that holds it."""
    end: frozenset[int] | None = None
    """The tokens that end a reply; None: as the vocabulary says."""


def read_settings(folder: Path) -> TextSettings:
    """The settings of a folder. Raises InputError for a file that cannot be read, or a field of another type."""
    file = _optional(folder / "tokenizer_config.json")
    names = _optional(folder / "special_tokens_map.json")
    template, template_file = _template(folder, file)
    older = _optional(folder / "added_tokens.json")
    special = {name: token for source in (names, file) for name in NAMED if (token := _content(source, name))}
    unnamed = (*_listed(names), *_listed(file))
    return TextSettings(
        added=_added(file) | _older_added(older, _added(file), {*special.values(), *unnamed}),
        special=special,
        unnamed=unnamed,
        add_bos=_optional_flag(file, "add_bos_token"),
        add_eos=_optional_flag(file, "add_eos_token"),
        template=template,
        template_file=template_file,
        end=_end(folder),
    )


def _optional(path: Path) -> JsonFile:
    return read_json(path) if exists(path) else JsonFile(path)


def _optional_flag(file: JsonFile, name: str) -> bool | None:
    return None if file.values.get(name) is None else file.flag(name)


def _added(file: JsonFile) -> dict[int, AddedToken]:
    """The tokens of tokenizer_config.json."""
    if file.values.get("added_tokens_decoder") is None:
        return {}
    listed = file.within("added_tokens_decoder")
    return {_number(listed, key, key): _token(listed.within(key)) for key in listed.values}


def _older_added(file: JsonFile, known: Mapping[int, AddedToken], special: Set[str]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json, which has the id of each text. Those of tokenizer_config.json say more."""
    found = {_number(file, content, token): content for content, token in file.values.items()}
    for token, content in found.items():
        if token in known and known[token].content != content:
            other = quoted(known[token].content)
            raise InputError(
                f"{file.path}: {quoted(content)} is token {token}, but tokenizer_config.json says that this is {other}"
            )
    return {token: AddedToken(content, content in special) for token, content in found.items() if token not in known}


def _number(file: JsonFile, name: str, value: Any) -> int:
    """A token's id, which is written as an integer, or as the digits of one."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise file.refuse(name, value, "the id of a token was expected")
    return value


def _token(file: JsonFile) -> AddedToken:
    content = file.need("content")
    if not isinstance(content, str) or not content:
        raise file.refuse("content", content, "the text of a token was expected")
    flags = {name: file.flag(name) for name in FLAGS if name in file.values}
    return AddedToken(content, flags.pop("special", False), flags)


def _content(file: JsonFile, name: str) -> str | None:
    """The text of a special token, which is written as a string, or as an object with other settings."""
    value = file.values.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise file.refuse(name, value, "the text of a token was expected")
    return content


def _listed(file: JsonFile) -> Iterator[str]:
    """The texts of the special tokens that have no name."""
    for name in LISTED:
        values = file.values.get(name) or []
        if not isinstance(values, list | dict):
            raise file.refuse(name, values, "a list of tokens was expected")
        for value in values.values() if isinstance(values, dict) else values:
            content = value.get("content") if isinstance(value, dict) else value
            if not isinstance(content, str):
                raise file.refuse(name, values, "a list of tokens was expected")
            yield content


def _template(folder: Path, file: JsonFile) -> tuple[str | None, Path | None]:
    """The chat template and its file: chat_template.jinja, else the field of tokenizer_config.json."""
    alone = folder / "chat_template.jinja"
    if exists(alone):
        return read_text(alone, "a chat template"), alone
    value = file.values.get("chat_template")
    if isinstance(value, list):
        named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
        value = named.get("default")
        if value is None:
            raise file.refuse("chat_template", sorted(map(str, named)), "one with the name 'default' was expected")
    if value is not None and not isinstance(value, str):
        raise file.refuse("chat_template", value, "a chat template was expected")
    return value, None if value is None else file.path


def _end(folder: Path) -> frozenset[int] | None:
    """The end tokens of generation_config.json, else of config.json, else `DEFAULT_END`; None without a config.json."""
    for name in ("generation_config.json", "config.json"):
        file = _optional(folder / name)
        if "eos_token_id" in file.values:
            value = file.values["eos_token_id"]
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in listed):
                raise InputError(
                    f"{file.path}: 'eos_token_id' is {shown(value)}, but the id of a token, or a list, was expected"
                )
            return frozenset(listed)
    return frozenset({DEFAULT_END}) if exists(folder / "config.json") else None
