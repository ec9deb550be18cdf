# SPDX-License-Identifier: Apache-2.0
"""The one exception for a user's mistake.

All code that reads a checkpoint, a trace, a case or an option raises `InputError` when the input cannot be used. Its
message is one sentence that names the file, the field, the value found and the value expected. The command line prints
the sentence and exits with status 2; a program can catch the exception.
A defect of refmoe itself is never reported this way: it is an ordinary exception with a traceback.
"""

from importlib import import_module
from types import ModuleType


class InputError(ValueError):
    """The error for input that cannot be used. Its message is one sentence, complete without a traceback.

    >>> import refmoe
    >>> try:
    ...     refmoe.load("walking-skeleton").run([200])
    ... except refmoe.InputError as error:
    ...     print(error)
    script: token 200 is outside the vocabulary of 97
    """


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    module: the module to import, such as ``"sentencepiece"``.
    extra: the extra of refmoe that installs it, such as ``"text"``.
    purpose: the feature that needs it, as the subject of the error's sentence, such as ``"the tokenizer"``.
    Raises InputError that names the extra when the module is not installed.
    """
    return imported(module, purpose, f"pip install 'refmoe[{extra}]'")


def imported(module: str, purpose: str, remedy: str) -> ModuleType:
    """Import a module.   purpose: as for `require`   remedy: the end of the sentence, what installs the module

    Raises InputError when the module is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise InputError(f"{purpose} needs the package '{error.name}', which is not installed: {remedy}") from None
