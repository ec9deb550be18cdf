# SPDX-License-Identifier: Apache-2.0
"""Cases with quantised weights: the checkpoint that an engine loads, the weights that it holds, and a policy for it.

The golden case gives config, tokens and calls. Its weights are quantised, and what the file defines is the model: the
engine is held against exact arithmetic on these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from refmoe.checkpoints.ggml_quantise import KINDS
from refmoe.checkpoints.gguf_file import write_gguf_model
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.quantise import NAMES, write_quantised
from refmoe.engines.adapters.llama_cpp_library import ROUNDED
from refmoe.errors import InputError
from refmoe.files.scratch import Scratch
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case

PREFIX = "gguf:"
FORMS = (*(PREFIX + kind for kind in KINDS), *NAMES)
"""How weights can be quantised: as a GGUF file in a type or mixture, or as a folder of Hugging Face."""


@dataclass(frozen=True)
class Quantised:
    """A way to quantise the weights of cases."""

    form: str
    """One of `FORMS`."""

    @property
    def kind(self) -> str | None:
        """The type of a GGUF file; None for a folder."""
        return self.form.removeprefix(PREFIX) if self.form.startswith(PREFIX) else None

    def write(self, case: Case, folder: Path) -> Path:
        """Write the checkpoint of a case in a folder. Returns what the engine loads: a GGUF file, or the folder.

        Raises InputError for a case that no such checkpoint holds, and where a package is missing.
        """
        parameters = case.checkpoint().parameters
        if self.kind is None:
            try:
                write_quantised(folder, case.config, parameters, self.form, "bfloat16")
            except InputError:  # a value that bfloat16 cannot hold, or else the same error again
                write_quantised(folder, case.config, parameters, self.form, "float32")
            return folder
        if case.config.window is not None:
            raise InputError("the case has a window, for which GGUF has no field in a Mixtral")
        return write_gguf_model(folder, case.config, parameters, self.kind)

    @contextmanager
    def weights(self, case: Case) -> Iterator[Parameters]:
        """The weights that the checkpoint of a case defines, from a file that no engine is told of."""
        with Scratch("weights") as scratch:
            yield load_checkpoint(self.write(case, scratch.path)).parameters

    def policy(self, declared: str, dtype: str) -> Policy:
        """The policy by which an engine is judged that declares this one for a dtype.

        Raises InputError for a policy that says nothing about codes. Some engines make codes of inputs and others do
        not, so that a guess would accuse a healthy one.
        """
        if not named_policy(declared).codes:
            raise InputError(
                f"weights as {self.form}: the policy {declared} does not say whether the engine makes codes of inputs; "
                f"--policy NAME was expected: {declared} if it makes none, or a policy with codes of {dtype} values"
            )
        return named_policy(declared if self.kind is None else f"{declared}{ROUNDED}")
