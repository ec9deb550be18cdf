# SPDX-License-Identifier: Apache-2.0
"""Contracts of kernels as pytest classes, and as a check, with the judges of values that the assertions have.

    from refmoe.testing import moe_contract

    TestMyKernel = moe_contract(my_kernel, dtype="bfloat16", weights_dtype="float32")

`docs/kernel-contract.md` is the manual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from refmoe.api.contract_process import TIMEOUT, Asked, Checked, check_apart
from refmoe.api.contracts import judge_laws, load_function, named_laws
from refmoe.api.policies import as_policy
from refmoe.api.progress import Bars, silent
from refmoe.errors import require
from refmoe.testing.attention import judge_attention
from refmoe.testing.judgement import Judgement
from refmoe.testing.mixture import judge_moe
from refmoe.verifier.findings import FAIL
from refmoe.verifier.segments import SIGNIFICANCE

if TYPE_CHECKING:
    from refmoe.contracts.checking import Verdict
    from refmoe.contracts.law import Subject
    from refmoe.kernels.attention.data import Sequences
    from refmoe.kernels.attention.declaration import Declaration as AttentionDeclaration
    from refmoe.kernels.moe.call import Call
    from refmoe.kernels.moe.declaration import Declaration as MoeDeclaration
    from refmoe.kernels.moe.subject import Judged

NUMBER = 1000
"""The number of calls that share the significance of one verification: a healthy kernel passes all of them."""
WHAT = "the contracts of kernels"


def moe_contract(kernel: Callable[..., Any], **claims: Any) -> type:
    """A test class with one test per law of mixtures of experts.

    kernel: f(x [T, D], w_gate [E, F, D], w_up [E, F, D], w_down [E, D, F], ids [T, k], weights [T, k]) -> [T, D]
    claims: the fields of `refmoe.kernels.moe.declaration.Declaration`: other layouts, dtypes, and what it takes
    Raises InputError for a claim that there is not, or that contradicts another.
    """
    return contract_class("moe", kernel, claims)


def plan_contract(plan: Callable[..., Any], **claims: Any) -> type:
    """A test class with one test per law of dispatch plans.

    plan: f(ids [T, k], block, experts) -> (slots, experts of blocks, total), or another kind
    claims: the fields of `refmoe.kernels.plan.declaration.Declaration`
    Raises InputError for a claim that there is not, or that contradicts another.
    """
    return contract_class("plan", plan, claims)


def attention_contract(kernel: Callable[..., Any], **claims: Any) -> type:
    """A test class with one test per law of attention over a cache of pages.

    kernel: f(q [S, H, C], keys [P, B, G, C], values [P, B, G, C], table [S, M], lengths [S]) -> [S, H, C]
    claims: the fields of `refmoe.kernels.attention.declaration.Declaration`
    Raises InputError for a claim that there is not, or that contradicts another.
    """
    return contract_class("attention", kernel, claims)


def contract_class(contract: str, function: Callable[..., Any], claims: dict[str, Any]) -> type:
    """The test class of a contract: moe, plan or attention."""
    require("hypothesis", "contract", WHAT)
    require("pytest", "contract", WHAT)
    from refmoe.contracts.pytest_items import test_class
    from refmoe.kernels.contracts import contract_of

    return test_class(contract_of(contract), subject(contract, function, claims), function)


def subject(contract: str, function: Callable[..., Any], claims: dict[str, Any]) -> Subject:
    """A function with its claims, and with the judge of values of the assertions.

    Raises InputError for a claim that there is not, or that contradicts another, and for an unknown policy.
    """
    from refmoe.kernels.contracts import subject_of

    if claims.get("policy") is not None:
        as_policy(claims["policy"])
    return subject_of(contract, function, claims, {"moe": legal_mixture, "attention": legal_attention}.get(contract))


def check_kernel(
    kernel: Callable[..., Any] | str,
    *,
    contract: str = "moe",
    examples: int | None = None,
    laws: Sequence[str] = (),
    ready: Callable[[], None] = lambda: None,
    tell: Callable[[Verdict], None] = lambda _verdict: None,
    **claims: Any,
) -> list[Verdict]:
    """Hold a kernel against the laws of its contract, in this process.

    kernel: a callable, or ``module:function`` or ``file.py:function``   contract: moe, plan or attention
    examples: for each law   laws: the names of those to try; empty: all   claims: the fields of the declaration
    ready: called when the kernel is imported   tell: called with each verdict
    The kernel runs with the rights of this process and without a time limit. `refmoe kernel check` runs it in a process
    of its own instead.
    Raises InputError for an unknown contract, law or claim, and for a kernel that cannot be imported.
    """
    require("hypothesis", "contract", WHAT)
    from refmoe.kernels.contracts import contract_of

    known = contract_of(contract).laws
    names = named_laws(laws, known)
    subject(contract, lambda *_: None, claims)
    found = load_function(kernel, "a kernel") if isinstance(kernel, str) else kernel
    ready()
    return judge_laws([known[name] for name in names], subject(contract, found, claims), examples, tell)


def check_kernel_apart(contract: str, asked: Asked, timeout: float = TIMEOUT, bars: Bars = silent) -> Checked:
    """`check_kernel` in a process of its own, in which a kernel may leave, crash or never return.

    timeout: seconds for each law, and for the import
    Raises InputError as `check_kernel` does.
    """
    require("hypothesis", "contract", WHAT)
    from refmoe.kernels.contracts import contract_of

    subject(contract, lambda *_: None, dict(asked.claims))
    whole = Asked(
        function=asked.function, laws=asked.laws, examples=asked.examples, claims={**asked.claims, "contract": contract}
    )
    return check_apart(check_kernel, contract_of(contract), whole, timeout, bars)


# ---- judges of values


def legal_mixture(found: NDArray[Any], call: Call, d: MoeDeclaration) -> Judged | None:
    """The finding about a result [T, D] of a mixture that is not legal; None for a legal one."""
    from refmoe.kernels.moe.subject import Judged

    given = d.given.dtype
    done = judge_moe(
        found, call.x.astype(given), call.w_gate.astype(given), call.w_up.astype(given), call.w_down.astype(given),
        call.local, call.weights.astype(d.shares.dtype), policy=d.policy, explain=False,
        significance=SIGNIFICANCE / NUMBER,
    )  # fmt: skip
    words = finding(done)
    return None if words is None else Judged(words=words, token=None if done.worst is None else done.worst.where[0])


def legal_attention(found: NDArray[Any], sequences: Sequences, d: AttentionDeclaration) -> str | None:
    """The finding about a result [S, H, C] of attention that is not legal; None for a legal one."""
    given, lengths = d.given.dtype, sequences.lengths
    shape = (len(lengths), int(lengths.max()), *sequences.keys[0].shape[1:])
    keys, values = np.zeros(shape, given), np.zeros(shape, given)
    for s, length in enumerate(lengths):
        keys[s, :length], values[s, :length] = sequences.keys[s], sequences.values[s]
    (done,) = judge_attention(
        found[:, None], sequences.q.astype(given)[:, None], keys, values, window=d.window, scale=d.scale,
        lengths=lengths, policy=d.policy, explain=False, significance=SIGNIFICANCE / NUMBER,
    )  # fmt: skip
    return finding(done)


def finding(done: Judgement) -> str | None:
    """A judgement that fails, in words; None for another."""
    if done.verdict != FAIL:
        return None
    worst = done.worst
    if worst is None:
        return done.reason
    legal = f"[{worst.low:.9g}, {worst.high:.9g}]"
    return f"{done.reason}; at {done.place} found {worst.found:.9g}, and {legal} holds all legal values"


__all__ = [
    "attention_contract", "check_kernel", "check_kernel_apart", "contract_class", "moe_contract", "plan_contract",
    "subject",
]  # fmt: skip
