# SPDX-License-Identifier: Apache-2.0
"""The auditor's book: complete, its links lead somewhere, its numbers are right."""

from __future__ import annotations

import ast
import json
import re
from decimal import Decimal, localcontext
from fractions import Fraction
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from docs.bookmaker.equations import equations
from docs.bookmaker.example import Example, Value, example
from docs.bookmaker.spec_pages import SIZES, Function, Page, numbers, pages
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.suite.audit import stated
from tests.docs.site import leads_somewhere, links
from tests.tour import ROOT

FEWEST_LINKS = 5
"""Links to evidence on the page of a clause."""
LISTS = ("index.html", "clauses/index.html")
"""Where the page of a clause links to beside its evidence."""


@pytest.fixture(scope="module")
def steps() -> list[Page]:
    return pages(ROOT / "refmoe")


@pytest.fixture(scope="module")
def worked(steps: list[Page]) -> Example:
    return example(ROOT / "golden", steps)


# ---- nothing is missing, and every link leads somewhere


def test_each_clause_has_a_page_with_links_to_its_evidence(built: tuple[Path, str]) -> None:
    clauses = {clause for clause, _, _ in stated()}
    assert len(clauses) >= 160
    poor = {}
    for clause in clauses:
        page = built[0] / "docs" / "book" / "clauses" / f"{clause}.html"
        evidence = {
            link for link in links(page)
            if not link.startswith(("#", "../../glossary")) and not link.partition("#")[0].endswith(LISTS)
        }  # fmt: skip
        if len(evidence) < FEWEST_LINKS:
            poor[clause] = evidence
    assert poor == {}


def test_every_link_of_the_book_leads_somewhere(built: tuple[Path, str]) -> None:
    book = built[0] / "docs" / "book"
    found = {(page, link) for page in book.rglob("*.html") for link in links(page)}
    assert len(found) > 5000
    assert {(page.name, link) for page, link in found if not leads_somewhere(page, link)} == set()


def test_each_clause_stands_on_the_page_of_its_step(steps: list[Page]) -> None:
    stated_by_steps = [clause for step in steps for clause in step.clauses]
    assert stated_by_steps == [clause for clause, _, place in stated() if place.startswith("spec/")]


def test_each_function_of_the_model_is_on_one_page(steps: list[Page]) -> None:
    shown = [each.name for step in steps for each in step.functions if isinstance(each.node, ast.FunctionDef)]
    written = [
        node.name
        for path in (ROOT / "refmoe" / "spec").glob("*.py")
        if path.stem not in ("taps", "interface")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert sorted(shown) == sorted(written)


def test_each_tap_is_shown_by_the_step_that_computes_it(steps: list[Page]) -> None:
    """Which step a tap belongs to is told here from the paper's figure, not from the code."""
    assert {tap for step in steps for tap in step.taps} == {*LAYER_TAPS, *MODEL_TAPS}
    belongs = {
        "attention.q_rope": "rotate", "attention.probs": "softmax", "attention.context": "attend",
        "router.weights": "softmax", "router.experts": "route", "expert.hidden": "swiglu", "moe.output": "combine",
        "moe_norm": "rms_norm", "residual": "decoder_layer", "logits": "forward", "embedding": "embed",
        "expert.output": "run_expert", "attention.output": "attention",
    }  # fmt: skip
    by_name = {step.name: step.taps for step in steps}
    assert [tap for tap, name in belongs.items() if tap not in by_name[name]] == []


# ---- equations


def equation_of(source: str) -> list[str]:
    """The lines of the equation of a function."""
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    return equations(Function("example.py", node, source, 1)).splitlines()[1:-1]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("(a + b) * c", r"\left( a + b \right) \cdot c"),
        ("a - (b - c)", r"a - \left( b - c \right)"),
        ("a - b - c", r"a - b - c"),
        ("a * b + c", r"a \cdot b + c"),
        ("(a + b) / (c + 1)", r"\frac{a + b}{c + 1}"),
        ("ops.sqrt(a * a)", r"\sqrt{a \cdot a}"),
        ("ops.linear(a + b, w)", r"\left( a + b \right) \; w^{\mathsf T}"),
        ("ops.sum(a, axis=-1)", r"\sum_{D} a"),
        ("ops.sum(a + b, axis=0) * c", r"\sum_{T} \left( a + b \right) \cdot c"),
        ("a[:, None] * b", r"a \cdot b"),
        ("a[..., :n]", r"a_{\ldots, :n}"),
        ("a / a.shape[-1]", r"\frac{a}{D}"),
        ("h // (m // n)", r"\left\lfloor \frac{h}{\left\lfloor \frac{m}{n} \right\rfloor} \right\rfloor"),
        ("ops.tap('x', a.reshape(2, 3))", "a"),
        ("ops.where(c, a, 0.0)", r"\left( a \text{ where } c \text{, else } 0 \right)"),
    ],
)
def test_an_equation_says_what_the_code_says(expression: str, expected: str) -> None:
    assert equation_of(f'def f(a):\n    """Do.\n\n    a: [T, D]\n    """\n    return {expression}') == [
        rf"\text{{result}} &= {expected}"
    ]


