"""Bugs of the norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refmoe.mutants.mutant import CONFIG, POLICY, mutant
from refmoe.policy.formats import BFLOAT16
from refmoe.policy.policy import Policy
from refmoe.spec.config import Config

NORMS = ("attention_norm", "moe_norm", "final_norm")


@mutant(
    "norm-eps-outside-sqrt", breaks=["NORM-2"], touches=NORMS, needs=["tiny-embedding"],
    fix="add eps to the mean square, inside the root",
)  # fmt: skip
def rms_norm(ops: Any, x: Any, gain: Any, eps: float) -> Any:
    """eps is added to the root mean square, outside of the root."""
    x = ops.cut("norm.input", x)
    root = ops.sqrt(ops.sum(x * x, axis=-1) / x.shape[-1])
    return ops.cut("norm.normed", x / (root + eps)[:, None]) * gain


@mutant("norm-eps-1e-6", breaks=["NORM-1"], touches=NORMS, changes=CONFIG, fix="take rms_norm_eps from the config")
def eps_of_another_model(config: Config) -> Config:
    """eps is 1e-6, the default of another model."""
    return replace(config, norm_eps=1e-6)


@mutant("norm-lowprec-variance", breaks=["NORM-1"], touches=NORMS, changes=POLICY)
def statistic_in_storage(policy: Policy) -> Policy:
    """The mean square is summed in the storage dtype."""
    return replace(policy, statistics=BFLOAT16)
