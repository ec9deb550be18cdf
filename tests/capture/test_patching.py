# SPDX-License-Identifier: Apache-2.0
"""An attribute that is replaced for a while."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from refmoe.engines.capture.patching import replaced


def test_the_original_is_back_afterwards_even_after_an_error() -> None:
    owner = SimpleNamespace(step="original")
    seen = []

    def run() -> None:
        seen.append(owner.step)
        raise RuntimeError("the engine fails")

    with pytest.raises(RuntimeError, match="engine"), replaced(owner, "step", "wrapped"):
        run()
    assert seen == ["wrapped"]
    assert owner.step == "original"


def test_an_attribute_that_is_not_there_is_an_error_and_not_added() -> None:
    owner = SimpleNamespace()
    with pytest.raises(AttributeError, match="step"), replaced(owner, "step", "wrapped"):
        pass
    assert not hasattr(owner, "step")
