# SPDX-License-Identifier: Apache-2.0
"""All measurements on one page, from the files that the benchmarks wrote.

    python -m bench.measurements            # writes docs/measurements.md and the measured blocks of README.md
    python -m bench.measurements --check    # fails when a page is not current

The sources are `bench/results/`, `golden/matrix.json` and the manifests of the cases. No figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.cluster_plan import Rates, layer_bytes, plans, trace_bytes
from bench.quantised_bugs import LIMITS, passes
from bench.quantised_bugs import TOKENS as GENERATED
from refmoe.bugs.catalogue import MUTANTS
from refmoe.engines.process import CRASHED
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Results, read_results
from refmoe.engines.server.measure import SPECIFICATION
from refmoe.engines.server.power import LEVELS
from refmoe.files.markdown import table
from refmoe.spec.config import PRESETS
from refmoe.suite import find_cases, find_full_size_cases
from refmoe.suite.conditions import CONDITIONS
from refmoe.suite.matrix.file import read_matrix
from refmoe.suite.matrix.outcomes import POLICIES
from refmoe.suite.matrix.summary import Summary, summarise
from refmoe.suite.pack.sizes import table as pack_sizes
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT
from refmoe.verifier.tally import ROWS

ROOT = Path(__file__).parents[1]
RESULTS, GOLDEN = ROOT / "bench" / "results", ROOT / "golden"
PAGE, README = ROOT / "docs" / "measurements.md", ROOT / "README.md"
BLOCK = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A block of README.md that this program fills."""
LONGEST = 14336
"""The number of terms in the products of an expert of Mixtral 8x7B."""
FAULTS = ("one term dropped", "last 32 dropped", "float16 accumulator, per 32", "TF32 inputs")
DTYPES = ("bfloat16", "float16", "float32")
MODELS = {"middle": "dim 512, 4 layers, hidden 1792, vocab 4096", "8x7B layer": "one layer of 8x7B"}
PRODUCTS = {"refmoe numpy": "NumPy", "refmoe mkl": "oneMKL"}
PEERS = ("transformers eager", "transformers grouped_mm", "llama.cpp")


def results(name: str) -> Any:
    """The content of a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _measured(name: str) -> bool:
    """Whether there is a file of results."""
    return (RESULTS / f"{name}.json").exists()


def link(*names: str) -> str:
    """Links to files of results, by name."""
    return ", ".join(f"[`bench/results/{name}`](../bench/results/{name})" for name in names)


# ---- the sections, each a text in Markdown


def goldens() -> str:
    small, full = find_cases(GOLDEN), find_full_size_cases(GOLDEN)
    size = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file())
    certificates = [json.loads((folder / "manifest.json").read_bytes())["certificate"] for folder in small]
    worst = max(certificate["worst"]["relative"] for certificate in certificates)
    rows = [
        ("cases with a small model", f"{len(small)}"),
        ("cases at full size, as fingerprints", f"{len(full)}"),
        ("conditions that some case fulfils", f"{len(CONDITIONS)}"),
        ("size of all files", f"{size / 1e6:.1f} MB"),
        ("worst proven distance from the real number, relative to the RMS of the tap", f"{worst:.1e}"),
    ]
    return f"""## The goldens

[`golden/CASES.md`](../golden/CASES.md) has every case and the conditions that it fulfils. `refmoe suite certify` proves
the distances. A routing decision that is not proven is an exact tie, made on purpose.

{table(("goldens", ""), rows)}"""


def summary() -> Summary:
    """The matrix of known bugs and cases in short."""
    matrix = read_matrix(GOLDEN / "matrix.json")
    return summarise(matrix, matrix.cases)


def known_bugs() -> str:
    found = summary()
    rows = [
        (
            policy,
            f"{found.killed[policy]} of {found.mutants}",
            ", ".join(f"`{name}`" for name in found.unseen[policy]) or "none",
        )
        for policy in POLICIES
    ]
    return f"""## Known bugs that the cases catch

The catalogue has {len(MUTANTS)} bugs that implementations really had.
A forward pass can show {found.mutants} of them. Each of these is run on
every case in three dtypes. It is judged as if it were somebody's engine (`refmoe mutants matrix`,
[`golden/matrix.json`](../golden/matrix.json)). The specification itself runs beside them,
with {_no(len(found.false_alarms))} failures.

{table(("dtype", "caught", "hidden by the dtype itself"), rows)}

The other {found.outside} are bugs of tokenizers, samplers and losses. The vectors catch
{found.outside - len(found.outside_alive)} of them."""


def packs() -> str:
    sizes = pack_sizes()
    rows = [
        (
            f"{name}, {len(each.cases)} cases",
            f"{each.bytes / 1e3:,.0f} kB",
            *(f"{each.seen[policy]} of {each.seen[policy] + len(each.unseen[policy])}" for policy in POLICIES),
            *(_share(each.judged[policy] / each.values[policy]) for policy in POLICIES),
        )
        for name, each in sizes.items()
    ]
    head = ["size", "files", *(f"seen, {policy}" for policy in POLICIES), *(f"judged, {policy}" for policy in POLICIES)]
    unseen = ", ".join(f"`{name}`" for name in sizes["standard"].unseen["float32"])
    apart = {name for name, each in MUTANTS.items() if "QUANT" in each.needs or each.judged_by}
    never = ", ".join(f"`{name}`" for name in sizes["full"].unseen["float32"] if name in apart)
    return f"""## What a pack sees

A pack has intervals, and no values of the engine (`refmoe suite pack`). Each known bug was planted into the
specification, and its values were held against the intervals (`python -m bench.pack`, {link("pack.json")}).
The second number of a pair is that of `refmoe verify`, on all cases. Shares are those of values with an interval.

{table(head, rows)}

In float32, the standard pack does not see {unseen}.

No pack shows {never}. Their faults are in quantised weights, which a pack does not have, or they break a rule that some
engines alone have."""


def _no(number: int) -> str:
    return str(number or "no")


def diagnosis() -> str:
    found = results("diagnosis")
    rows = [
        ("engines with a bug of the catalogue", f"{found['engines_with_a_known_bug']}", "named first",
         f"{found['named_first']}"),
        ("engines with another fault", f"{found['engines_with_another_bug']}", "given a wrong name",
         f"{found['given_a_wrong_name']}"),
        ("healthy engines", f"{found['healthy']}", "given a name", f"{found['healthy_given_a_name']}"),
    ]  # fmt: skip
    return f"""## Known bugs that are named

Each bug is patched into `transformers`, which is then run in bfloat16 and verified.
Command: `python -m bench.diagnosis`; file: {link("diagnosis.json")}.

