# SPDX-License-Identifier: Apache-2.0
"""Policies by name: refmoe's own in `profiles.toml`, files of a user, and both with changes.

hf-float32                          a policy of refmoe's own (``exact`` is another name of float64)
my-engine.toml                      a file with one table, of the same format; its `base` may be one of refmoe's
hf-float32+cache=float16            with changes, each a field, a cut point, or one of `GROUPS`
llama.cpp-quantised+Q4_K.input=q8_0 and so is the input of products with matrices of one format
llama.cpp-quantised+codes=q8_2      or of all formats whose inputs become codes
llama.cpp-quantised+cache=q8_0      and so are the values that the cache keeps
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from refmoe.arithmetic.codes import InputFormat
from refmoe.arithmetic.formats import Format
from refmoe.errors import InputError
from refmoe.files.parsing import toml
from refmoe.files.reading import own_text
from refmoe.files.sentences import shown
from refmoe.profiles import inputs
from refmoe.profiles.cut_points import CUT_POINTS, INPUT_CUTS, ISLANDS, KEPT_IN_CODES
from refmoe.profiles.policy import (
    COMPARED,
    CONSUMERS,
    FORMATS,
    PAIRS,
    ROUTER_ORDERS,
    SCALES,
    SIGMOIDS,
    TIES,
    TURNS,
    Budget,
    Policy,
)

TEXTS = ("about", "source")
DTYPES = ("storage", "accumulation", "statistics")
BUDGETS = ("exp", "angles", "circle")
CHOICES = {
    "scale": SCALES, "router_order": ROUTER_ORDERS, "compared": COMPARED, "ties": TIES, "consumers": CONSUMERS,
    "sigmoid": SIGMOIDS, "pairs": PAIRS, "turn": TURNS,
}  # fmt: skip
FLAGS = ("truncates", "flushes")
NUMBERS = ("ranks",)
MOST_RANKS = 4096
TABLES = {"cuts": "a table of dtypes", "inputs": "a table of formats"}
INPUT, CODES = ".input", "codes"
"""The changes of the input of products: with one format of matrices, and with all of whose inputs codes are made."""
GROUPS = {
    "cache": ("cache.k", "cache.v"),
    "linear.input": tuple(INPUT_CUTS),
    "islands": ("statistics", *ISLANDS),
}
"""The names in a change that stand for several fields and cut points."""

Refuse = Callable[[str, Any, str], InputError]
"""The function that makes the error for a field, from its name, its value and the expected value in words."""


def policy(text: str) -> Policy:
    """The policy of a text: a name, a file, or either with changes. Its name is the text.

    Raises InputError when the name, the file or a change is not known or not valid.
    """
    path = re.match(r".*\.toml(?=\+|$)", text)  # a path may have a '+' in it
    name = path[0] if path else text.partition("+")[0]
    changes = text[len(name) :].split("+")[1:]
    found = _from_file(Path(name)) if path else _named("float64" if name == "exact" else name)
    for change in changes:
        found = _changed(found, change, text)
    return replace(found, name="+".join([found.name, *changes]))


def policies() -> tuple[Policy, ...]:
    """Refmoe's own policies, in the order of `profiles.toml`."""
    return tuple(_own().values())


# ---- differences


@dataclass(frozen=True)
class Difference:
    """A field or cut point, and its value in each policy, in words."""

    field: str
    values: tuple[str, ...]


def differences(compared: Iterable[Policy]) -> tuple[Difference, ...]:
    """The fields and cut points in which policies differ. For a single policy, all fields and cut points."""
    tables = [_in_words(each) for each in compared]
    rows = (Difference(field, tuple(table[field] for table in tables)) for field in tables[0])
    return tuple(row for row in rows if len(tables) == 1 or len(set(row.values)) > 1)


def _in_words(policy: Policy) -> dict[str, str]:
    words = {name: str(getattr(policy, name)) for name in DTYPES}
    words |= {name: getattr(policy, name) for name in CHOICES}
    words |= {name: "yes" if getattr(policy, name) else "no" for name in FLAGS}
    words |= {name: str(getattr(policy, name)) for name in NUMBERS}
    words |= {name: budget_in_words(getattr(policy, name)) for name in BUDGETS}
    words["inputs"] = ", ".join(f"{matrix}: {of.name}" for matrix, of in sorted(policy.inputs.items())) or "none"
    kept = {cut: how.name for cut, how in policy.kept.items()}
    return words | {cut: str(policy.at(cut)) for cut in CUT_POINTS} | kept


