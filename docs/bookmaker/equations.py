# SPDX-License-Identifier: Apache-2.0
"""The code of a step as an equation, in LaTeX: each statement a line, in the order in which it stands.

An equation that is typeset from the syntax tree cannot differ from the code. What means nothing to a reader of
mathematics is left out: the arithmetic (`ops`), the names of taps, allocations, axes that are only there to broadcast.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from docs.bookmaker.spec_pages import Function, called

ADD, MULTIPLY, ATOM = 1, 2, 3
"""How strongly the parts of an expression hang together. What is weaker than its place needs parentheses."""
SYMBOLS = {"eps": r"\varepsilon", "theta": r"\theta", "cos": r"\cos", "sin": r"\sin"}
COMPARISONS = {ast.GtE: r"\ge", ast.Lt: "<", ast.Is: "=", ast.Eq: "=", ast.LtE: r"\le", ast.Gt: ">"}
HIDDEN = ("ops", "model", "layer", "inner")
"""Arguments that carry the arithmetic and the parameters."""
Typeset = tuple[str, int]
"""LaTeX, and how strongly its parts hang together."""


def equations(function: Function) -> str:
    """The statements of a function as lines of LaTeX.   Raises ValueError for a statement that has no rule here."""
    rows = [*_rows(function, function.node.body, 0)]
    return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"


def _rows(function: Function, body: list[ast.stmt], depth: int) -> Iterator[str]:
    indent = r"\quad " * depth
    for statement in body:
        match statement:
            case ast.Expr(value=ast.Constant()):  # the docstring
                continue
            case ast.Assign(targets=[target], value=value):
                if not _allocates(value):
                    yield from (f"{indent}{left} &= {right}" for left, right in _assigned(function, target, value))
            case ast.Return(value=value) if value is not None:
                yield rf"{indent}\text{{result}} &= {_typeset(function, value)[0]}"
            case ast.For(target=target, iter=values, body=inner):
                yield rf"{indent}\text{{for each }} {_typeset(function, target)[0]} &\in {_range(function, values)}"
                yield from _rows(function, inner, depth + 1)
            case ast.If(test=test, body=inner, orelse=otherwise):
                yield rf"{indent}\text{{if }} {_typeset(function, test)[0]} &"
                yield from _rows(function, inner, depth + 1)
                if otherwise:
                    yield rf"{indent}\text{{otherwise}} &"
                    yield from _rows(function, otherwise, depth + 1)
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=held, attr="append"), args=[item])):
                yield rf"{indent}{_typeset(function, held)[0]} &\ni {_typeset(function, item)[0]}"
            case _:
                raise ValueError(f"{function.name}: no rule for the statement {ast.unparse(statement)}")


def _allocates(value: ast.expr) -> bool:
    """Whether nothing is computed: room for results, an empty list, other names for the same things."""
    if isinstance(value, ast.Tuple):
        return all(map(_allocates, value.elts)) or "-1" in map(ast.unparse, value.elts)  # a shape
    if isinstance(value, ast.GeneratorExp):
        return _allocates(value.elt)
    if isinstance(value, ast.Call):
        return called(value) in ("empty", "within")
    if isinstance(value, ast.List):
        return not value.elts
    return isinstance(value, ast.Attribute) and value.attr in ("config", "steps", "shape")


def _assigned(function: Function, target: ast.expr, value: ast.expr) -> Iterator[tuple[str, str]]:
    """Both sides of an assignment. A tuple that is assigned to a tuple is one equation for each part."""
    match target, value:
        case ast.Tuple(elts=targets), ast.Tuple(elts=values):
            for left, right in zip(targets, values, strict=True):
                if not _allocates(right):
                    yield from _assigned(function, left, right)
        case ast.Tuple(), ast.GeneratorExp(elt=elt, generators=[each]) if _inner(elt) == _inner(each.target):
            yield _typeset(function, target)[0], _typeset(function, each.iter)[0]
        case _:
            yield _typeset(function, target)[0], _typeset(function, value)[0]


def _inner(value: ast.expr) -> str:
    """The name under subscripts that only add axes."""
    while isinstance(value, ast.Subscript) and _only_broadcasts(value.slice):
        value = value.value
    return ast.unparse(value)


def _only_broadcasts(index: ast.expr) -> bool:
    """Whether an index takes everything, and at most adds axes: ``[:, None]``."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(
        (isinstance(each, ast.Slice) and each.lower is None and each.upper is None)
        or (isinstance(each, ast.Constant) and each.value in (None, ...))
        for each in parts
    )  # fmt: skip