{table(("engines", "number", "of these", "number"), rows)}"""


def diagnosis_time() -> str:
    found = results("diagnosis_time")
    columns = {"traces": "traces", "median_processor": "median", "worst_processor": "worst", "median_ratio": "ratio"}
    rows = [(row["what"], *(str(row[key]) for key in columns)) for row in found["table"]]
    return f"""## Time of a diagnosis

Seconds of the processor for one failed trace, and the median ratio to the verification before it. A known bug runs on
the cheapest golden case that shows it. A drawn fault is patched into `transformers`.
Command: `python -m bench.diagnosis_time`; file: {link("diagnosis_time.json")}.

{table(("kind, dtype, taps", *columns.values()), rows)}"""


def left_out() -> str:
    rows = [
        (each["dtype"], each["taps"], f"{each['seen']}", f"{each['structures']}", f"{each['unnamed']}",
         f"{each['wrong']}")
        for each in results("leave-one-out")["table"]
    ]  # fmt: skip
    return f"""## Names where the right one is missing

Each bug of the catalogue is diagnosed by a catalogue without it, and without those that compute the same there. A known
bug or an arithmetic that is named then is wrong. A structure describes the error in words, and names no cause.
Command: `python -m bench.diagnosis --leave-one-out --json bench/results/leave-one-out.json`; file:
{link("leave-one-out.json")}.

{table(("dtype", "taps", "bugs seen", "described by a structure", "no name", "wrong name"), rows)}"""


def drawn_faults() -> str:
    rows = [
        (
            name.partition(", ")[0], name.rpartition("seeds ")[2], f"{each['detected']} of {each['drawn']}",
            f"{each['place_right']}", f"{each['name_right']} ({each['name_right'] / each['detected']:.0%})",
            f"{each['name_unnamed']}", f"{each['name_wrong']}",
        )
        for name, each in results("faults").items()
    ]  # fmt: skip
    return f"""## Names of faults drawn at random

A grammar of faults is drawn from by a seed. Each fault is patched into `transformers`, which then runs with all taps.
The seeds from 20000 and from 47000 were looked at while the grammar of names was written; those from 31000 and from
53000 were not. A fault that changes no stored value cannot be detected.
Command: `python -m bench.faults --seed 53000 --count 60 --dtype float32 --json bench/results/faults.json`; file:
{link("faults.json")}.

{table(("dtype", "seeds", "detected", "right place", "right name", "no name", "wrong name"), rows)}"""


def entrant(found: Results) -> str:
    """The engine with its version and options."""
    options = "".join(f" {key}={value}" for key, value in found.engine.options.items())
    return f"{found.engine.name} {found.engine.version}{options}"


KINDS = (CONFORMANT, NOT_CONFORMANT, CANNOT_JUDGE, NOT_JUDGED, SKIPPED)


def verdicts(folder: str) -> list[tuple[str, ...]]:
    """A row for each engine and dtype of a folder of results."""
    rows = []
    for file in sorted((RESULTS / folder).glob("*.json")):
        found = read_results(file)
        for dtype in dict.fromkeys(each.dtype for each in found.outcomes):
            given = [each.verdict for each in found.outcomes if each.dtype == dtype]
            rows.append((entrant(found), dtype, *(str(given.count(kind)) for kind in KINDS)))
    return rows


def engines() -> str:
    return f"""## Real engines

