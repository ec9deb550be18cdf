# SPDX-License-Identifier: Apache-2.0
"""``refmoe evidence``: write an evidence package, and check one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from refmoe.api.evidence import (
    CERTIFICATES,
    CHECKS,
    SOME,
    Verification,
    Wanted,
    figure,
    verification_facts,
    verify_evidence,
    write_evidence,
)
from refmoe.cli.guard import OUTPUT_FOLDER, GuardedCommand
from refmoe.cli.options import PATH, golden_option, json_option, progress_bar
from refmoe.cli.sections import Sections
from refmoe.report.json_text import json_text
from refmoe.report.neutral import sentence

FAULTY, INCOMPLETE = 1, 3
MOST = 20
"""The most faults of a check that are printed; --json has all."""


class WriteOrVerify(Sections):
    """The group, in which a folder stands for the command that writes it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name of the command before a first word that is none."""
        if args and args[0] not in self.members() and args[0] not in ctx.help_option_names:
            args = ["write", *args]
        return super().parse_args(ctx, args)


@click.group(
    "evidence", cls=WriteOrVerify, short_help="Write the evidence of a run as a package, or check such a package."
)
def evidence_command() -> None:
    """The results of an engine as a package that another machine checks without the engine.

    \b
    refmoe conform --adapter my_engine.py --out results.json --keep traces
    refmoe evidence package --engine results.json --traces traces
    refmoe evidence verify package
    """


@click.command("write", cls=GuardedCommand, short_help="Write a package (the name may be left out).")
@click.argument("folder", type=OUTPUT_FOLDER, metavar="DIR")
@click.option(
    "--engine", "results", type=PATH, metavar="RESULTS", required=True, help="The file of refmoe conform --out."
)
@click.option("--traces", type=PATH, metavar="DIR", required=True, help="The folder of refmoe conform --keep.")
@golden_option
@click.option(
    "--policy", "policies", multiple=True, metavar="POLICY",
    help="The file of a policy of your own by which the run was judged (TOML); repeatable.",
)  # fmt: skip
@click.option("--build", metavar="TEXT", default="", help="The build of the engine, in your words.")
@click.option(
    "--artifact", "artifacts", type=PATH, multiple=True, metavar="FILE",
    help="A file of the engine, whose digest is recorded; repeatable.",
)  # fmt: skip
@click.option("--date", metavar="YYYY-MM-DD", show_default="today, in UTC", help="The date of the package.")
@click.option(
    "--key", type=PATH, metavar="FILE",
    help="Sign with this Ed25519 key (PEM), as openssl genpkey -algorithm ed25519 writes it.",
)  # fmt: skip
@json_option
def write_command(folder: Path, as_json: bool, **options: Any) -> None:
    """Write the evidence of a run into DIR: inputs, documents, pages, bill of materials, statement, digests.

    \b
    refmoe evidence write package --engine results.json --traces traces
    refmoe evidence package --engine results.json --traces traces --build "gcc 14.2" --artifact engine.so --key me.pem

    Each trace is judged again on the way. DIR has to be new or empty. Equal input and an equal date give equal bytes.
    Needs the extra 'evidence'.
    """
    facts = write_evidence(folder, Wanted(**options), progress_bar)
    if as_json:
        click.echo(json_text(facts))
        return
    signed = "signed" if facts["signed"] else "not signed"
    click.echo(f"{folder}: {facts['result']}, {len(facts['files'])} files, {signed}")
    for dtype, end in facts["end_to_end"].items():
        total, accepted = (figure(value) for value in (end["total"], end["from_tokens"]["accepted"]))
        click.echo(f"{dtype}: logits within {total} of the real numbers; a pass accepts {accepted} from the tokens on")
    click.echo(f"read {folder / 'report.md'}, and check it: refmoe evidence verify {folder}")


@click.command("verify", cls=GuardedCommand, short_help="Check a package, without the engine.")
@click.argument("folder", type=PATH, metavar="DIR")
@golden_option
@click.option("--key", type=PATH, metavar="FILE", help="The public key (PEM) that must have signed.")
@click.option(
    "--certificates", type=click.Choice(CERTIFICATES), default=SOME, show_default=True,
    help="The certificates to prove again: some are those of small cases. python-flint does it.",
)  # fmt: skip
@json_option
@click.pass_context
def verify_command(
    context: click.Context, folder: Path, golden: Path, key: Path | None, certificates: str, as_json: bool
) -> None:
    """Check the package in DIR: digests, signature, goldens, verdicts and all documents are derived again.

    \b
    refmoe evidence verify package
    refmoe evidence verify package --key their-public-key.pem --json

    Without --key, a signature shows only that nobody without its key has changed the package since. A certificate that
    is not proven again is compared with that of this refmoe's suite; a note says which and why.

    Exit status 0: nothing is wrong. 1: something is, and each line names the file. 3: nothing is wrong, but this
    refmoe could not compare all of it, because another version wrote it.
    """
    found = verify_evidence(folder, golden, key, progress_bar, certificates)
    if as_json:
        click.echo(json_text(verification_facts(found)))
    else:
        print_verification(found)
    context.exit(FAULTY if found.faults else INCOMPLETE if found.unchecked else 0)


def print_verification(found: Verification) -> None:
    """Print a line per check, its faults, and who signed."""
    for each in found.checks:
        click.echo(f"{'FAIL' if each.faults else 'skip' if each.skipped else 'ok  '}  {CHECKS[each.name]}")
        for fault in each.faults[:MOST]:
            click.echo(f"      {sentence(fault)}")
        if len(each.faults) > MOST:
            click.echo(f"      and {len(each.faults) - MOST} more; --json has all")
    for what, lines in (("open", found.unchecked), ("note", found.notes)):
        for line in lines:
            click.echo(f"{what}  {sentence(line)}")
    if found.signed_by:
        whose = "the key that you named" if found.trusted else "a key in the package, which you may compare"
        click.echo(f"signed by {found.signed_by}, {whose}")
    rest = ", but not all of it could be compared" if found.unchecked else ""
    click.echo(f"{len(found.faults)} faults" if found.faults else f"nothing is wrong{rest}")


assert isinstance(evidence_command, Sections)
evidence_command.section("Commands", write_command, verify_command)
