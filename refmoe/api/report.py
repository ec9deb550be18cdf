# SPDX-License-Identifier: Apache-2.0
"""The result of a verification, as a person and a program read it."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refmoe.api.arguments import kind, name_of, writable_file
from refmoe.api.files import write_text
from refmoe.engines.scaffold.ci import check_source
from refmoe.errors import InputError
from refmoe.files.parsing import strict_json
from refmoe.verifier.findings import CONFORMANT, Check, Explanation, Power
from refmoe.verifier.findings import Report as Findings

if TYPE_CHECKING:
    from refmoe.report.sources import Sources


class Report:
    """The verdict about an engine, with everything that led to it.

    Its truth value is conformance: it is false when the engine is wrong, and when it cannot be judged. `str` gives the
    text that the command line prints; a notebook shows the page.

    >>> import refmoe
    >>> model = refmoe.load("walking-skeleton")
    >>> right = model.run([1, 31, 41], dtype="float32")
    >>> report = refmoe.verify(right, model, policy="float32")
    >>> bool(report), report.verdict
    (True, 'conformant')
    """

    def __init__(self, findings: Findings) -> None:
        if not isinstance(findings, Findings):
            raise InputError(f"Report: is made of {kind(findings)}, but refmoe.verify makes reports")
        self.findings = findings

    @property
    def verdict(self) -> str:
        """``conformant``, ``not conformant`` or ``cannot judge``."""
        return self.findings.verdict

    @property
    def policy(self) -> str:
        """The name of the policy."""
        return self.findings.policy

    @property
    def power(self) -> Power | None:
        """The known bugs that these taps would show at this dtype, as measured on golden cases."""
        return self.findings.power

    @property
    def first_wrong_step(self) -> Check | None:
        """The first failed check in order of computation, with its run, tap, reason and worst element."""
        wrong = self.findings.first_wrong
        return None if wrong is None else self.findings.check(*wrong)

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        """The known bugs and structures that explain the failure, the best first. Empty if none does."""
        return self.findings.explanations or ()

    @property
    def checks(self) -> tuple[Check, ...]:
        """Every check, in order of computation."""
        return self.findings.checks

    @property
    def notes(self) -> tuple[str, ...]:
        """The limits of this verification, a sentence each."""
        return self.findings.notes

    def __bool__(self) -> bool:
        return self.findings.verdict == CONFORMANT

    def __str__(self) -> str:
        from refmoe.report.terminal import SafeConsole
        from refmoe.report.verification import print_report

        text = io.StringIO()
        print_report(self.findings, SafeConsole(file=text, width=100, color_system=None))
        return text.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        return f"<refmoe.Report {self.findings.headline}>"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style does not change the notebook's.

        Where the extra ``html`` is not installed, the text.
        """
        from html import escape

        try:
            page = self._page()
        except InputError:
            return f"<pre>{escape(str(self))}</pre>"
        return (
            f'<iframe title="refmoe report" sandbox="allow-scripts" style="width:100%;height:40rem;border:0" '
            f'srcdoc="{escape(page, quote=True)}"></iframe>'
        )

    def _page(self) -> str:
        from refmoe.report.html import to_html

        return to_html(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All findings as plain values, as ``refmoe verify --json`` prints them."""
        from refmoe.report.verification_json import to_json

        values: dict[str, Any] = strict_json(to_json(self.findings))
        return values

    def html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs no network. Raises InputError when it cannot be written."""
        write_text(writable_file(path, "html"), self._page())

    def junit(self, path: str | os.PathLike[str]) -> None:
        """Write JUnit XML. Raises InputError when it cannot be written."""
        from refmoe.report.junit import to_junit

        write_text(writable_file(path, "junit"), to_junit(self.findings))

    def sarif(
        self, path: str | os.PathLike[str], sources: Sequence[str], refmoe_from: str | None = None
    ) -> None:  # fmt: skip
        """Write SARIF 2.1.0, by which GitHub and editors show the first wrong step at a line of source.

        sources: each ``STEP=FILE:PLACE``, or ``FILE:PLACE`` for all other steps. PLACE is the number of a line, or a
            text in it. FILE is relative to the current folder.
        refmoe_from: ``OWNER/REPOSITORY[@REF]`` of refmoe on GitHub, for links to the specification.
        Raises InputError for a place that does not exist, and when the file cannot be written.
        """
        from refmoe.report.verification_sarif import verification_sarif

        target, places = writable_file(path, "sarif"), check_places(sources, refmoe_from)
        write_text(target, verification_sarif(self.findings, places, refmoe_from))


def check_places(sources: Sequence[str], refmoe_from: str | None) -> Sources:
    """The places of alerts, as for `Report.sarif`. Raises InputError for one that does not exist."""
    from refmoe.report.sources import read_sources

    if not isinstance(sources, list | tuple):
        raise InputError(f"sources: is {kind(sources)}, but a list of texts was expected, each STEP=FILE:PLACE")
    for each in sources:
        name_of(each, "sources", "STEP=FILE:PLACE or FILE:PLACE")
    if refmoe_from is not None:
        check_source(name_of(refmoe_from, "refmoe_from", "OWNER/REPOSITORY"))
    return read_sources(sources, ())