The number of cases with each verdict (`refmoe conform --adapter NAME --out FILE`; files:
[`bench/results/conform/`](../bench/results/conform)). `refmoe scoreboard bench/results/conform` prints the same files.
Each failure is in [`known.toml`](../bench/results/conform/known.toml) with its reason in the engine's source. `refmoe
engines NAME --install DIR` makes the environment of an engine.

{table(("engine", "dtype", *KINDS), verdicts("conform"))}

- `transformers`: one deviation. In float64, eager attention makes real tokens NaN where a batch is padded on the left
  ([finding](findings/transformers-float64-padding.md)). Grouped products of torch take rows of whole 16 bytes, so most
  small cases are skipped in two dtypes. In float16 the case `huge-activations` overflows by design, for every engine.
- vLLM: no deviation. Its attention on a CPU has heads of 32 and more.
- mistral-inference: no deviation. Its attention kernel has no CPU version and is replaced. A sequence starts at 0.
- OpenVINO: no deviation.
- llama.cpp: no deviation from its profiles. Its default is flash attention, which sums weighted values in float16 in
  calls of fewer than 64 tokens. Only `attention.context` shows it, and the source confirms it. A float16 or bfloat16
  file rounds the inputs of products. In a float16 file `huge-activations` overflows. It has no sliding window for this
  architecture.
- mlx-lm: its Mixtral has no sliding window ([finding](findings/mlx-lm-window.md)).
- litgpt: a chunk beyond the window is attended to wrongly ([finding](findings/litgpt-window.md)). A slot of its cache
  is a position, so that no sequence starts above 0.
- ibm-fms: no deviation with a cache. It has no window, and no `head_dim` of its own.
- keras-hub: in float16 and bfloat16 it rounds the factor `1 / sqrt(head_dim)` of the scores. The scores are the rounded
  dots times that factor, bit for bit. It has no `head_dim` of its own, and no start above position 0. On JAX it
  conforms in float32.
- TransformerLens: no deviation. In float64 its profile allows a table of cosines and sines that is only as precise as
  in float32 ([finding](findings/transformer-lens-float64.md)). It has no `head_dim` of its own, and no start above
  position 0.
- tinygrad: no deviation in what is between its blocks (`taps=states`), which is all that it shows of the blocks that
  it compiles. It has no window for this architecture, and no start above position 0.
- onnxruntime: no deviation from its profile, which allows a sigmoid with absolute precision
  ([finding](findings/onnxruntime-sigmoid.md)). By the profile of `transformers` only `expert.hidden` deviates.

Runs of some cases, or with a setting that excludes most of them ([`conform_some/`](../bench/results/conform_some)):

{table(("engine", "dtype", *KINDS), verdicts("conform_some"))}

- ibm-fms without a cache, as its `forward` runs by default: a prompt of as many tokens as there are key/value heads is
  wrong ([finding](findings/ibm-fms-heads.md)).
- keras-hub on JAX in other dtypes than float32: the factor of the scores is rounded, as on torch. In float16 a weight
  of the router deviates: JAX divides float16 on a CPU without correct rounding.
- tinygrad with all taps: its rotations deviate, and nothing else does ([finding](findings/tinygrad-cos.md)). Given its
  own table of cosines and sines, each rotation is right.
- `transformers` with layers that `torch.compile` compiles, or with flex attention, which it compiles too: no deviation.
- vLLM with prompts in chunks, one of them with a window: no deviation.
- OpenVINO computes in bfloat16 by default where the processor has instructions for it. It conforms to the policy of
  that dtype.

Runs of the family `production` (`--family production`;
[`conform_production/`](../bench/results/conform_production)):

{table(("engine", "dtype", *KINDS), verdicts("conform_production"))}

- Three deviations. mlx-lm has no sliding window ([finding](findings/mlx-lm-window.md)). keras-hub rounds the factor of
  the scores. In float16 a `head_dim` of 32 shows it: the scores are the rounded dots times that factor, bit for bit.
  In float64 TransformerLens makes its table anew from position 2048 on, and rotates all keys again by the other table
  ([finding](findings/transformer-lens-float64.md)).
- llama.cpp and ibm-fms skip windows. mlx-lm, ibm-fms, keras-hub and TransformerLens skip a `head_dim` that is not
  `dim / heads`. Engines with a slot for each position skip a start above position 0, and vLLM skips a cut cache. litgpt
  itself refuses a call longer than the window.
- llama.cpp, litgpt, mlx-lm, ibm-fms, mistral-inference, vLLM and `transformers` reach position 32768 from 0 without a
  deviation.
- Rows of fewer than 18 cases were not finished. `transformers` with `attention=sdpa`, onnxruntime, keras-hub and
  TransformerLens ran all cases but `production-positions-32768-decoded`.

llama.cpp with the files that people have, in float16 and bfloat16
([`conform_files/`](../bench/results/conform_files)); it conforms to the profiles of these files:

{table(("engine", "dtype", *KINDS), verdicts("conform_files"))}"""


def faults() -> str:
    found = results("enclosures")
    rows = []
    for fault in FAULTS:
        cells = [found["faults"][fault].get(f"{dtype} {LONGEST}") for dtype in DTYPES]
        rows.append((fault, *("-" if one is None else _fault(one) for one in cells)))
    return f"""## Faults that the verifier sees

One product of {LONGEST} terms, as in an expert of 8x7B. Each cell has three numbers. The first is the share of outputs
that
`numpy.allclose` accepts (`rtol` and `atol` {found["tolerance"]}). The second is the share outside the proven radius.
The third is the largest distance in standard deviations.
A distance of {found["limit"]:.1f} is the limit. A healthy engine exceeds it once in a million verifications.
Command: `python -m bench.enclosures --json bench/results/enclosures.json`; file: {link("enclosures.json")}.

{table(("fault", *DTYPES), rows)}

A radius that no legal sum can leave grows with the number of terms. At {LONGEST} terms it is wider than one term. The
second test, the distance in standard deviations, sees the fault."""


def _fault(one: dict[str, float]) -> str:
    return f"{_share(one['allclose'])} / {_share(one['outside'])} / {one['excess']:,.0f}"


def _share(value: float) -> str:
    """A share in percent, which is 0 or 100 only when it is so exactly."""
    return f"{value:.0%}" if value in (0, 1) or 0.01 <= value <= 0.99 else f"{value:.1%}"


def verify_cost() -> str:
    found = results("verify_cost")
    policies = ("float32", "bfloat16", "float16", "float64")
    ratio = {(row["what"], row["policy"]): f"{row['ratio']:.1f}" for row in found}
    rows = [(what, *(ratio[what, name] for name in policies)) for what in dict.fromkeys(row["what"] for row in found)]
    return f"""## Cost of a verification

The time of a whole verification over that of one exact run of the same calls. On the smallest models most of it is the
overhead of calls. Command: `python bench/verify_cost.py`; file: {link("verify_cost.json")}.

{table(("model", *policies), rows)}"""


def kernel_tests() -> str:
    found = results("kernel_tests")["rows"]
    usual = list(found[0]["usual"])

    def said(row: dict[str, Any], name: str) -> str:
        return "accepts" if row["usual"][name] else "rejects"

    rows = [
        (
            row["kernel"], row["mistake"] or "none", *(said(row, name) for name in usual),
            "accepts" if row["refmoe"] else f"rejects: {row['explained']}",
        )
        for row in found
    ]  # fmt: skip
    return f"""## Kernels under a tolerance and under refmoe

Three kernels with a mistake each, compared with a float32 evaluation by `torch.testing.assert_close`, and judged by
refmoe. Triton runs in its interpreter. Command: `python -m bench.kernel_tests`; file: {link("kernel_tests.json")}.

{table(("kernel", "mistake", *usual, "refmoe"), rows)}"""


def testing_cost() -> str:
    found = results("testing_cost")
    tokens = list(dict.fromkeys(row["tokens"] for row in found["rows"]))
    ratio = {(row["step"], row["tokens"]): f"{row['ratio']:.1f}" for row in found["rows"]}
    steps = dict.fromkeys(row["step"] for row in found["rows"])
    step_ms = {row["step"]: 1000 * row["numpy"] for row in found["rows"] if row["tokens"] == tokens[-1]}
    rows = [
        (step, *(ratio[step, count] for count in tokens), f"{step_ms[step]:.1f}", f"{1000 * found['least'][step]:.2f}")
        for step in steps
    ]
    sizes = ", ".join(f"{name} = {size}" for name, size in found["sizes"].items())
    small = found["sizes"]["D"] < 4096
    again = [row["figures"] for row in found["rows"] if "figures" in row]
    value, single = [1e9 * each for each in found["value"].values()], 1e9 * found["pass"]
    return f"""## Cost of the assertions on kernels

The processor time of each assertion over that of one evaluation of its step in float32 by NumPy, by the number of
tokens. Beside them, the time of this evaluation with the most tokens, and of the assertion on one value. No assertion
costs less than that. With fewer than {ROWS} tokens a step without a matrix is proven legal. Its figures are computed
when one is read, which makes the ratio {min(again):.0f} to {max(again):.0f}. A step without sums is the other wall.
To judge a value of it takes {min(value):.0f} to {max(value):.0f} ns, and to evaluate it by NumPy about one. To add two
arrays of binary64 in the cache takes {single:.2f} ns for each value. So only a part of the values is judged.
Sizes: {sizes}.
Command: `python -m bench.testing_cost{" --small" if small else ""}`; file: {link("testing_cost.json")}.

{table(("step", *(f"{count} tokens" for count in tokens), f"NumPy, {tokens[-1]} tokens, ms", "one value, ms"), rows)}"""


def verdict_cost() -> str:
    found = results("verdicts")
    machine = found["machine"]
    rows = [
        (
            row["what"],
            f"{row['verdict_ms']:,.0f} ms" if "verdict_ms" in row else f"{row['verdict_bytes'] / 1e9:.1f} GB",
            f"{row['judged_ms']:,.1f} ms" if "judged_ms" in row else f"{row['judged_bytes'] / 1e9:.1f} GB",
            f"{row['ratio']:.1f}",
            f"{row['wall']:.1f}",
            f"{row['arithmetic']:.1f}" if "arithmetic" in row else "",
            f"{row['tests']:.1f}" if "tests" in row else "",
        )
        for row in found["rows"]
    ]
    return f"""## Cost of a verdict

The CPU time of a verdict over that of what it judges, in float32 on one thread: a product of matrices, a forward pass
whose weights are ready, and a product with weights from the formula. A verdict prepares the weights. Rows of one layer
of 8x7B are whole commands with all threads, by the clock. A busy process multiplies matrices in one thread on one of
the cores. In the same run, this machine computed {machine["gflops"]:.0f} GFlop/s in float32 products, and read
{machine["gb_per_s"]:.0f} GB/s from memory.

The wall is a ratio that a part of the work alone has:

- Of products it is the sums behind an enclosure, at the speed of large products. Those that make the sums are small,
  and can be faster.
- Of a model it is all its products. To these come the tests of all values, and the other steps.
- Of bfloat16 files it is the start of a command, and the calls of NumPy for each weight. It is read, tested for NaN,
  made float32 and float64, and multiplied in both. The calls are timed on blocks in the caches of all cores at once.
  Cores share caches, and threads of Python wait for each other. Of other rows it is 1.

The operations alone are those of the sums behind the enclosures, at this machine's rate of large products. They are as
many as three products in float32 have: two for the midpoint in float64, and one for the magnitudes of terms. Squares
and partial sums are computed only where errors are larger than usual.
Commands: the two in the head of `bench/verdicts.py`; file: {link("verdicts.json")}.

{table(("what", "verdict", "judged", "ratio", "wall", "operations alone", "tests of values"), rows)}"""


def invariance() -> str:
    found = results("invariance")
    digests = found["digests"]
    rows = [
        (each["setting"] if each["name"] in ("default", "another Python") else each["name"],
         f"`{each['exact'][:8]}`", f"`{each['float64'][:8]}`")
        for each in found["settings"]
    ]  # fmt: skip
    rows.append(
        (f"**different digests in {len(rows)} settings**", f"**{digests['exact']}**", f"**{digests['float64']}**")
    )
    return f"""## The same bits everywhere

One digest over all taps of all cases, beside the digest of plain float64 in the same setting.
Command: `python bench/invariance.py --python PATH …`; file: {link("invariance.json")}.
Every run of the tests repeats three settings that are far apart.

{table(("setting", "exact", "plain float64"), rows)}"""


def conform_cost() -> str:
    if not _measured("conform_cost"):
        return "## Cost of a conformance run\n\nNot measured yet (`python -m bench.conform_cost`)."
    found = results("conform_cost")
    ratios = found["ratios"]
    return f"""## Cost of a conformance run

`refmoe conform` over all cases, with `transformers` in four dtypes. The engine goes on while a few answers wait for
their verdict. The time that is not the engine's, over the engine's own: {found["ratio"]:.2f}, the median of
{len(ratios)} runs from {min(ratios):.2f} to {max(ratios):.2f} (engine {found["engine"]:.0f} s, wall
{found["wall"]:.0f} s). The wall is the time of refmoe's own process, which judges one answer at a time:
{found["own_processor"]:.0f} s of a processor.
Command: `python -m bench.conform_cost --repeats 5 --json bench/results/conform_cost.json`;
file: {link("conform_cost.json")}."""


def startup_cost() -> str:
    rows = [
        (f"`{each['what']}`" if "refmoe" in each["what"] else each["what"], f"{each['wall']:.2f} s",
         f"{each['ratio']:.2f}")
        for each in results("startup_cost")
    ]  # fmt: skip
    return f"""## Time to start

Medians of commands that take turns. The package loads what a command needs, and no more.
Command: `python -m bench.startup_cost --json bench/results/startup_cost.json`; file: {link("startup_cost.json")}.

{table(("command", "wall", "over Python with NumPy"), rows)}"""


def exact_cost() -> str:
    rows = [
        (
            name,
            f"{found['ratio']:.1f}",
            ", ".join(f"{step} {part:.0%}" for step, part in found["shares"].items() if part >= 0.02),
        )
        for name, found in results("exact_cost").items()
    ]
    return f"""## Cost of exact arithmetic

The time of exact arithmetic over that of NumPy's float64, in turns in one run, in one thread. A weight is prepared
once, which is not counted. In a small case a call takes longer than its few values: exact arithmetic makes
{next(iter(results("exact_cost").values()))["calls"]:.1f} times as many calls of functions there, NumPy's included.
Command: `python bench/exact_cost.py --json bench/results/exact_cost.json`; file: {link("exact_cost.json")}.

{table(("computation", "exact / native", "shares of the exact time"), rows)}"""


def full_size() -> str:
    found = results("full_size")
    rows = [
        (f"{run['dtype']}, {tokens} + 2 tokens", f"{run['peak_gib']:.2f}", f"{run['stated_gib']:.2f}",
         f"{run['read_over_needed']:.3f}", f"{run['matmul_share']:.0%}" if run["matmul_share"] else "-",
         f"{run['seconds']:.0f} s")
        for tokens in (8, 256)
        for run in found[f"two_layers_{tokens}_tokens"]
    ]  # fmt: skip
    whole = found["whole"]
    return f"""## Full size

Two layers of 8x7B with embedding and head, a checkpoint of three shards in bfloat16 on disk, on two cores.
The disk sets
the time of the first rows. The share of matrix products is that of a run whose files are in memory. Commands:
`python -m bench.full_size --folder DIR --json bench/results/full_size.json`, and again with `--tokens 256`; file:
{link("full_size.json")}.

{table(("computation", "peak GiB", "stated GiB", "read / needed", "in matrix products", "time"), rows)}

`refmoe suite check {whole["case"]}` recomputes all layers of 8x7B, every bit:
{whole["seconds"] / 60:.1f} minutes on {whole["cores"]} cores,
{whole["peak_of_a_process_gib"]:.1f} GiB
in the largest process. Its processes were given {whole["core_seconds"]} seconds of a core, which is
{whole["core_seconds"] / whole["seconds"] / whole["cores"]:.0%} of the machine."""


def scaling() -> str:
    if not _measured("scaling"):
        return "## A second worker\n\nNot measured yet (`python -m bench.scaling`)."
    found = results("scaling")
    rows = [
        (
            f"`{name}`",
            f"{row['one_seconds']:.1f} s",
            f"{row['busy_cores_of_one']:.2f}",
            *(
                text
                for way in ("processes", "dask")
                for text in (
                    f"{row[f'{way}_seconds']:.1f} s",
                    f"{row[f'busy_cores_of_{way}']:.2f}",
                    f"{row[f'{way}_efficiency']:.2f}",
                )
            ),
            f"{row['wall']:.2f}",
        )
        for name, row in found["rows"].items()
    ]
    head = ("command", "one", "busy cores", *(
        text for way in ("processes:2", "Dask") for text in (way, "busy cores", "efficiency")
    ), "wall")  # fmt: skip
    return f"""## A second worker

Whole commands with one worker, with `--executor processes:2`, and on a Dask cluster of two workers on this machine,
each process with one BLAS thread, medians of {found["repeats"]} on {found["cores"]} cores. The efficiency is the time
with one worker over twice the time with two. Busy cores are those that the command, the workers and their engines use
on average. The wall is the time of one command over that of two, both with one worker, side by side: work that is
divided without any cost. It is below 1 where the two cores of this machine, which share caches and memory, slow each
other down. In `conform` one worker keeps more than one core busy, because the engine is another process.
Command: `python -m bench.scaling --json bench/results/scaling.json`; file: {link("scaling.json")}.

{table(head, rows)}"""


FROM_FILES = "one layer of 8x7B from bfloat16 files, 8 tokens, over reading them"
"""The row of `bench.verdicts` from which the plan has the rate of verdicts."""


def cluster_plan() -> str:
    config, tokens = PRESETS["mixtral-8x7b"], 8
    judged = [row for row in results("verdicts")["rows"] if row["what"] == FROM_FILES]
    if not judged:
        return "## 8x7B on several machines\n\nNot measured yet (`python -m bench.verdicts --only files`)."
    disk = results("full_size")[f"two_layers_{tokens}_tokens"][0]
    rates = Rates(
        disk=1e9 * disk["read_gb"] / disk["seconds"], judged=1e3 * layer_bytes(config) / judged[0]["verdict_ms"]
    )
    every = plans(config, tokens, rates)
    rows = [
        (
            f"{each.machines}", f"{each.layers}", f"{each.read / 1e9:.1f} GB", f"{each.moved / 1e6:.0f} MB",
            f"{each.seconds / 60:.1f} min", f"{every[0].seconds / each.seconds / each.machines:.0%}",
        )
        for each in every
    ]  # fmt: skip
    layer = layer_bytes(config)
    return f"""## 8x7B on several machines

Simulated, not measured: `refmoe verify` of all 32 layers with all taps of {tokens} tokens, on machines that each have
the files on a disk of their own. The rates are those of the machine of this page. Its disk reads
{rates.disk / 1e9:.2f} GB/s of weights, and a verdict takes {rates.judged / 1e9:.2f} GB/s of weights that are in
memory. A layer has {layer / 1e9:.1f} GB. To read it from the disk takes {layer / rates.disk:.0f} seconds, and to judge
it {layer / rates.judged:.0f}. Both go side by side, so that the slower one counts.
The trace of a layer has {trace_bytes(config, tokens) / 1e6:.1f} MB. Only the head is work that cannot be dealt evenly.
The start of workers, a few seconds, is left out.
Sources: {link("full_size.json", "verdicts.json")}, `bench/cluster_plan.py`.

{table(("machines", "layers of one", "weights read by one", "trace moved to one", "time", "efficiency"), rows)}"""


def peers() -> str:
    found, float32 = results("peers"), results("peers_float32")
    rows, reached = [], dict.fromkeys(PRODUCTS, 0)
    for model, name in MODELS.items():
        for phase in ("prefill", "decode"):
            for ours, products in PRODUCTS.items():
                row = found[model][phase][ours]
                against = (f"{row['speed_against'][peer]:.2f}" for peer in PEERS)
                rows.append((name, phase, products, *against, f"{row['share_of_matmul']:.0%}"))
                reached[ours] += row["speed_against_best"] >= found[model][phase]["goal"]
    head = ("model", "phase", "refmoe's products", *PEERS, "in matrix products")
    prefill, decode = (float32["middle"][phase]["refmoe mkl"]["speed_against_best"] for phase in ("prefill", "decode"))
    return f"""## Speed beside other engines

The time of other engines over that of refmoe: float32, the same CPU, the same weights, two threads, in turns in one
run. The prefill has {found["prefill"]} tokens, and the first one is not counted:
weights are packed when they come again. Command:
`python -m bench.peers --layer-rounds 3 --llama-python VENV/bin/python --json bench/results/peers.json`; file:
{link("peers.json")}. The machine was shared: a ratio changes by a tenth from run to run.

{table(head, rows)}

The goal is {found["middle"]["prefill"]["goal"]} times the best of the others in prefill, and
{found["middle"]["decode"]["goal"]} times in decode. With oneMKL (extra `mkl`) 
{reached["refmoe mkl"]} of {len(rows) // 2} rows reach it, with NumPy {reached["refmoe numpy"]}.
oneMKL reads a weight stored in bfloat16 as it is where the processor multiplies such
matrices (AMX). A float32 activation is the exact sum of three bfloat16 values, so the sums are those of float32. The
other engines hold the same weights in float32. In another run refmoe holds them in float32 as well
(`--only middle --stored float32`, {link("peers_float32.json")}). The best of the others
then takes {prefill:.2f} times its time in
prefill and {decode:.2f} in decode. No processor without AMX was tried."""


def elementary() -> str:
    rows = [
        (row["function"], f"{row['max_ulp']:.4f}", f"{row['not_nearest']:,} of {row['arguments']:,}")
        for row in results("elementary_accuracy")
    ]
    return f"""## Accuracy of the elementary functions

The largest error in units in the last place, measured against Arb, hard arguments included.
Command: `python bench/elementary_accuracy.py --arguments 10000000`; file: {link("elementary_accuracy.json")}.

{table(("function", "ulp", "not the nearest float64"), rows)}"""


def weight_formula() -> str:
    found = results("weight_formula")
    return f"""## The weight formula

Weights from the formula: {found["million_elements_per_second"]:.0f} million elements a second on one core.
NumPy's PCG64 makes {found["pcg64_million_integers_per_second"]:.0f} million integers.
The formula is {found["passes"]} operations of NumPy on each block, which stays in the cache.
Alone, without allocation and bookkeeping, they would make
{found["million_elements_per_second_of_passes"]:.0f} million elements a second.
So {found["share"]:.0%} of what NumPy can do is reached. On {found["cores"]} cores together the formula makes
{found["million_elements_per_second_of_cores"]:.0f} million.
Command: `python bench/weight_formula.py`; file: {link("weight_formula.json")}."""


def robustness() -> str:
    found = results("robustness_inputs")
    engines = results("robustness_engines")
    kills = results("robustness_kills")["total"] if _measured("robustness_kills") else None
    rows = [
        ("hostile engines", "`python -m tests.fuzz.hostile_engines --all --json FILE`", f"{engines['runs']:,}",
         f"{len(engines['faults'])}"),
        *([("kills of commands", "`python -m tests.fuzz.kills --count 200 --json FILE`", f"{kills['killed']:,}",
            f"{kills['faults']}")] if kills else []),
        *((f"inputs: {name}", "", f"{kind['tried']:,}", f"{kind['faulty']}") for name, kind in found["kinds"].items()),
        ("**inputs, all**", "`python -m tests.fuzz --jobs 2 --minutes M --json FILE`", f"**{found['inputs']:,}**",
         f"**{found['faulty']}**"),
    ]  # fmt: skip
    return f"""## Whatever a stranger hands in

Each trial gives refmoe a damaged input or a hostile engine, or kills it. All are held to the same rules. The exit
status means what the manual says. There is one sentence and no traceback. No input is changed. Nothing half-written
is left, and no process stays. Time and memory are bounded.
`tests/fuzz/` has the rules. A seed repeats a campaign.
Files: {link("robustness_inputs.json", "robustness_engines.json", *(["robustness_kills.json"] if kills else []))}.

{table(("attack", "command", "trials", "with a fault"), rows)}"""


def kernel_cheats() -> str:
    found = results("kernel_cheats")
    checks = [each["name"] for each in found["usual"]]
    right, *cheats = found["cheats"]
    rows = [
        (each["name"], each["dtype"], *("passes" if name in each["passes"] else "caught" for name in checks), law(each))
        for each in (right, *cheats)
    ]
    passing = {name: sum(name in each["passes"] for each in cheats) for name in checks}
    caught = sum(each["law"] is not None for each in cheats)
    bugs = found["bugs"]
    sources = [(f"[{each['name']}]({each['source']})", each["words"]) for each in found["usual"]]
    passed = ", ".join(f"{count} pass the check of {name}" for name, count in passing.items())
    caught_bugs = sum(each["law"] is not None for each in bugs)
    return f"""## Kernels that cheat

{len(cheats)} kernels that compute nothing, or less than they should, against the checks of four public projects and
against [the contract of kernels](kernel-contract.md). The last column names the first law that each breaks, in the
order of reports. Of the cheats {passed}. The contract catches {caught}.
Command: `python -m bench.kernel_cheats`; file: {link("kernel_cheats.json")}.

{table(("kernel", "dtype", *checks, "contract"), rows)}

{table(("check", "comparison and inputs"), sources)}

Of {len(bugs)} bugs of public kernels and routers the contracts catch {caught_bugs}."""


def law(found: dict[str, Any]) -> str:
    """The law that caught a kernel, with the number of the example."""
    return "passes" if found["law"] is None else f"{found['law']}, example {found['example']}"


def servers() -> str:
    found = results("server_power")
    known = [name for name in found if name != SPECIFICATION]
    dtypes = (*reversed(DTYPES),)
    measured = {dtype: [name for name in known if dtype in found[name]] for dtype in dtypes}
    seen = {(level, dtype): sum(level in found[name][dtype] for name in measured[dtype])
            for level in LEVELS for dtype in dtypes}  # fmt: skip
    rows = [(level, *(f"{seen[level, dtype]} of {len(measured[dtype])}" for dtype in dtypes)) for level in LEVELS]
    unseen = ", ".join(f"`{name}`" for name in known if not any(found[name].values()))
    return f"""## Known bugs behind a server

Each known bug is a server that is asked about refmoe's own model, as `refmoe conform --server` asks. It is judged by
what it gives: tokens alone, more of each distribution, or all. A number counts the bugs that are
seen, of those that were measured at this dtype.
The specification itself is such a server too, and is conformant at each level in each dtype.
Command: `python -m bench.server_power`; file: {link("server_power.json")}.

{table(("what the server gives", *dtypes), rows)}

No level shows these, as the model does not meet their conditions, or no log-probability changes: {unseen}."""


def real_servers() -> str:
    rows, notes = [], []
    for server, measured in results("real_servers").items():
        bugs = {name: each for name, each in measured["bugs"].items() if name != "healthy"}
        healthy = measured["bugs"]["healthy"]
        for level in ("tokens alone", healthy["level"]):
            caught, predicted = caught_behind(bugs, level)
            changing = sum(each["changes"] for each in bugs.values())
            counts = len(bugs), changing, len(predicted), len(caught & predicted), len(caught - predicted)
            rows.append((measured["package"], level, *map(str, counts)))
            beyond = {"not caught": predicted - caught, "caught beyond the table": caught - predicted}
            notes += [f"- {server}, {level}, {said}: {_names(bugs, some)}." for said, some in beyond.items() if some]
        ended = {name for name, each in bugs.items() if each["verdict"] == CRASHED}
        notes += [f"- {server}, ended by the bug: {_names(bugs, ended)}."] * bool(ended)
        notes.append(f"- {server} without a bug: {healthy['verdict']}.")
    head = ["package", "by", "bugs", "that change an answer", "of these in the table", "of these caught",
            "caught beyond the table"]  # fmt: skip
    listed = "\n".join(notes)
    return f"""## Known bugs behind real servers

The same bugs, in real servers that are judged over HTTP in float32. Behind `transformers serve` a bug is a patch of its
code, and behind llama-server the file of a wrong converter. The table above predicts which are seen. A patch that
rounds to the stored dtype is no bug in float32: it changes no answer, or last bits alone. A real server is
asked in more ways than a simulated one, and serves more than one sequence, so more may be caught.
Command: `python -m bench.real_servers`; file: {link("real_servers.json")}.

{table(head, rows)}

{listed}"""


def caught_behind(bugs: dict[str, Any], level: str) -> tuple[set[str], set[str]]:
    """The bugs behind a real server that a level shows, and those that change an answer and were to be shown."""
    simulated = results("server_power")
    by_tokens = level == "tokens alone"
    caught = {
        name for name, each in bugs.items() if (each["by tokens"] if by_tokens else each["verdict"] == NOT_CONFORMANT)
    }
    predicted = {name for name, each in bugs.items() if each["changes"] and level in simulated[name]["float32"]}
    return caught, predicted


def _names(order: Iterable[str], some: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in order if name in some)


def folders() -> str:
    found = results("folders")
    rows = [
        (
            each["id"], _plain(each["odd"]), _plain(each["source"]),
            f"refused: {_plain(each['refused'])}" if "refused" in each else f"read: {each['difference']:.1e}",
        )
        for each in found["rows"]
    ]  # fmt: skip
    return f"""## Folders as people have them

Each row is a folder like one that people have. It keeps the odd fields of the configuration, with small dimensions and
random weights. Where the folder is read, the logits of 12 tokens are compared with those of transformers
{found["transformers"]}, in float64 on both sides.
transformers keeps norms, angles and routing weights in float32 all the same. The differences come from its rounding.
The table has the largest difference, relative to the largest logit.
Command: `python -m bench.folders --json bench/results/folders.json`; file: {link("folders.json")}.

{table(("row", "what is odd", "seen in", "outcome"), rows)}"""


def _plain(text: str) -> str:
    """A text in one cell of a table, in which nothing is Markdown."""
    return re.sub(r"([|*_`<>\[\]])", r"\\\1", text)


