# SPDX-License-Identifier: Apache-2.0
"""A golden case that takes milliseconds, for tests of what is done with cases."""

from __future__ import annotations

from pathlib import Path

TEXT = """
format_version = "1"
why = "Small."
clauses = []
bugs = []
conditions = []
{more}
[config]
dim = 8
layers = 1
heads = 2
kv_heads = 1
head_dim = 4
hidden_dim = 12
vocab = 11
experts = 3
experts_per_token = 2

[weights]
seed = {seed}

[[script]]
op = "prefill"
sequence = 0
tokens = [1, 2, 3]

[[script]]
op = "decode"
sequence = 0
tokens = [4]
"""


def write_case(folder: Path, seed: int = 1, more: str = "") -> Path:
    """A folder with a case.toml; `more` are lines of its top level."""
    folder.mkdir(exist_ok=True)
    (folder / "case.toml").write_text(TEXT.format(seed=seed, more=more))
    return folder
