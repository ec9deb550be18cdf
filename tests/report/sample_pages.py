# SPDX-License-Identifier: Apache-2.0
"""The HTML page of every sample, made once."""

from __future__ import annotations

from functools import cache

from refmoe.report.html import to_html
from tests.report.sample_reports import SAMPLES


@cache
def all_pages() -> dict[str, str]:
    """Name of a sample to its page."""
    return {name: to_html(make()) for name, make in SAMPLES.items()}