def versions() -> str:
    if not _measured("versions"):
        return "## Versions of Python and NumPy\n\nNot measured yet (`python -m bench.versions`)."
    found = results("versions")
    rows = [(each["python"], each["numpy"]) for each in found["versions"]]
    missing = "".join(f"\n- {each}" for each in found["not_tried"])
    return f"""## Versions of Python and NumPy

The wheel is installed outside a clone and run in an empty folder. The commands are `refmoe suite check`, `emit`,
`verify` and `materialise`. The bytes of all that they print and write are compared.
Outputs that differ between these versions: {_no(len(found["different"]))}.
Command: `python -m bench.versions --python PATH --numpy VERSION`; file: {link("versions.json")}.

{table(("Python", "NumPy"), rows)}

Not tried:
{missing}"""


def tensor_cores() -> str:
    if not _measured("tensor_cores"):
        return "## Tensor cores without a GPU\n\nNot measured yet (`python -m bench.tensor_cores`)."
    engines = list(results("tensor_cores")["engines"].values())
    honest = [each for each in engines if not each["faulty"]]
    judged = [row for each in honest for row in _stored(each)]
    return f"""## Tensor cores without a GPU

Each engine multiplies with the bits of an instruction, as MMA-Sim models it. The factors are like those of five steps
of Mixtral. Sums have up to {LONGEST} terms, and are judged in float32 and in the dtype of the factors. A cell has the
largest distance in standard deviations, and the largest share of the legal interval. The limit is about
{max(row["limit"] for row in judged):.0f} deviations.
Values of honest engines: {sum(row["values"] for row in judged):,}; results that fail:
{_no(sum(row["verdict"] != "pass" for row in judged))}.
Command: `python -m bench.tensor_cores`; file: {link("tensor_cores.json")}.

{table(("architecture", "dtype", "judged as", *_STEPS), [_engine(each) for each in honest])}

Engines with too narrow an accumulator, or with another fault. Each cell says how many of the results fail, and how many
of these are explained.

{table(("architecture", "dtype", "judged as", *_STEPS), [_engine(each) for each in engines if each["faulty"]])}

CDNA2 takes subnormal factors in float16 as zero, which PyTorch documents for MI200. The policy of float16 sees that as
a fault. That MMA-Sim equals the chips is the claim of its authors."""


