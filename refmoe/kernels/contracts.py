# SPDX-License-Identifier: Apache-2.0
"""The contracts of kernels by name, and subjects of each from a function and its claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from refmoe.contracts.law import Contract, Subject
from refmoe.errors import InputError
from refmoe.kernels.attention.declaration import Declaration as AttentionDeclaration
from refmoe.kernels.attention.law import Subject as AttentionSubject
from refmoe.kernels.attention.laws import LAWS as ATTENTION_LAWS
from refmoe.kernels.moe.declaration import Declaration as MoeDeclaration
from refmoe.kernels.moe.laws import LAWS as MOE_LAWS
from refmoe.kernels.moe.subject import Subject as MoeSubject
from refmoe.kernels.plan.declaration import Declaration as PlanDeclaration
from refmoe.kernels.plan.law import Subject as PlanSubject
from refmoe.kernels.plan.laws import LAWS as PLAN_LAWS

DECLARATIONS = {"moe": MoeDeclaration, "plan": PlanDeclaration, "attention": AttentionDeclaration}
LAWS = {"moe": MOE_LAWS, "plan": PLAN_LAWS, "attention": ATTENTION_LAWS}
SUBJECTS: dict[str, Any] = {"moe": MoeSubject, "plan": PlanSubject, "attention": AttentionSubject}


def contract_of(name: str) -> Contract:
    """The contract moe, plan or attention. Raises InputError for another name."""
    if name not in LAWS:
        raise InputError(f"contract '{name}' is unknown, one of {', '.join(LAWS)} was expected")
    return next(iter(LAWS[name].values())).contract


def subject_of(name: str, function: Callable[..., Any], claims: Mapping[str, Any], legal: Any = None) -> Subject:
    """A function with its claims as the subject of a contract.

    legal: judges values that round, for moe and attention
    Raises InputError for a claim that the contract does not know, or that contradicts another.
    """
    declaration = DECLARATIONS[name]
    known = [field.name for field in fields(declaration)]
    for claim in claims:
        if claim not in known:
            raise InputError(f"the contract {name} has no claim '{claim}', one of {', '.join(known)} was expected")
    made: Any = declaration(**claims)
    subject: Subject = SUBJECTS[name](function, made) if name == "plan" else SUBJECTS[name](function, made, legal)
    return subject
