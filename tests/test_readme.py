"""README.md is true: its commands run and print what it shows, its figures are those of the files that it names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.engines.results import SKIPPED, read_results
from refmoe.suite import find_cases, find_full_size_cases
from refmoe.suite.conditions import CONDITIONS
from refmoe.suite.matrix.file import read_matrix
from refmoe.suite.matrix.outcomes import POLICIES
from refmoe.suite.matrix.summary import summarise
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT
from tests.tour import console, run_tour

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results"


def results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


@pytest.mark.engines
def test_the_tour_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "golden", tmp_path / "golden")
    assert len(console(TEXT)) == 8
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
    assert f"{len(folders)} small models and two of full size, {size / 1e6:.1f} MB" in TEXT
    assert len(find_full_size_cases(ROOT / "golden")) == 2
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


def test_the_figures_of_full_size() -> None:
    found = results("full_size.json")
    for tokens in (8, 256):
        for run in found[f"two_layers_{tokens}_tokens"]:
            assert run["peak_gib"] <= run["stated_gib"] <= run["goal_gib"]
            share = f"{run['matmul_share']:.0%}" if run["matmul_share"] else "-"
            assert (
                f"| {run['dtype']}, {tokens} + 2 tokens | {run['peak_gib']:.2f} | {run['stated_gib']:.2f} | "
                f"{run['read_over_needed']:.3f} | {share} | {run['seconds']:.0f} s |"
            ) in TEXT
    whole, text = found["whole"], " ".join(TEXT.split())
    assert whole["ok"]
    assert f"{whole['seconds'] / 60:.0f} minutes on two cores, {whole['peak_of_a_process_gib']:.1f} GiB" in text


def test_the_table_of_speed() -> None:
    found = results("peers.json")
    best = {}
    for model, name in (("middle", "dim 512, 4 layers, hidden 1792, vocab 4096"), ("8x7B layer", "one layer of 8x7B")):
        for phase in ("prefill", "decode"):
            for ours, blas in (("refmoe numpy", "NumPy"), ("refmoe mkl", "oneMKL")):
                row = found[model][phase][ours]
                peers = ("transformers eager", "transformers grouped_mm", "llama.cpp")
                cells = " | ".join(f"{row['speed_against'][peer]:.2f}" for peer in peers)
                assert f"| {name} | {phase} | {blas} | {cells} | {row['share_of_matmul']:.0%} |" in TEXT
                best[ours, phase, model] = row["speed_against_best"] >= found[model][phase]["goal"]
    assert "With oneMKL all four reach the goal" in TEXT
    assert all(reached for (ours, *_), reached in best.items() if ours == "refmoe mkl")
    float32 = results("peers_float32.json")
    assert float32["stored"] == "float32"
    prefill, decode = (float32["middle"][phase]["refmoe mkl"]["speed_against_best"] for phase in ("prefill", "decode"))
    assert f"oneMKL gives {prefill:.2f} of the best in prefill and {decode:.2f} in decode" in " ".join(TEXT.split())


def test_the_table_of_known_bugs() -> None:
    matrix = read_matrix(ROOT / "golden" / "matrix.json")
    summary = summarise(matrix, matrix.cases)
    assert f"{len(MUTANTS)} bugs that implementations" in TEXT
    assert f"The {summary.outside} bugs of tokenizer, sampler and losses are all caught" in TEXT
    for policy in POLICIES:
        unseen = ", ".join(f"`{name}`" for name in summary.unseen[policy]) or "none"
        assert f"| {policy} | {summary.killed[policy]} of {summary.mutants} | {unseen} |" in TEXT


def test_the_figures_of_diagnosis() -> None:
    found, text = results("diagnosis.json"), " ".join(TEXT.split())
    assert f"named first for {found['named_first']} of {found['engines_with_a_known_bug']}" in text
    assert f"of {found['engines_with_another_bug']} other faults {found['given_a_wrong_name']} are given" in text
    assert f"{found['healthy_given_a_name']} of {found['healthy']} healthy engines" in text


def test_the_table_of_engines() -> None:
    files = sorted((RESULTS / "conform").glob("*.json"))
    assert len(files) >= 5
    for file in files:
        engine = read_results(file).engine
        options = "".join(f" {key}={value}" for key, value in engine.options.items())
        for dtype in dict.fromkeys(each.dtype for each in read_results(file).outcomes):
            verdicts = [each.verdict for each in read_results(file).outcomes if each.dtype == dtype]
            assert len(verdicts) == len(find_cases(ROOT / "golden"))
            kinds = (CONFORMANT, NOT_CONFORMANT, CANNOT_JUDGE, SKIPPED)
            cells = " | ".join(str(verdicts.count(kind)) for kind in kinds)
            assert f"| {engine.name} {engine.version}{options} | {dtype} | {cells} |" in TEXT