_STEPS = ("attention.scores", "attention.context", "router.logits", "expert.gate", "expert.output")


def _stored(engine: dict[str, Any], step: str | None = None) -> list[dict[str, Any]]:
    """The judgements of an engine, of one step or of all."""
    steps = [engine["steps"].get(step, {})] if step else list(engine["steps"].values())
    return [row for each in steps for stored, row in each.items() if stored != "terms"]


def _engine(engine: dict[str, Any]) -> tuple[str, ...]:
    policy = engine["policy"] + (", subnormal factors as zero" if engine["flushes"] else "")
    kind = engine["dtype"]
    if engine["instruction"].endswith("f16.f16.f16.f16"):
        kind = "float16, sums in float16"
    elif engine["promoted"]:
        kind += f", promoted every {engine['promoted']}"
    cells = []
    for step in _STEPS:
        rows = _stored(engine, step)
        if not rows:
            cells.append("-")
        elif engine["faulty"]:
            fail, named = (
                sum(test) for test in zip(*((r["verdict"] == "fail", bool(r["named"])) for r in rows), strict=True)
            )
            cells.append(f"{fail} of {len(rows)} fail" + (f", {named} named" if named else ""))
        else:
            cells.append(f"{max(r['excess'] for r in rows):.1f} / {max(r['headroom'] for r in rows):.2g}")
    return engine["architecture"], kind, policy, *cells


