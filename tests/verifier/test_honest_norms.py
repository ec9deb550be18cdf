# SPDX-License-Identifier: Apache-2.0
"""The errors of a float32 norm lean, in a legal way: adding eps to rounded means errs alike in every row.

llama.cpp showed this on a model of dim 256. Its norm has the bits of the plain formula, but seemed to truncate.
"""

from __future__ import annotations

import numpy as np
import pytest

from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.profiles.load import policy
from refmoe.spec.config import Config
from refmoe.traces.held import held_trace
from refmoe.traces.script import Call, plan
from refmoe.traces.trace import Header
from refmoe.verifier.findings import PASS
from refmoe.verifier.tally import LEAN, SNR
from refmoe.verifier.verify import verify

TOKENS = 90


def model(dim: int) -> Config:
    """A model whose norms have rows of this length."""
    return Config(
        dim=dim, layers=1, heads=dim // 32, kv_heads=2, head_dim=32, hidden_dim=64, vocab=300, experts=4,
        experts_per_token=2, norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4, 10))
@pytest.mark.parametrize("dim", [64, 256, 512])
def test_the_plain_formula_in_float32_passes(dim: int, seed: int) -> None:
    config = model(dim)
    parameters = synthetic_checkpoint(config, seed).parameters
    tokens = np.random.default_rng(seed).permutation(config.vocab)[:TOKENS]
    x = np.asarray(parameters.embedding.rows(tokens), np.float32)
    mean = np.mean(x * x, axis=-1, dtype=np.float32) + np.float32(config.norm_eps)
    normed = x * (np.float32(1) / np.sqrt(mean))[:, None] * np.asarray(parameters.layers[0].attention_norm.read())
    runs = plan([Call("prefill", 0, tokens.tolist())], config.vocab)
    arrays = {"prefill/embedding": x, "prefill/layers.0.attention_norm": normed.astype(np.float32)}
    trace = held_trace(
        Header(runs=runs, case=None, checkpoint=None, policy="float32", producer={"name": "formula"}), arrays
    )
    report = verify(trace, "norm", config, parameters, runs, policy("float32"))
    check = report.check("prefill", "layers.0.attention_norm")
    assert check is not None
    assert check.verdict == PASS, check.reason
    if (dim, seed) in ((256, 4), (512, 7)):
        # both would be called truncation anywhere else
        assert check.truncation > LEAN
        assert check.truncation_snr > SNR
