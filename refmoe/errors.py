"""The one exception for a user's mistake.

Everything that reads input from outside (a checkpoint, a trace, a case, an option) raises `InputError`
with one sentence that names the file, the field, what was found and what was expected. The command line
prints that sentence and exits with status 2; a program can catch it. Nothing else is reported this way:
a defect of refmoe itself is an ordinary exception with a traceback.
"""

from importlib import import_module
from types import ModuleType


class InputError(ValueError):
    """A user's input cannot be used; the message is one sentence, complete without a traceback."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    module: the module to import, e.g. ``"sentencepiece"``.
    extra: the extra of refmoe's own package that installs it, e.g. ``"text"``.
    purpose: what needs it, as the subject of the sentence, e.g. ``"the tokenizer"``.
    Raises InputError when the module is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise InputError(
            f"{purpose} needs the package '{error.name}', which is not installed: pip install 'refmoe[{extra}]'"
        ) from None