def real_kernels() -> str:
    if not _measured("real_kernels"):
        return "## Kernels that people run\n\nNot measured yet (`python -m bench.real_kernels`)."
    found = results("real_kernels")
    rows = [
        (
            _plain(name), dtype, f"{sum(each['values'] for each in shapes.values()):,}",
            _no(sum(each["verdict"] != "pass" for each in shapes.values())),
            f"{max(each['excess'] for each in shapes.values()):.1f}",
            f"{max(each['headroom'] for each in shapes.values()):.3g}", _plain(kernel["about"]),
        )
        for name, kernel in found.items() for dtype, shapes in kernel["dtypes"].items()
    ]  # fmt: skip
    head = ("kernel", "dtype", "values", "results that fail", "deviations", "share of the interval", "arithmetic")
    return f"""## Kernels that people run

Each runs by itself on the CPU, unpatched. One result has about a million values. Another one has sums of {LONGEST}
terms. They are judged as `refmoe.testing` judges a kernel: by the dtype of the result, without `atol`.
The table has the largest distance in standard deviations, and the largest share of the legal interval.
Command: `python -m bench.real_kernels`; file: {link("real_kernels.json")}.

{table(head, rows)}"""


def quantised_engines() -> str:
    rows, caches = [], []
    found = results("quantised")
    for build in dict.fromkeys(row["build"] for row in found):
        mine = [row for row in found if row["build"] == build]
        rows.append((
            build, ", ".join(dict.fromkeys(f"`{row['policy']}`" for row in mine)), f"{len(mine)}",
            f"{sum(row['values'] for row in mine):,}", f"{sum(row['verdict'] != CONFORMANT for row in mine)}",
            f"{max(row['worst_error'] for row in mine):.2f}", f"{max(row['excess'] for row in mine):.1f}",
            ", ".join(f"`{step}`" for step in sorted({step for row in mine for step in row["failed"]})) or "-",
        ))  # fmt: skip
        caches += [
            (
                build, row["format"], f"{row['values'] + row['contexts']:,}",
                f"{row['outside'] + row['contexts_outside']:,}", f"`{row['other']['policy']}`",
                f"{row['other']['outside']:,}", f"{row['other']['contexts_outside']:,}",
            ) for row in mine if row.get("other", row)["policy"] != row["policy"]
        ]  # fmt: skip
    head = ("build", "policy", "files", "values of products", "failures", "error / allowed", "excess", "wrong steps")
    wrong = ("build", "format", "values", "outside", "under another policy", "products outside", "contexts outside")
    return f"""## Quantised engines

Golden cases were written as GGUF files and as folders, in the formats and mixtures that refmoe writes. Each engine ran
its files. The error is the largest one of a product, over the radius and the last rounding. The excess is in standard
deviations.
Commands: `python -m bench.quantised --write FOLDER`, and then `python -m bench.quantised FOLDER --build NAME` with
options for each build; file: {link("quantised.json")}.

{table(head, rows)}

ik_llama.cpp has a bug that codes do not explain: [a layer adds the experts to the normalised
state](findings/ik-llama-residual.md).

The same traces, judged by a policy that is not the engine's own. The values are those of products and of contexts, the
sums over cached values.

{table(wrong, caches)}

{gguf_readers()}"""


