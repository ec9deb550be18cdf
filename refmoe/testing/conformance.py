# SPDX-License-Identifier: Apache-2.0
"""The assertion for tests of engines: that an engine's values are conformant."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from refmoe.api.arguments import Tokens
from refmoe.api.judging import verify
from refmoe.api.models import GoldenCase, Model
from refmoe.profiles.policy import Policy
from refmoe.traces.trace import Trace

__all__ = ["assert_conformant"]


def assert_conformant(
    values: Mapping[Any, Any] | Trace | str | os.PathLike[str],
    model: Model | GoldenCase | str | os.PathLike[str],
    tokens: Tokens | None = None,
    *,
    decode: Tokens | None = None,
    chunks: Sequence[Any] = (),
    policy: Policy | str | None = None,
    diagnose: bool = True,
) -> None:
    """Raise AssertionError, with the whole report, unless the values are conformant.

    The arguments are those of `refmoe.verify`. A verdict of *cannot judge* raises as well.
    Raises InputError when values, tokens and model do not fit each other.

    >>> import refmoe
    >>> model = refmoe.load("walking-skeleton")
    >>> wrong = {"logits": model.run([1, 31])["prefill", "logits"] + 1}
    >>> try:
    ...     refmoe.testing.assert_conformant(wrong, model, [1, 31], policy="float32", diagnose=False)
    ... except AssertionError as error:
    ...     print(str(error).splitlines()[0])
    NOT CONFORMANT
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    report = verify(values, model, tokens, decode=decode, chunks=chunks, policy=policy, diagnose=diagnose)
    if not report:
        raise AssertionError(str(report))