def budget_in_words(budget: Budget) -> str:
    """A budget such as ``8 + 2 |x|``."""
    return f"{budget.constant:g}" + (f" + {budget.slope:g} |x|" if budget.slope else "")


# ---- tables


@cache
def _own_tables() -> dict[str, Any]:
    return toml(Path("profiles.toml"), "a file of policies", own_text("refmoe.profiles", "profiles.toml").encode())


@cache
def _own() -> dict[str, Policy]:
    return {name: _build(name, _own_tables(), "profiles.toml") for name in _own_tables()}


def _named(name: str) -> Policy:
    if name in _own():
        return _own()[name]
    raise InputError(f"policy '{name}' is unknown, expected a .toml file or {_one_of((*_own(), 'exact'), name)}")


def _from_file(path: Path) -> Policy:
    tables = toml(path, "a policy in TOML")
    if len(tables) != 1 or not isinstance(next(iter(tables.values())), dict):
        raise InputError(f"{path}: {sorted(tables)} was found, but one table with the name of the policy was expected")
    name = next(iter(tables))
    if name in _own_tables() or name == "exact" or "+" in name:
        raise InputError(f"{path}: the name '{name}' is taken or has a '+', but a name of its own was expected")
    return _build(name, _own_tables() | tables, str(path))


def _build(name: str, tables: dict[str, Any], where: str) -> Policy:
    def refuse(field: str, found: Any, expected: str) -> InputError:
        return InputError(f"{where}: [{name}] {field} is {_shown(found)}, but {expected} was expected")

    for field in TEXTS:
        if not isinstance(tables[name].get(field), str):
            raise refuse(field, tables[name].get(field), "a text of its own")
    values = _with_base(name, tables, refuse)
    for field in values.keys() - {*TEXTS, *DTYPES, *BUDGETS, *CHOICES, *FLAGS, *NUMBERS, *TABLES}:
        known = (*TEXTS, "base", *DTYPES, *BUDGETS, *CHOICES, *FLAGS, *NUMBERS, *TABLES)
        raise InputError(f"{where}: [{name}] has a field '{field}', but only {_one_of(known, field)} was expected")
    parts: dict[str, Any] = {field: " ".join(values[field].split()) for field in TEXTS}
    for field in DTYPES:
        parts[field] = _value(field, values.get(field), refuse)
    for field in BUDGETS:
        parts[field] = _budget(field, values.get(field), refuse)
    for field in values.keys() & {*CHOICES, *FLAGS, *NUMBERS}:
        parts[field] = _value(field, values[field], refuse)
    groups = {group: _cuts_of(group) for group in GROUPS}
    for cut in values["cuts"].keys() - {*CUT_POINTS, *groups}:
        known = (*CUT_POINTS, *groups)
        raise InputError(f"{where}: [{name}] has a cut point '{cut}', but only {_one_of(known, cut)} was expected")
    cuts: dict[str, Any] = {}
    for cut, found in sorted(values["cuts"].items(), key=lambda item: item[0] not in groups):  # single ones win
        cuts |= {each: _cut(each, found, refuse) for each in groups.get(cut, (cut,))}
    made = {matrix: _input(matrix, found, refuse) for matrix, found in values["inputs"].items()}
    return Policy(name=name, inputs=made, **(parts | _apart(cuts)))


def _apart(cuts: Mapping[str, Format | InputFormat]) -> dict[str, dict[str, Any]]:
    """The fields of a policy for these cut points: the dtypes of some, and what others are kept in."""
    kept = {cut: found for cut, found in cuts.items() if isinstance(found, InputFormat)}
    return {"cuts": {cut: found for cut, found in cuts.items() if cut not in kept}, "kept": kept}


def _cut(cut: str, found: Any, refuse: Refuse) -> Format | InputFormat:
    """The dtype of a cut point, or the codes in which it keeps values, if it is one of `KEPT_IN_CODES`."""
    if cut not in KEPT_IN_CODES:
        dtype: Format = _value(cut, found, refuse)
        return dtype
    return _codes(f"cuts.{cut}", cut, found, refuse)


def _input(matrix: str, found: Any, refuse: Refuse) -> InputFormat | Format:
    """The format of the input of products with matrices of a format, or of one such product."""
    if not inputs.is_matrix(matrix):
        raise refuse("inputs", matrix, f"the format of a matrix, {_one_of(inputs.MATRICES, matrix)},")
    return _codes(f"inputs.{matrix}", matrix, found, refuse)