def gguf_readers() -> str:
    """The weights of quantised files, as independent readers read them."""
    rows, found = [], results("gguf_readers")
    for reader in dict.fromkeys(row["reader"] for row in found):
        mine = [row for row in found if row["reader"] == reader]
        rows.append((
            reader, f"{sum(not row['refused'] for row in mine)}", f"{sum(row['values'] for row in mine):,}",
            f"{sum(row['values'] - row['equal'] - row['zeros'] for row in mine):,}",
            f"{sum(row['zeros'] for row in mine):,}", ", ".join(row["format"] for row in mine if row["refused"]) or "-",
        ))  # fmt: skip
    return f"""Readers of GGUF that share no code with llama.cpp read a case in each format and mixture. Their weights
were compared with those that refmoe reads, bit by bit.
Commands: `python -m bench.gguf_readers FOLDER --write`, and then `python -m bench.gguf_readers FOLDER --reader NAME`;
file: {link("gguf_readers.json")}.

{table(("reader", "files", "weights", "other values", "zeros with another sign", "refused"), rows)}"""


def quantised_bugs() -> str:
    found = results("quantised_bugs")
    checks = {name: sum(passes(row)[name] for row in found) for name in LIMITS | {"tokens": None}}
    rows = [
        (
            f"`{row['bug'].removeprefix('quantised-')}`", f"`{row['model']}`",
            *("passes" if done else "fails" for done in passes(row).values()),
            f"`{row['first_wrong']}`" if row["killed"] else "conformant",
            "itself" if row["named"] == row["bug"] else f"`{row['named']}`" if row["named"] else "no name",
        )
        for row in found
    ]  # fmt: skip
    errors = f"{LIMITS['product']:g}"
    head = (
        "bug", "model", f"error {errors}", f"cosine {LIMITS['cosine']}", f"KL {LIMITS['divergence']}",
        f"{GENERATED} tokens", "refmoe: first wrong step", "name",
    )  # fmt: skip
    return f"""## Bugs of quantised engines

{len(found)} known bugs with public sources, each in the ideal engine of a policy, on a golden case in a format that
shows it. Rows and blocks of its matrices have different sizes, as those of trained models.
refmoe catches {sum(row["killed"] for row in found)}, and names {sum(row["right"] for row in found)} of them
first, by themselves or by a cause that computes the same bits. With its own entry taken away,
{sum(row["left_out_wrong"] for row in found)} are given a wrong name.

The usual checks compare with the same engine without the bug. In {checks["product"]} bugs the normalised error of every
product is within {errors}. In {checks["cosine"]} the cosine of the logits of every token is at least
{LIMITS["cosine"]}. In {checks["divergence"]} the mean KL divergence is within {LIMITS["divergence"]}.
The number of bugs that generate the same {GENERATED} tokens is {checks["tokens"]}.
Command: `python -m bench.quantised_bugs --left-out --json bench/results/quantised_bugs.json`; file:
{link("quantised_bugs.json")}.

{table(head, rows)}"""


