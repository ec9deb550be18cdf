# SPDX-License-Identifier: Apache-2.0
"""Folders as people have them: the logits of transformers where they are read, one sentence where they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bench.folders import ROWS, Row, tried

pytestmark = pytest.mark.engines

FLOAT32 = 64 * 2.0**-24
"""How far transformers may be off in float64: its norms, angles and routing weights are float32 all the same."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_real_folder(tmp_path: Path, row: Row) -> None:
    found = tried(row, tmp_path)
    if row.refused is None:
        assert "refused" not in found, found
        assert found["difference"] < FLOAT32
    else:
        assert row.refused in found.get("refused", ""), found
        assert "\n" not in found["refused"]