def test_branches_and_loops_are_lines_of_an_equation() -> None:
    loop = "    for i in range(n):\n        b[i] = a\n"
    source = f"def f(a, n):\n{loop}    if n is None:\n        c = a\n    else:\n        c = b\n"
    assert equation_of(source) == [
        r"\text{for each } i &\in 0 \ldots n - 1 \\", r"\quad b_{i} &= a \\", r"\text{if } n = \text{none} & \\",
        r"\quad c &= a \\", r"\text{otherwise} & \\", r"\quad c &= b",
    ]  # fmt: skip


def test_code_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule"):
        equation_of("def f(a):\n    return [b for b in a]")


# ---- shapes


def test_shapes_have_the_numbers_of_the_published_model() -> None:
    """Jiang et al. 2024, table 1: dim 4096, head_dim 128, hidden_dim 14336, 8 experts, 2 per token, 32000 tokens."""
    assert numbers("gate [n, F], [T, k, D]") == "gate [n, 14336], [T, 2, 4096]"
    assert numbers("two of [T, d/2]") == "two of [T, 64]"
    assert numbers("[H d, D], [T, V], [E, D]") == "[4096, 4096], [T, 32000], [8, 4096]"


def test_every_shape_that_a_docstring_states_is_the_shape_of_the_values(steps: list[Page], worked: Example) -> None:
    config = worked.case.config
    sizes = {letter: getattr(config, field) for letter, field in SIZES.items()}
    sizes |= {"T": len(worked.run.tokens), "S": len(worked.run.tokens), "d/2": config.head_dim // 2}
    compared, wrong = 0, []
    for function in (each for step in steps for each in step.functions if each.name in worked.values):
        for value in worked.values[function.name]:
            axes = function.axes(value.name.replace("result", "returns"))
            known = [(sizes[axis], size) for axis, size in zip(axes, value.array.shape, strict=False) if axis in sizes]
            compared += len(known)
            if axes and ((len(axes) != value.array.ndim and "..." not in axes) or any(a != b for a, b in known)):
                wrong.append((function.name, value.name, axes, value.array.shape))
    assert wrong == []
    assert compared > 60


# ---- the worked example, by arithmetic of its own


def exact(worked: Example, function: str, name: str) -> list[list[Fraction]]:
    """The rows of a value, as the rational numbers that its binary64 numbers are."""
    value = value_of(worked, function, name)
    return [[Fraction(x) for x in row] for row in value.array.reshape(-1, value.array.shape[-1]).tolist()]


def value_of(worked: Example, function: str, name: str) -> Value:
    return next(each for each in worked.values[function] if each.name == name)


def decimal(x: Fraction) -> Decimal:
    return Decimal(x.numerator) / Decimal(x.denominator)


def close(found: Fraction, expected: Decimal | Fraction, scale: float = 1.0) -> bool:
    """Within a few roundings of binary64."""
    return (
        abs(float(decimal(found) - (decimal(expected) if isinstance(expected, Fraction) else expected))) < 4e-16 * scale
    )


def test_the_worked_norm_follows_its_clauses(worked: Example) -> None:
    """NORM-1 to NORM-3, in decimal arithmetic of 50 digits."""
    x, (gain,), result = (exact(worked, "rms_norm", name) for name in ("x", "gain", "result"))
    eps = Fraction(value_of(worked, "rms_norm", "eps").array.item())
    with localcontext() as context:
        context.prec = 50
        for row, scaled in zip(x, result, strict=True):
            root = decimal(sum(a * a for a in row) / len(row) + eps).sqrt()
            assert all(close(s, decimal(a * g) / root, 2) for a, g, s in zip(row, gain, scaled, strict=True))


def test_the_worked_expert_follows_its_clauses(worked: Example) -> None:
    """EXPERT-1 and EXPERT-2."""
    w1, w2, w3, x = (exact(worked, "run_expert", name) for name in ("expert.w1", "expert.w2", "expert.w3", "x"))
    gate, up, hidden, output = (exact(worked, "run_expert", n)[0] for n in ("gate", "up", "hidden", "result[3]"))
    with localcontext() as context:
        context.prec = 50
        for matrix, rows, found in ((w1, x[0], gate), (w3, x[0], up), (w2, hidden, output)):
            for row, value in zip(matrix, found, strict=True):
                assert close(value, sum((a * b for a, b in zip(row, rows, strict=True)), Fraction()), 8)
        for g, u, h in zip(gate, up, hidden, strict=True):
            assert close(h, decimal(g * u) / (1 + (-decimal(g)).exp()), 8)


def test_the_worked_router_follows_its_clauses(worked: Example) -> None:
    """ROUTE-1 to ROUTE-4."""
    x, router, logits = (exact(worked, "route", name) for name in ("x", "router", "logits"))
    chosen = value_of(worked, "route", "chosen").array.tolist()
    weights = exact(worked, "route", "result[1]")
    with localcontext() as context:
        context.prec = 50
        for row, of_row, experts, shares in zip(x, logits, chosen, weights, strict=True):
            for expert, logit in zip(router, of_row, strict=True):
                assert close(logit, sum((a * b for a, b in zip(row, expert, strict=True)), Fraction()), 8)
            assert experts == sorted(range(len(of_row)), key=lambda e: (-of_row[e], e))[: len(experts)]
            weight = [(decimal(of_row[e]) - decimal(of_row[experts[0]])).exp() for e in experts]
            assert all(close(share, each / sum(weight)) for share, each in zip(shares, weight, strict=True))


def test_the_worked_combination_follows_its_clause(worked: Example) -> None:
    """COMBINE-1."""
    outputs = value_of(worked, "combine", "outputs").array
    weights, result = (exact(worked, "combine", name) for name in ("weights", "result"))
    for token, row in enumerate(result):
        parts = [[Fraction(value) for value in slot] for slot in outputs[token].tolist()]
        for column, value in enumerate(row):
            total = sum((w * slot[column] for w, slot in zip(weights[token], parts, strict=True)), Fraction())
            assert close(value, total, 8)


def test_the_worked_attention_follows_its_clauses(worked: Example) -> None:
    """ATTN-1 to ATTN-5, one element at a time."""
    q, k, v, context = (value_of(worked, "attend", name).array for name in ("q", "cache.k", "cache.v", "context"))
    tokens, heads, size = q.shape
    for t in range(tokens):
        for h in range(heads):
            keys = [k[s, h // (heads // k.shape[1])].tolist() for s in range(t + 1)]
            scores = [sum(a * b for a, b in zip(q[t, h].tolist(), key, strict=True)) / size**0.5 for key in keys]
            weight = np.exp(np.array(scores) - max(scores))
            mixed = weight / weight.sum() @ v[: t + 1, h // (heads // k.shape[1])]
            assert np.abs(mixed - context[t, h]).max() < 4e-15


def test_the_page_shows_these_values(built: tuple[Path, str], worked: Example) -> None:
    """All exact values of a page are those of the step, so that a reader needs no program."""
    text = (built[0] / "docs" / "book" / "steps" / "route.html").read_text(encoding="utf-8")
    blocks = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    plain = [unescape(re.sub(r"<[^>]+>", "", block)).strip() for block in blocks]
    shown = [json.loads(block) for block in plain if re.fullmatch(r"\[[^=]*\]", block)]
    for name in ("x", "router", "logits"):
        assert value_of(worked, "route", name).array.tolist() in shown
