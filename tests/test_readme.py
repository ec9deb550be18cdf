"""README.md is true: its commands run and print what it shows, its figures are those of the files that it names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from refmoe.conditions import CONDITIONS
from refmoe.golden import find_cases
from tests.tour import console, run_tour

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results"


def results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


@pytest.mark.engines
def test_the_tour_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "golden", tmp_path / "golden")
    assert len(console(TEXT)) == 7
    run_tour(TEXT, tmp_path)


def test_the_main_command_is_made_of_commands_that_are_tested() -> None:
    """What follows the installation; the tour and the tests of the command line run each of them."""
    (line,) = re.findall(r"<!-- main -->\n```bash\n(.*)\n```", TEXT)
    install, check, capture, verify = line.split(" && ")
    assert install == "python -m pip install -e '.[engines]'"
    assert check == "refmoe check"
    assert capture.startswith("refmoe capture --case walking-skeleton")
    assert verify == "refmoe verify engine.safetensors"


def test_the_figures_of_the_goldens() -> None:
    folders = find_cases(ROOT / "golden")
    size = sum(path.stat().st_size for path in (ROOT / "golden").rglob("*") if path.is_file())
    assert f"{len(folders)} small models, {size / 1e6:.1f} MB" in TEXT
    assert f"the {len(CONDITIONS)} conditions" in TEXT
    certificates = [json.loads((folder / "manifest.json").read_bytes())["certificate"] for folder in folders]
    worst = max(certificate["worst"]["relative"] for certificate in certificates)
    assert f"the worst bound is {worst:.1e}" in TEXT.replace("e-14", "e-14")


def test_the_table_of_digests() -> None:
    table = results("invariance.json")
    exact, plain = table["digests"]["exact"], table["digests"]["float64"]
    assert f"| **different digests in {len(table['settings'])} settings** | **{exact}** | **{plain}** |" in TEXT
    for row in table["settings"]:
        assert f"| `{row['exact'][:8]}` | `{row['float64'][:8]}` |" in TEXT


def test_the_table_of_costs() -> None:
    for name, found in results("exact_cost.json").items():
        assert f"| {name} | {found['ratio']:.1f} |" in TEXT


def test_the_table_of_accuracy() -> None:
    for row in results("elementary_accuracy.json"):
        assert f"| {row['function']} | {row['max_ulp']:.4f} | {row['not_nearest']:,} of {row['arguments']:,} |" in TEXT


def test_the_table_of_what_verifying_costs() -> None:
    table = results("verify_cost.json")
    for what in {row["what"] for row in table}:
        ratios = {row["policy"]: f"{row['ratio']:.1f}" for row in table if row["what"] == what}
        cells = " | ".join(ratios[name] for name in ("float32", "bfloat16", "float16", "float64"))
        assert f"| {what} | {cells} |" in TEXT


def test_the_table_of_what_the_verifier_sees() -> None:
    found = results("enclosures.json")
    assert f"(limit {found['limit']:.1f} here" in TEXT
    rows = re.findall(r"\| (.*) \| (\d+% / [\d,]+|-) \| (\d+% / [\d,]+|-) \| (\d+% / [\d,]+|-) \|\n", TEXT)
    assert len(rows) >= 4
    for fault, *cells in rows:
        for dtype, cell in zip(("bfloat16", "float16", "float32"), cells, strict=True):
            seen = found["faults"][fault].get(f"{dtype} 14336")
            assert cell == ("-" if seen is None else f"{seen['outside']:.0%} / {seen['excess']:,.0f}")
