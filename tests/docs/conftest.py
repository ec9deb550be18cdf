# SPDX-License-Identifier: Apache-2.0
"""The site, built once for all tests of the documents."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.docs.site import build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the site, and what its build complained of."""
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("furo") is None:
        pytest.skip("Sphinx is not installed: extra 'docs'")
    base = tmp_path_factory.getbasetemp()
    return build(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
