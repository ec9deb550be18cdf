# SPDX-License-Identifier: Apache-2.0
"""Values of an engine in every form: runs, batches, some tokens, some layers, files."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import refmoe
from refmoe import InputError
from refmoe.verifier.routing import NO_PADDING

TOKENS = [1, 31, 41, 59]


@pytest.fixture(scope="module")
def model() -> refmoe.Model:
    return refmoe.load("walking-skeleton")


@pytest.fixture(scope="module")
def right(model: refmoe.Model) -> refmoe.Trace:
    return model.run(TOKENS, dtype="float32")


def taps(trace: refmoe.Trace, run: str = "prefill", *names: str) -> dict[str, Any]:
    return {tap: trace[run, tap] for tap in names or trace[run]}


def judged(values: Any, model: refmoe.Model, *calls: Any, **options: Any) -> refmoe.Report:
    report = refmoe.verify(values, model, *calls, **{"policy": "float32", "diagnose": False, **options})
    assert report, str(report)
    return report


def count(report: refmoe.Report) -> int:
    return sum(check.values for check in report.checks)


def test_all_taps_of_a_prefill(model: refmoe.Model, right: refmoe.Trace) -> None:
    assert len(judged(taps(right), model, TOKENS).checks) == len(right["prefill"])


def test_some_layers_and_some_taps(model: refmoe.Model, right: refmoe.Trace) -> None:
    names = ("layers.1.attention_norm", "layers.1.attention.q", "layers.0.router.experts")
    report = judged(taps(right, "prefill", *names), model, TOKENS)
    assert {check.tap for check in report.checks} == {*names}


@pytest.mark.parametrize("shape", [(97,), (1, 97), (1, 1, 97), (4, 97), (1, 4, 97), (1, 1, 4, 97)])
def test_logits_of_the_last_position_or_of_all(
    model: refmoe.Model, right: refmoe.Trace, shape: tuple[int, ...]
) -> None:
    logits = right["prefill", "logits"]
    report = judged({"logits": (logits if 4 in shape else logits[-1]).reshape(shape)}, model, TOKENS)
    assert count(report) == (4 * 97 if 4 in shape else 97)


def test_logits_of_the_last_position_are_not_those_of_the_first(model: refmoe.Model, right: refmoe.Trace) -> None:
    wrong = {"logits": right["prefill", "logits"][0]}
    assert not refmoe.verify(wrong, model, TOKENS, policy="float32", diagnose=False)


@pytest.mark.parametrize(
    ("rows", "start", "stop"), [("-1", 3, 4), ("0", 0, 1), ("1:3", 1, 3), (":2", 0, 2), ("-2:", 2, 4), (":", 0, 4)]
)
def test_values_of_some_tokens(model: refmoe.Model, right: refmoe.Trace, rows: str, start: int, stop: int) -> None:
    names = ("layers.0.residual", "layers.1.attention.probs", "layers.0.expert.hidden", "logits")
    values = {}
    for name, array in taps(right, "prefill", *names).items():
        values[f"{name}[{rows}]"] = array[:, start:stop] if name.endswith("probs") else array[start:stop]
    report = judged(values, model, TOKENS)
    assert {check.tap for check in report.checks} == {*names}


def test_one_token_needs_no_axis(model: refmoe.Model, right: refmoe.Trace) -> None:
    residual = right["prefill", "layers.0.residual"]
    judged({"logits[-1]": right["prefill", "logits"][-1], "layers.0.residual[2]": residual[2]}, model, TOKENS)


def test_heads_in_one_row(model: refmoe.Model, right: refmoe.Trace) -> None:
    """As the product with the weights gives them."""
    names = ("layers.0.attention.q", "layers.0.attention.k", "layers.0.attention.context")
    flat = {name: array.reshape(1, 4, -1) for name, array in taps(right, "prefill", *names).items()}
    judged(flat, model, TOKENS)


def test_several_runs(model: refmoe.Model) -> None:
    trace = model.run(TOKENS, chunks=[[5, 6], [7]], decode=[8, 9], dtype="float32")
    assert [run.run for run in trace.runs] == ["prefill", "chunk1", "chunk2", "decode1", "decode2"]
    options = {"chunks": [[5, 6], [7]], "decode": [8, 9]}
    flat = {f"{run.run}/{tap}": trace[run.run, tap] for run in trace.runs for tap in ("logits", "layers.0.moe_norm")}
    paired = {tuple(key.split("/")): array for key, array in flat.items()}
    nested = {run.run: taps(trace, run.run, "logits", "layers.0.moe_norm") for run in trace.runs}
    for values in (flat, paired, nested):
        assert len(judged(values, model, TOKENS, **options).checks) == 10
    with pytest.raises(InputError, match="several runs"):
        refmoe.verify({"logits": flat["prefill/logits"]}, model, TOKENS, **options)


def test_several_sequences_one_key_each(model: refmoe.Model) -> None:
    calls: dict[str, Any] = {"decode": [[3], [4, 5]], "chunks": [[[6, 7]], []]}
    tokens = [[1, 2, 3], [8, 9]]
    trace = model.run(tokens, dtype="float32", **calls)
    values = {f"{run.run}/logits": trace[run.run, "logits"] for run in trace.runs}
    assert len(judged(values, model, tokens, **calls).checks) == 6


@pytest.mark.parametrize("flat", [False, True], ids=["[B, T, ...]", "[B T, ...]"])
def test_a_batch_is_split_into_its_sequences(model: refmoe.Model, flat: bool) -> None:
    tokens, decode = np.array([[1, 2, 3], [8, 9, 10]]), [[4], [5]]
    trace = model.run(tokens, decode=decode, dtype="float32")
    names = ("layers.0.residual", "layers.0.router.experts", "layers.1.expert.gate", "layers.0.attention.q", "logits")
    values = {}
    for call in ("prefill", "decode1"):
        for name in names:
            both = np.stack([trace[f"{call}.row{row}", name] for row in range(2)])
            values[f"{call}/{name}"] = both.reshape(-1, *both.shape[2:]) if flat else both
        probs = [trace[f"{call}.row{row}", "layers.0.attention.probs"] for row in range(2)]
        values[f"{call}/layers.0.attention.probs"] = np.stack(probs)
    assert len(judged(values, model, tokens, decode=decode).checks) == 4 * (len(names) + 1)


@pytest.mark.parametrize("shape", [(2, 97), (2, 1, 97)])
def test_last_logits_of_a_batch(model: refmoe.Model, shape: tuple[int, ...]) -> None:
    tokens = [[1, 2, 3], [8, 9, 10]]
    trace = model.run(tokens, dtype="float32")
    last = np.stack([trace[f"prefill.row{row}", "logits"][-1] for row in range(2)])
    assert count(judged({"logits": last.reshape(shape)}, model, tokens)) == 2 * 97
    assert not refmoe.verify({"logits": last[::-1].copy()}, model, tokens, policy="float32", diagnose=False)


def log_probabilities(logits: Any) -> Any:
    x = np.asarray(logits, np.float64)
    return (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize("shape", [(97,), (1, 97), (4, 97), (1, 4, 97)])
def test_log_probabilities_of_the_last_position_or_of_all(
    model: refmoe.Model, right: refmoe.Trace, shape: tuple[int, ...]
) -> None:
    found = log_probabilities(right["prefill", "logits"])
    report = judged({"logprobs": (found if 4 in shape else found[-1]).reshape(shape)}, model, TOKENS)
    assert count(report) == (4 * 97 if 4 in shape else 97)


@pytest.mark.parametrize("rows", ["", "[-1]", "[1:3]"])
def test_the_largest_log_probabilities_with_their_ids(model: refmoe.Model, right: refmoe.Trace, rows: str) -> None:
    found = log_probabilities(right["prefill", "logits"])
    found = found[{"": slice(None), "[-1]": slice(3, 4), "[1:3]": slice(1, 3)}[rows]]
    ids = np.argsort(-found, -1)[:, :5].astype(np.uint16)
    values = np.take_along_axis(found, ids.astype(int), -1)
    report = judged({f"logprobs{rows}": values, f"logprobs.ids{rows}": ids}, model, TOKENS)
    assert {check.tap for check in report.checks} == {"logprobs", "logprobs.ids"}
    wrong = ids.copy()
    wrong[0, 0] = int(found[0].argmin())
    values = np.take_along_axis(found, wrong.astype(int), -1)
    again = refmoe.verify({f"logprobs{rows}": values, f"logprobs.ids{rows}": wrong}, model, TOKENS, diagnose=False)
    assert again.first_wrong_step is not None
    assert again.first_wrong_step.tap == "logprobs.ids"


def test_log_probabilities_of_a_batch(model: refmoe.Model) -> None:
    tokens = [[1, 2, 3], [8, 9, 10]]
    trace = model.run(tokens, dtype="float32")
    both = np.stack([log_probabilities(trace[f"prefill.row{row}", "logits"]) for row in range(2)])
    ids = np.argsort(-both, -1)[..., :3]
    values = {"logprobs": np.take_along_axis(both, ids, -1), "logprobs.ids": ids}
    assert count(judged(values, model, tokens)) == 2 * 3 * 3 + 2 * 3
    last = {name: array[:, -1] for name, array in values.items()}
    assert count(judged(last, model, tokens)) == 2 * 3 + 2


@pytest.mark.parametrize("tap", ["layers.0.router.experts", "layers.0.residual"])
def test_padded_rows_are_explained(model: refmoe.Model, right: refmoe.Trace, tap: str) -> None:
    array = right["prefill", tap]
    padded = np.concatenate([array, np.full_like(array[:1], -1)])
    with pytest.raises(InputError, match=NO_PADDING):
        refmoe.verify({tap: padded}, model, TOKENS, policy="float32")


def test_a_batch_of_different_lengths_needs_keys(model: refmoe.Model) -> None:
    with pytest.raises(InputError, match=r"prefill\.row0/logits"):
        refmoe.verify({"logits": np.zeros((2, 3, 97))}, model, [[1, 2, 3], [1, 2]])


def test_the_calls_of_a_case(model: refmoe.Model) -> None:
    case = refmoe.case("walking-skeleton")
    values = {run.run: taps(case.golden, run.run) for run in case.runs}
    judged(values, case, policy="float64")
    judged(case.golden, "walking-skeleton", policy="float64")


def test_a_trace_has_its_own_calls_and_policy(model: refmoe.Model, right: refmoe.Trace) -> None:
    assert refmoe.verify(right, model).policy == "float32"
    assert refmoe.verify(right, model, TOKENS).policy == "float32"
    with pytest.raises(InputError, match="tokens"):
        refmoe.verify(right, model, TOKENS[::-1])


def test_a_trace_of_another_case_or_checkpoint_is_refused(model: refmoe.Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="walking-skeleton"):
        refmoe.verify(refmoe.case("top-1").golden, model)
    model.save(tmp_path / "a", dtype="float32")
    trace = refmoe.load(tmp_path / "a").run([1, 2], dtype="float32")
    assert refmoe.verify(trace, refmoe.load(tmp_path / "a"))
    assert refmoe.verify(trace, model)


def test_the_policy_is_the_dtype_of_the_values(model: refmoe.Model, right: refmoe.Trace) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        report = refmoe.verify({"logits": model.run(TOKENS, policy=dtype)["prefill", "logits"]}, model, TOKENS)
        assert report.policy == dtype
    mixed = {"logits": right["prefill", "logits"], "final_norm": right["prefill", "final_norm"].astype(np.float64)}
    with pytest.raises(InputError, match="float32, float64"):
        refmoe.verify(mixed, model, TOKENS)


def test_a_loaded_folder_is_read_anew(model: refmoe.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "m", dtype="float32")
    before = refmoe.load(tmp_path / "m").config
    for path in (tmp_path / "m").iterdir():
        path.unlink()
    refmoe.case("top-1").model.save(tmp_path / "m", dtype="float32")
    assert refmoe.load(str(tmp_path / "m")).config != before


# ---- files


def test_a_trace_file(model: refmoe.Model, right: refmoe.Trace, tmp_path: Path) -> None:
    right.save(tmp_path / "t.safetensors")
    judged(tmp_path / "t.safetensors", model)
    judged(str(tmp_path / "t.safetensors"), model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_of_numpy(model: refmoe.Model, tmp_path: Path, dtype: str) -> None:
    """NumPy loses the name of bfloat16, not its bits."""
    ideal = model.run(TOKENS, policy=dtype)
    arrays = {f"prefill/{tap}": ideal["prefill", tap] for tap in ("layers.0.residual", "logits")}
    np.savez(tmp_path / "v.npz", **arrays)
    assert refmoe.verify(tmp_path / "v.npz", model, TOKENS, diagnose=False).policy == dtype


def test_plain_safetensors(model: refmoe.Model, right: refmoe.Trace, tmp_path: Path) -> None:
    save_file(taps(right, "prefill", "logits"), tmp_path / "v.safetensors")
    judged(tmp_path / "v.safetensors", model, TOKENS)


@pytest.mark.engines
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_a_file_of_torch(model: refmoe.Model, right: refmoe.Trace, tmp_path: Path, suffix: str) -> None:
    torch = pytest.importorskip("torch")
    tensors = {tap: torch.tensor(array) for tap, array in taps(right).items()}
    torch.save(tensors, tmp_path / f"flat.{suffix}")
    torch.save({"prefill": tensors}, tmp_path / f"nested.{suffix}")
    for name in ("flat", "nested"):
        judged(str(tmp_path / f"{name}.{suffix}"), model, TOKENS)


class Hostile:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


@pytest.mark.engines
def test_a_pickle_is_never_run(model: refmoe.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"logits": Hostile()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"logits": Hostile()}))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps({"logits": Hostile()}))
    np.savez(tmp_path / "object.npz", logits=np.array([Hostile()], dtype=object), allow_pickle=True)
    for name in ("zip.pt", "plain.pt", "plain.npz", "object.npz"):
        with pytest.raises(InputError, match=name) as refused:
            refmoe.verify(tmp_path / name, model, TOKENS)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.engines
def test_files_that_are_something_else(model: refmoe.Model, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for suffix in ("npz", "pt", "safetensors", "bin"):
        (tmp_path / f"empty.{suffix}").touch()
        (tmp_path / f"noise.{suffix}").write_bytes(bytes(range(256)) * 9)
        (tmp_path / f"folder.{suffix}").mkdir()
    np.save(tmp_path / "array", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "single.npz")
    torch.save(torch.ones(3), tmp_path / "single.pt")
    torch.save({1: torch.ones(3)}, tmp_path / "number.pt")
    torch.save({"logits": "text"}, tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("logits.npy", b"\x93NUMPY\x01\x00nonsense")
    for path in [*tmp_path.iterdir(), tmp_path / "missing.npz", tmp_path / "missing.pt", tmp_path / "missing"]:
        with pytest.raises(InputError):
            refmoe.verify(path, model, TOKENS)


def test_two_arrays_of_one_value_are_refused(model: refmoe.Model, right: refmoe.Trace) -> None:
    logits = right["prefill", "logits"]
    with pytest.raises(InputError, match="twice"):
        refmoe.verify({"logits": logits, "logits[-1]": logits[-1:]}, model, TOKENS)


def test_bfloat16_lists_are_not_taken_for_integers(model: refmoe.Model, right: refmoe.Trace) -> None:
    values = taps(right, "prefill", "layers.0.router.experts")
    with pytest.raises(InputError, match="integers"):
        refmoe.verify({k: v.astype(ml_dtypes.bfloat16) for k, v in values.items()}, model, TOKENS)
    with pytest.raises(InputError, match="floating-point"):
        refmoe.verify({"logits": [[1] * 97] * 4}, model, TOKENS)
