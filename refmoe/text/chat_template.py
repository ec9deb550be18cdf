# SPDX-License-Identifier: Apache-2.0
"""A chat template in Jinja, as checkpoints carry it: a dialogue becomes a text.

Templates are code of a stranger, so they run in Jinja's sandbox, on plain data, and reach no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.errors import InputError, require
from refmoe.files.sentences import one_line
from refmoe.text.chat import Message

OF_THE_DAY = "strftime_now"
"""The function of transformers that gives today's date."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may use."""

    path: Path
    """The file that holds it."""
    source: str
    special: Mapping[str, str]

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a dialogue, which ends where the reply begins.

        The environment is that of `apply_chat_template` of transformers, without tools and documents.
        Raises InputError when Jinja is not installed, for a template that refuses the dialogue or is no template, and
        for one that asks for the day: the same dialogue would give another text tomorrow.
        """
        jinja2: Any = require("jinja2", "text", "a chat template")
        sandbox: Any = require("jinja2.sandbox", "text", "a chat template")
        meta: Any = require("jinja2.meta", "text", "a chat template")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        try:
            if OF_THE_DAY in meta.find_undeclared_variables(environment.parse(self.source)):
                raise InputError(f"{self.path}: the chat template depends on the day, but the same text was expected")
            dialogue = [message._asdict() for message in messages]
            return str(
                environment.from_string(self.source).render(
                    messages=dialogue, tools=None, documents=None, add_generation_prompt=True, **self.special
                )
            )
        except InputError:
            raise
        except Refusal as error:
            raise InputError(f"{self.path}: the chat template refuses the dialogue: {one_line(error)}") from None
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {one_line(error.message)}"
            raise InputError(f"{self.path}: the chat template cannot be read: {reason}") from None
        except Exception as error:  # whatever the template does wrong, such as adding a text to a number
            reason = one_line(error) or type(error).__name__
            raise InputError(f"{self.path}: the chat template fails on this dialogue: {reason}") from None


class Refusal(Exception):
    """Raised by a template, in its own words."""


def _refuse(message: object) -> None:
    """The function `raise_exception` of templates."""
    raise Refusal(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **how: Any) -> str:
    """A value as JSON, as transformers writes it; Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **how)
