# SPDX-License-Identifier: Apache-2.0
"""The type of the fixture that runs a command, for the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable

Refmoe = Callable[..., tuple[int, str, str]]
"""The fixture `refmoe`: runs a command and gives its status, standard output and standard error."""