SECTIONS = (
    goldens, known_bugs, packs, diagnosis, left_out, drawn_faults, diagnosis_time, engines, quantised_engines,
    quantised_bugs, faults, tensor_cores, verify_cost, verdict_cost, kernel_tests, kernel_cheats, real_kernels,
    testing_cost, conform_cost, invariance, exact_cost, full_size, scaling, cluster_plan, peers, elementary,
    weight_formula, startup_cost, robustness, folders, servers, real_servers, versions,
)  # fmt: skip


def wrapped(text: str) -> str:
    """Paragraphs in lines of at most 120 characters; tables, lists and titles as they are."""
    return "\n\n".join(
        part
        if part[0] in "|#-<"
        else textwrap.fill(" ".join(part.split()), 120, break_long_words=False, break_on_hyphens=False)
        for part in text.split("\n\n")
    )


def page() -> str:
    """docs/measurements.md."""
    head = """# Measurements

<!-- This file is generated. Change bench/measurements.py or the files of results instead. -->

`python -m bench.measurements` writes this page from the files that it links to. A test fails when it is not current.
No benchmark ran on a GPU yet."""
    return wrapped("\n\n".join([head, *(section() for section in SECTIONS)])) + "\n"


# ---- the blocks of README.md


def allclose() -> str:
    """The table that compares `numpy.allclose` with the verifier."""
    found = results("enclosures")
    legal = found["legal"][f"bfloat16 {LONGEST}"]
    accepted = f"accepts {_share(legal['allclose'])} of values"
    rows = [("none: legal sums in many orders", accepted, f"accepts: at most {legal['excess']:.1f} sigma")]
    for fault in ("one term dropped", "float16 accumulator, per 32"):
        one = found["faults"][fault][f"bfloat16 {LONGEST}"]
        rows.append((fault, f"accepts {_share(one['allclose'])} of values", f"rejects: {one['excess']:,.0f} sigma"))
    tolerance = f"`allclose`, `rtol = atol = {found['tolerance']}`"
    return table((f"fault in {LONGEST} bfloat16 terms", tolerance, f"refmoe, limit {found['limit']:.1f} sigma"), rows)


def counts() -> str:
    """A paragraph with the size of the suite."""
    found, named = summary(), results("diagnosis")
    return wrapped(
        f"{len(find_cases(GOLDEN))} golden cases catch {found.killed['float32']} of {found.mutants} known bugs in "
        f"float32. The report names {named['named_first']} of {named['engines_with_a_known_bug']} bugs planted in "
        f"`transformers`, and a bug in {named['healthy_given_a_name']} of {named['healthy']} healthy engines. "
        "[All measurements](docs/measurements.md) come with their commands."
    )


BLOCKS = {"allclose": allclose, "counts": counts}


def readme(text: str) -> str:
    """The text of README.md with its measured blocks filled."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail when a page is not current")
    options = parser.parse_args()
    pages = {PAGE: page(), README: readme(README.read_text(encoding="utf-8"))}
    old = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in old:
        if not options.check:
            path.write_text(pages[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'not current' if options.check else 'written'}")
    sys.exit(bool(old and options.check))


if __name__ == "__main__":
    main()
