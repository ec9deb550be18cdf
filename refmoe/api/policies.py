# SPDX-License-Identifier: Apache-2.0
"""Policies by name, with changes."""

from __future__ import annotations

from refmoe.api.arguments import name_of, path_of, shown
from refmoe.errors import InputError
from refmoe.profiles.load import policies as all_policies
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy


def as_policy(policy: object) -> Policy:
    """A policy, or the one of a name. Raises InputError for anything else."""
    if isinstance(policy, Policy):
        return policy
    text = name_of(policy, "policy", "a name of refmoe.policies() or a policy of refmoe.policy()")
    if ".toml" in text:
        path_of(text.partition(".toml")[0] + ".toml", "policy")
    return named_policy(text)


def policy(name: str, **changes: str | bool) -> Policy:
    """A policy by name, with changes.

    name: one of `refmoe.policies`, or the path of a TOML file
    changes: a field or a cut point and its value; a dot in the name of a cut point is written as ``__``
    Raises InputError when the name or a change is unknown.

    >>> import refmoe
    >>> refmoe.policy("bfloat16", cache="float16").name
    'bfloat16+cache=float16'
    >>> refmoe.policy("float32", attention__probs="bfloat16").name
    'float32+attention.probs=bfloat16'
    """
    words = []
    for field, value in changes.items():
        if not isinstance(value, str | bool) or "+" in str(value):
            raise InputError(
                f"policy: {field} is {shown(value)}, but the name of a dtype, a choice or True was expected"
            )
        words.append(f"{field.replace('__', '.')}={value if isinstance(value, str) else str(value).lower()}")
    as_policy(name_of(name, "policy", "a name of refmoe.policies()"))
    return as_policy("+".join([name, *words]))


def policies() -> list[str]:
    """The names of all policies.

    >>> import refmoe
    >>> "bfloat16" in refmoe.policies()
    True
    """
    return [each.name for each in all_policies()]