def _name(name: str) -> str:
    return SYMBOLS.get(name) or (name if len(name) == 1 else rf"\text{{{name}}}")


def _typeset(function: Function, value: ast.expr) -> Typeset:
    """An expression as LaTeX."""

    def inside(part: ast.expr, place: int = 0) -> str:
        text, strength = _typeset(function, part)
        return text if strength >= place else rf"\left( {text} \right)"

    match value:
        case ast.Name(id=name):
            return _name(name), ATOM
        case ast.Constant(value=None):
            return r"\text{none}", ATOM
        case ast.Constant(value=constant):
            return (rf"\text{{{constant}}}" if isinstance(constant, str) else f"{constant:g}"), ATOM
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return f"-{inside(operand, MULTIPLY)}", ADD
        case ast.Attribute(value=held, attr="T"):
            return rf"{inside(held, ATOM)}^{{\mathsf T}}", ATOM
        case ast.Attribute(value=held, attr=name):
            owner = ast.unparse(held)
            return (_name(name) if owner.split(".")[0] in HIDDEN else rf"\text{{{owner}.{name}}}"), ATOM
        case ast.Tuple(elts=elts) | ast.List(elts=elts):
            return ",\\; ".join(map(inside, elts)), 0
        case ast.Subscript():
            return _subscript(function, value)
        case ast.BinOp(left=left, op=op, right=right):
            return _operation(inside, left, op, right)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return rf"{inside(left, ADD)} {COMPARISONS[type(op)]} {inside(right, ADD)}", 0
        case ast.IfExp(test=test, body=body, orelse=otherwise):
            return rf"{inside(body)} \text{{ if }} {inside(test)} \text{{, otherwise }} {inside(otherwise)}", 0
        case ast.Call():
            return _call(function, value, inside)
    raise ValueError(f"{function.name}: no rule for the expression {ast.unparse(value)}")


def _operation(inside: object, left: ast.expr, op: ast.operator, right: ast.expr) -> Typeset:
    assert callable(inside)
    match op:
        case ast.Add():
            return f"{inside(left, ADD)} + {inside(right, ADD)}", ADD
        case ast.Sub():
            return f"{inside(left, ADD)} - {inside(right, MULTIPLY)}", ADD
        case ast.Mult():
            return rf"{inside(left, MULTIPLY)} \cdot {inside(right, MULTIPLY)}", MULTIPLY
        case ast.Div():
            return rf"\frac{{{inside(left)}}}{{{inside(right)}}}", MULTIPLY
        case ast.FloorDiv():
            return rf"\left\lfloor \frac{{{inside(left)}}}{{{inside(right)}}} \right\rfloor", ATOM
        case ast.BitAnd():
            return rf"{inside(left)} \wedge {inside(right)}", 0
    raise ValueError(f"no rule for the operation {op}")


def _subscript(function: Function, value: ast.Subscript) -> Typeset:
    """``x[..., :half]`` as x with an index; ``x.shape[-1]`` as the letter of that axis."""
    if isinstance(value.value, ast.Attribute) and value.value.attr == "shape":
        axes = function.axes(ast.unparse(value.value.value))
        if not axes:
            raise ValueError(f"{function.name}: the docstring gives no shape for {ast.unparse(value)}")
        return axes[ast.literal_eval(value.slice)], ATOM
    if _only_broadcasts(value.slice):
        return _typeset(function, value.value)
    parts = value.slice.elts if isinstance(value.slice, ast.Tuple) else [value.slice]
    held, strength = _typeset(function, value.value)
    index = ", ".join(_index(function, each) for each in parts)
    return (rf"{held}_{{{index}}}" if strength == ATOM else rf"\left( {held} \right)_{{{index}}}"), ATOM