def _codes(field: str, name: str, found: Any, refuse: Refuse) -> InputFormat | Format:
    """A format by its name, or a table of one's own."""
    if isinstance(found, dict):

        def wrong(part: str, value: Any, expected: str) -> InputError:
            return refuse(f"{field}.{part}", value, expected)

        return inputs.build(f"own {name}", found, inputs.own_tables(), wrong)
    return inputs.input_format(found, lambda expected: refuse(field, found, expected))


def _cuts_of(group: str) -> tuple[str, ...]:
    """The cut points that the name of a group stands for."""
    return tuple(name for name in GROUPS[group] if name in CUT_POINTS)


def _with_base(name: str, tables: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    """The fields of a table over those of its base, and so on for the base of the base."""
    own, chain = tables[name], [name]
    layers = [own]
    while "base" in own:
        base = own["base"]
        if not isinstance(base, str) or base not in tables or base in chain:
            raise refuse("base", base, _one_of([other for other in tables if other not in chain], str(base)))
        own = tables[base]
        chain.append(base)
        layers.insert(0, own)
    values: dict[str, Any] = {table: {} for table in TABLES}
    for layer in layers:
        for table in TABLES:
            if not isinstance(layer.get(table, {}), dict):
                raise refuse(table, layer[table], TABLES[table])
        values = {**values, **layer, **{table: {**values[table], **layer.get(table, {})} for table in TABLES}}
    values.pop("base", None)
    return values


def _value(field: str, found: Any, refuse: Refuse) -> Any:
    """The value of a field or cut point: a dtype, a choice or a flag. Raises InputError for other values."""
    if field in FLAGS:
        if not isinstance(found, bool):
            raise refuse(field, found, "true or false")
        return found
    if field in NUMBERS:
        if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= MOST_RANKS:
            raise refuse(field, found, f"an integer from 1 to {MOST_RANKS}")
        return found
    known: Iterable[str] = CHOICES.get(field, FORMATS)
    if found not in tuple(known):
        raise refuse(field, found, _one_of(known, str(found)))
    return found if field in CHOICES else FORMATS[found]


def _budget(field: str, found: Any, refuse: Refuse) -> Budget:
    expected = "a table of 'constant' and 'slope', numbers from 0, and 'source', a text,"
    if not isinstance(found, dict) or found.keys() != {"constant", "slope", "source"}:
        raise refuse(field, found, expected)
    numbers = [found["constant"], found["slope"]]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers):
        raise refuse(field, found, expected)
    if not isinstance(found["source"], str):
        raise refuse(field, found, expected)
    return Budget(constant=float(numbers[0]), slope=float(numbers[1]), source=" ".join(found["source"].split()))


def _changed(found: Policy, change: str, text: str) -> Policy:
    """The policy with one change, ``field=value``."""

    def refuse(field: str, value: Any, expected: str) -> InputError:
        return InputError(f"policy '{text}': {field} is {_shown(value)}, but {expected} was expected")

    field, equals, word = change.partition("=")
    if not equals:
        raise InputError(f"policy '{text}': '{change}' was found, but a change such as cache=float16 was expected")
    matrix = field.removesuffix(INPUT)
    if matrix != field and inputs.is_matrix(matrix):
        return replace(found, inputs={**found.inputs, matrix: _input(matrix, word, refuse)})
    if field == CODES:
        coded = [name for name, of in found.inputs.items() if isinstance(of, InputFormat)]
        return replace(found, inputs={**found.inputs, **{name: _input(name, word, refuse) for name in coded}})
    fields = (*DTYPES, *CHOICES, *FLAGS, *NUMBERS)
    if field not in (*fields, *GROUPS, *CUT_POINTS):
        known = (*fields, *GROUPS, *CUT_POINTS, CODES, *(name + INPUT for name in inputs.MATRICES))
        raise InputError(f"policy '{text}': '{field}' cannot be changed, expected {_one_of(known, field)}")
    value: Any = word
    if field in FLAGS:
        value = {"true": True, "false": False}.get(word, word)
    elif field in NUMBERS and word.isdecimal():
        value = int(word)
    names = GROUPS.get(field, (field,))
    cuts = {name: _cut(name, value, refuse) for name in names if name in CUT_POINTS}
    values = {name: _value(name, value, refuse) for name in names if name not in cuts}
    parts: dict[str, Any] = values | _apart({**found.cuts, **found.kept, **cuts})
    return replace(found, **parts)


def _shown(found: Any) -> str:
    return "missing" if found is None else shown(found)


def _one_of(known: Iterable[str], found: str) -> str:
    """The known names in words. Names that resemble the one found come first."""
    known = list(known)
    close = difflib.get_close_matches(found, known, n=3, cutoff=0.5)
    return "one of " + ", ".join([*close, *(name for name in known if name not in close)])
