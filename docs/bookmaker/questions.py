# SPDX-License-Identifier: Apache-2.0
"""An auditor's ten questions, from ``questions.toml``. Each answer is made of links to the evidence."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from docs.bookmaker.evidence import Evidence
from docs.bookmaker.markdown import link, page, sentence, text
from docs.bookmaker.step_pages import bug_link, case_link
from refmoe.bugs.catalogue import MUTANTS

QUESTIONS = Path(__file__).with_name("questions.toml")
REFERENCE = re.compile(r"\{(clause|bug|case|page):([^}|]+)(?:\|([^}]+))?\}")


def questions_page(every: Evidence) -> str:
    """The page of questions. Raises KeyError for a clause or a bug that does not exist."""
    asked = tomllib.loads(QUESTIONS.read_text(encoding="utf-8"))["question"]
    return page(
        f"# An auditor's {NUMBERS.get(len(asked), len(asked))} questions",
        "The first link of each answer leads to the evidence.",
        *(part for each in asked for part in (f"## {each['ask']}", answer(each["answer"], every))),
    )


NUMBERS = {10: "ten"}


def answer(words: str, every: Evidence) -> str:
    """An answer with its references as links."""

    def expanded(match: re.Match[str]) -> str:
        kind, name, label = match.groups()
        if kind == "clause":
            return f"{link(name, f'clauses/{name}.md')}: *{text(every.clauses[name].text)}*"
        if kind == "bug":
            cases = every.killing(name)
            return f"{bug_link(MUTANTS[name])} is caught by {sentence(len(cases), 'case')}. {text(MUTANTS[name].about)}"
        return case_link(every, name) if kind == "case" else link(label, name)

    return REFERENCE.sub(expanded, " ".join(words.split()))