def _index(function: Function, part: ast.expr) -> str:
    if isinstance(part, ast.Slice):
        ends = ("" if end is None else _typeset(function, end)[0] for end in (part.lower, part.upper))
        return ":".join(ends)
    return r"\ldots" if isinstance(part, ast.Constant) and part.value is ... else _typeset(function, part)[0]


def _range(function: Function, values: ast.expr) -> str:
    match values:
        case ast.Call(func=ast.Name(id="range"), args=[end]):
            return rf"0 \ldots {_typeset(function, end)[0]} - 1"
    return _typeset(function, values)[0]


def _axis(function: Function, call: ast.Call) -> str:
    """The letter of the axis that a sum or a maximum is taken over."""
    axis = next(ast.literal_eval(each.value) for each in call.keywords if each.arg == "axis")
    for node in ast.walk(call.args[0]):
        if isinstance(node, ast.Name) and function.axes(node.id):
            return function.axes(node.id)[axis]
    return ""


def _call(function: Function, call: ast.Call, inside: object) -> Typeset:
    assert callable(inside)
    args = [each for each in call.args if not (isinstance(each, ast.Name) and each.id in HIDDEN)]
    match called(call), args:
        case ("tap", [_, value]) | (("array" | "vector" | "tuple"), [value]):
            return _typeset(function, value)
        case "reshape", _:  # the same numbers
            assert isinstance(call.func, ast.Attribute)
            return _typeset(function, call.func.value)
        case "offer", _:
            return _typeset(function, call.keywords[-1].value)
        case "float", [ast.Constant(value="-inf")]:
            return r"-\infty", ADD
        case ("sum" | "max") as name, [value]:
            axis = _axis(function, call)
            over = f"_{{{axis}}}" if axis else ""
            return rf"\{name}{over} {inside(value, MULTIPLY)}", MULTIPLY
        case "sqrt", [value]:
            return rf"\sqrt{{{inside(value)}}}", ATOM
        case "exp", [value]:
            return rf"\exp \left( {inside(value)} \right)", MULTIPLY
        case "sigmoid", [value]:
            return rf"\sigma \left( {inside(value)} \right)", MULTIPLY
        case "linear", [x, weight]:
            return rf"{inside(x, ATOM)} \; {inside(weight, ATOM)}^{{\mathsf T}}", MULTIPLY
        case "matmul", [a, b]:
            return rf"{inside(a, ATOM)} \; {inside(b, ATOM)}", MULTIPLY
        case "gather" | "embed", [x, index] if isinstance(call.func, ast.Attribute):
            return rf"{inside(x, ATOM)}_{{{inside(index)}}}", ATOM
        case "where", [condition, x, otherwise]:
            chosen = rf"{inside(x)} \text{{ where }} {inside(condition)} \text{{, else }} {inside(otherwise)}"
            return rf"\left( {chosen} \right)", ATOM
        case "where_equal", [ids, value]:
            return rf"\left\{{ (t, j) : {inside(ids, ATOM)}_{{t, j}} = {inside(value)} \right\}}", ATOM
        case "concatenate", [ast.List(elts=parts)]:
            joined = r" \; | \; ".join(map(inside, parts))
            return rf"\left[ {joined} \right]", ATOM
        case "unit_circle", [positions, base, numerators, denominator]:
            assert isinstance(numerators, ast.Call)
            first, end, step = map(inside, numerators.args)
            i = rf"i = {first}, {step}, \ldots < {end}"
            angle = rf"{inside(positions)} \cdot {inside(base)}^{{-i / {inside(denominator)}}}"
            return rf"(\cos, \sin) \left( {angle} \right), \; {i}", 0
    named = [rf"\text{{{each.arg}}} = {inside(each.value)}" for each in call.keywords]
    name = rf"\text{{{called(call)}}}"
    return rf"{name} \left( {', '.join([*map(inside, args), *named])} \right)", ATOM
