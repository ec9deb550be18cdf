"""``refmoe certify``: a proven bound for every golden value."""

from __future__ import annotations

import json
from pathlib import Path

import click

from refmoe import suite as golden
from refmoe.cli.options import GOLDEN, PATH, jobs_option, json_option, progress_bar
from refmoe.parallel import results
from refmoe.suite.certify import Certificate, certify


@click.command("certify", short_help="Prove how close every golden is to the real numbers.")
@click.argument("folder", type=PATH, default=GOLDEN, required=False)
@jobs_option
@json_option
def certify_command(folder: Path, jobs: int | None, as_json: bool) -> None:
    """Run every golden case below FOLDER (default: golden) in ball arithmetic (Arb), which encloses the real numbers.

    \b
    refmoe certify
    refmoe certify golden/walking-skeleton --json

    Each manifest gets a certificate: per tap a proven bound on |golden - real value|, and the routing decisions that
    are not proven. Needs the extra 'certify' (python-flint).
    """
    folders = golden.find_cases(folder)
    found: dict[Path, Certificate] = {}
    with progress_bar("certify", len(folders)) as advance, results(certify_folder, folders, jobs) as certified:
        for path, certificate in certified:
            found[path] = certificate
            advance()
    named = {path.resolve().name: found[path] for path in folders}
    if as_json:
        click.echo(json.dumps({name: certificate.to_json() for name, certificate in named.items()}))
        return
    for name, certificate in named.items():
        key = max(certificate.relative, key=lambda tap: certificate.relative[tap])
        proven = certificate.decisions - len(certificate.unproven)
        click.echo(
            f"{name}: every value within {certificate.relative[key]:.2e} of its tap's RMS (worst: {key}); "
            f"{proven} of {certificate.decisions} routing decisions proven"
        )


def certify_folder(path: Path) -> Certificate:
    """Certify the case in a folder and write the certificate into its manifest."""
    manifest = golden.read_manifest(path)
    certificate = certify(golden.read_case(path))
    golden.write_manifest(path, manifest | {"certificate": certificate.to_json()})
    return certificate
