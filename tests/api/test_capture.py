# SPDX-License-Identifier: Apache-2.0
"""Capture of live modules of PyTorch: calls told apart, nothing left behind, verdicts on honest and on faulty ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refmoe
from refmoe import InputError
from refmoe.engines.capture.names import HUGGING_FACE
from tests.capture.test_transformers import save_tiny_mixtral

pytestmark = pytest.mark.engines
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = [3, 14, 15, 9, 26]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_mixtral(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> refmoe.Model:
    return refmoe.load(folder)


def engine(folder: Path, dtype: str = "float32", attention: str = "eager", experts: str = "eager") -> Any:
    return transformers.MixtralForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention, experts_implementation=experts
    ).eval()


@pytest.fixture(scope="module")
def mixtral(folder: Path) -> Any:
    return engine(folder)


def ids(*rows: list[int]) -> Any:
    return torch.tensor([*rows])


def names(trace: refmoe.Trace) -> list[str]:
    return [run.run for run in trace.runs]


def conformant(trace: refmoe.Trace, model: refmoe.Model) -> None:
    report = refmoe.verify(trace, model, diagnose=False)
    assert report, str(report)


# ---- calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("attention", "experts"), [("eager", "eager"), ("sdpa", "batched_mm")])
def test_prefill_chunk_and_decode(folder: Path, model: refmoe.Model, dtype: str, attention: str, experts: str) -> None:
    module = engine(folder, dtype, attention, experts)
    with refmoe.capture(module) as trace:
        out = module(ids(IDS))
        out = module(ids([5, 6]), past_key_values=out.past_key_values)
        out = module(input_ids=ids([7]), past_key_values=out.past_key_values)
        module(ids([8]), past_key_values=out.past_key_values)
    assert names(trace) == ["prefill", "chunk1", "decode1", "decode2"]
    assert [run.past for run in trace.runs] == [0, 5, 7, 8]
    assert ("layers.1.expert.hidden" in trace["chunk1"]) == (experts == "eager")
    assert ("layers.1.attention.probs" in trace["chunk1"]) == (attention == "eager")
    assert len(trace["decode2"]) > 30
    conformant(trace, model)


def test_the_values_are_those_of_the_module(mixtral: Any) -> None:
    with refmoe.capture(mixtral) as trace:
        out = mixtral(ids(IDS), output_hidden_states=True)
    assert np.array_equal(trace["prefill", "logits"], out.logits[0].detach().numpy())
    assert np.array_equal(trace["prefill", "layers.0.residual"], out.hidden_states[1][0].detach().numpy())


def test_calls_without_a_cache_are_sequences_of_their_own(mixtral: Any, model: refmoe.Model) -> None:
    with refmoe.capture(mixtral) as trace:
        for length in (2, 3):
            mixtral(ids(IDS[:length]), use_cache=False)
        mixtral(ids([1, 2], [3, 4]))
    assert names(trace) == ["prefill", "prefill.row1", "prefill.row2", "prefill.row3"]
    conformant(trace, model)


def test_two_caches_take_turns(mixtral: Any, model: refmoe.Model) -> None:
    with refmoe.capture(mixtral) as trace:
        one, two = (mixtral(ids(row)).past_key_values for row in ([1, 2, 3], [4, 5]))
        mixtral(ids([6]), past_key_values=one)
        mixtral(ids([7]), past_key_values=two)
        mixtral(ids([8]), past_key_values=one)
    assert names(trace) == ["prefill", "prefill.row1", "decode1", "decode1.row1", "decode2"]
    conformant(trace, model)


def test_a_cache_cut_short_and_one_emptied(mixtral: Any, model: refmoe.Model) -> None:
    cache = transformers.DynamicCache()
    with refmoe.capture(mixtral) as trace:
        mixtral(ids(IDS), past_key_values=cache)
        cache.crop(-2)
        mixtral(ids([7, 8]), past_key_values=cache)
        cache.reset()
        mixtral(ids([1, 2]), past_key_values=cache)
    assert [run.past for run in trace.runs] == [0, 3, 0]
    assert [run.sequence for run in trace.runs] == [0, 0, 1]
    conformant(trace, model)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate(mixtral: Any, model: refmoe.Model, kind: str) -> None:
    """Its first call gives the logits of the last token only."""
    with refmoe.capture(mixtral) as trace:
        made = mixtral.generate(ids(IDS), max_new_tokens=4, do_sample=False, cache_implementation=kind)
    tokens = [token for run in trace.runs for token in run.tokens]
    assert tokens == made[0, :-1].tolist()
    assert trace[trace.runs[-1].run, "logits"].shape == (1, 37)
    conformant(trace, model)


def test_generate_with_padding_on_the_left(mixtral: Any, model: refmoe.Model) -> None:
    given, mask = ids([0, 0, 7], [1, 2, 3]), ids([0, 0, 1], [1, 1, 1])
    with refmoe.capture(mixtral) as trace:
        mixtral.generate(given, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert trace.runs[0].tokens == (7,)
    assert {run.sequence for run in trace.runs} == {0, 1}
    conformant(trace, model)


def test_a_window(tmp_path: Path) -> None:
    """The cache forgets tokens that the window hides."""
    save_tiny_mixtral(tmp_path, sliding_window=3)
    module = engine(tmp_path)
    with refmoe.capture(module) as trace:
        out = module(ids(IDS))
        for token in (5, 6):
            out = module(ids([token]), past_key_values=out.past_key_values)
    conformant(trace, refmoe.load(tmp_path))


def test_some_taps(mixtral: Any) -> None:
    with refmoe.capture(mixtral, taps="logits,layers.0.router.*") as trace:
        mixtral(ids(IDS))
    assert {*trace["prefill"]} == {"logits", *(f"layers.0.router.{part}" for part in ("logits", "experts", "weights"))}


def test_a_trace_grows_while_it_is_read_and_can_be_saved(mixtral: Any, model: refmoe.Model, tmp_path: Path) -> None:
    with refmoe.capture(mixtral) as trace:
        mixtral(ids(IDS))
        assert trace["prefill", "logits"].shape == (5, 37)
        mixtral(ids(IDS))
        assert trace["prefill.row1", "logits"].shape == (5, 37)
    trace.save(tmp_path / "t.safetensors")
    conformant(refmoe.verify(tmp_path / "t.safetensors", model) and trace, model)


def test_training_goes_on(mixtral: Any, model: refmoe.Model) -> None:
    with refmoe.capture(mixtral) as trace:
        loss = mixtral(ids(IDS), labels=ids(IDS)).loss
    loss.backward()
    mixtral.zero_grad()
    conformant(trace, model)


@pytest.mark.gpu
def test_a_module_on_a_gpu(folder: Path, model: refmoe.Model) -> None:
    for dtype in ("float32", "bfloat16"):
        module = engine(folder, dtype).to("cuda")
        with refmoe.capture(module) as trace:
            out = module(ids(IDS).to("cuda"))
            module(ids([7]).to("cuda"), past_key_values=out.past_key_values)
            module.generate(ids(IDS).to("cuda"), max_new_tokens=3)
        conformant(trace, model)


# ---- faults


def test_a_faulty_module_is_not_conformant(folder: Path, model: refmoe.Model) -> None:
    module = engine(folder)
    module.model.rotary_emb.inv_freq *= 1.01
    with refmoe.capture(module) as trace:
        module(ids(IDS))
    report = refmoe.verify(trace, model, diagnose=False)
    assert not report
    assert report.first_wrong_step is not None
    assert report.first_wrong_step.tap == "layers.0.attention.q_rope"


def test_a_known_bug_is_named(folder: Path, model: refmoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation turned the other way."""
    from transformers.models.mixtral import modeling_mixtral as m

    turned = m.apply_rotary_pos_emb
    monkeypatch.setattr(m, "apply_rotary_pos_emb", lambda q, k, cos, sin: turned(q, k, cos, -sin))
    module = engine(folder)
    with refmoe.capture(module) as trace:
        module(ids(IDS))
    report = refmoe.verify(trace, model)
    assert not report
    assert report.explanations[0].explains


# ---- nothing is left behind


def state(module: Any) -> list[Any]:
    """All that a module has: attributes, hooks, forward functions, of it and of the library."""
    from torch.overrides import _get_current_function_mode_stack
    from transformers.models.mixtral import modeling_mixtral as m

    found: list[Any] = [{name: id(value) for name, value in vars(m).items()}, [*_get_current_function_mode_stack()]]
    for name, each in module.named_modules():
        attributes = {
            key: dict(value) if isinstance(value, dict) else id(value) for key, value in sorted(vars(each).items())
        }
        found.append((name, type(each), attributes, each.forward))
    return found


@pytest.fixture
def _unchanged(mixtral: Any) -> Iterator[None]:
    before = state(mixtral)
    yield
    assert state(mixtral) == before


@pytest.mark.usefixtures("_unchanged")
def test_nothing_of_the_module_is_changed_afterwards(mixtral: Any) -> None:
    for _ in range(2):
        with refmoe.capture(mixtral):
            mixtral(ids(IDS))


@pytest.mark.usefixtures("_unchanged")
def test_captures_within_captures(mixtral: Any, folder: Path, model: refmoe.Model) -> None:
    other = engine(folder)
    with refmoe.capture(mixtral) as outer:
        mixtral(ids([1, 2]))
        with refmoe.capture(mixtral) as inner, refmoe.capture(other) as of_other:
            mixtral(ids(IDS))
            other(ids([4, 5, 6]))
        mixtral(ids([3]))
    assert [len(trace.runs) for trace in (outer, inner, of_other)] == [3, 1, 1]
    assert np.array_equal(outer["prefill.row1", "logits"], inner["prefill", "logits"])
    for trace in (outer, inner, of_other):
        assert "layers.1.expert.output" in trace[names(trace)[0]]
        conformant(trace, model)


@pytest.mark.usefixtures("_unchanged")
def test_an_error_in_the_block_leaves_no_hooks(mixtral: Any) -> None:
    with pytest.raises(ZeroDivisionError), refmoe.capture(mixtral):
        assert mixtral(ids(IDS)).logits.shape[1] // 0


@pytest.mark.usefixtures("_unchanged")
@pytest.mark.parametrize("where", ["mlp.experts", "mlp.experts.act_fn", "self_attn.o_proj", "mlp.gate"])
def test_an_error_in_a_call_leaves_no_hooks(mixtral: Any, model: refmoe.Model, where: str) -> None:
    """Also none that would record the next call into a wrong one."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = mixtral.get_submodule(f"model.layers.1.{where}").register_forward_pre_hook(fail)
    with refmoe.capture(mixtral) as trace:
        with pytest.raises(ZeroDivisionError):
            mixtral(ids([1, 2]))
        handle.remove()
        mixtral(ids(IDS))
    assert names(trace)[-1].startswith("prefill")
    assert trace.runs[-1].tokens == tuple(IDS)
    assert len(trace.runs) == 1
    conformant(trace, model)


# ---- calls that cannot be recorded


def refused(mixtral: Any, call: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as error, refmoe.capture(mixtral):
        call()
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("_unchanged")
def test_a_cache_from_before(mixtral: Any) -> None:
    cache = mixtral(ids(IDS)).past_key_values
    refused(mixtral, lambda: mixtral(ids([7]), past_key_values=cache), "cache of 5 tokens")


@pytest.mark.usefixtures("_unchanged")
def test_a_copied_cache(mixtral: Any) -> None:
    def call() -> None:
        with torch.no_grad():
            cache = mixtral(ids(IDS)).past_key_values
        mixtral(ids([7]), past_key_values=copy.deepcopy(cache))

    refused(mixtral, call, "cache of 5 tokens")


@pytest.mark.usefixtures("_unchanged")
def test_inputs_without_token_ids(mixtral: Any) -> None:
    embedded = mixtral.model.embed_tokens(ids(IDS))
    refused(mixtral, lambda: mixtral(inputs_embeds=embedded), "token ids")


@pytest.mark.usefixtures("_unchanged")
def test_padding_on_the_right(mixtral: Any) -> None:
    refused(mixtral, lambda: mixtral(ids([1, 2, 0]), attention_mask=ids([1, 1, 0])), "attention_mask")


@pytest.mark.usefixtures("_unchanged")
def test_rows_that_change_places(mixtral: Any) -> None:
    def call() -> None:
        cache = mixtral(ids([1, 2, 3], [4, 5, 6])).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        mixtral(ids([7], [8]), past_key_values=cache)

    refused(mixtral, call, "rows")


def test_other_things_are_refused_at_once(mixtral: Any) -> None:
    """Before the context is entered."""
    linear = torch.nn.Linear(2, 2)
    for module in (None, 3, "text", torch.ones(2), linear, transformers.MixtralForCausalLM, torch.nn):
        with pytest.raises(InputError, match="capture"):
            refmoe.capture(module)
    tables: list[Any] = [
        {}, [], 3, {"lm_head:out": "nonsense"}, {"nowhere:out": "logits"}, {"lm_head:out": "residual"},
        {"model.layers.{i}:out": "logits"}, {3: "logits"}, {"lm_head:out": ["logits"]}, {"lm_head": "logits"},
    ]  # fmt: skip
    for table in tables:
        with pytest.raises(InputError, match="names"):
            refmoe.capture(mixtral, table)
    with pytest.raises(InputError, match="taps"):
        refmoe.capture(mixtral, taps=3)  # type: ignore[arg-type]


# ---- other modules


def test_a_table_of_names(mixtral: Any, model: refmoe.Model) -> None:
    """The table of transformers itself: all but rotated heads and the inside of experts."""
    with refmoe.capture(mixtral, HUGGING_FACE) as trace:
        out = mixtral(ids(IDS))
        mixtral(ids([7]), past_key_values=out.past_key_values)
    assert trace.header.policy == "float32"
    assert trace["prefill", "layers.0.attention.q"].shape == (5, 6, 8)
    assert refmoe.verify(trace, model, policy="hf-float32", diagnose=False)


class Plain(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A module of somebody else: other names, no configuration, positions instead of a cache, layers called blocks."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([layer.self_attn.q_proj for layer in inner.model.layers])
        self.head = inner.lm_head
        self.inner, self.cache = [inner], None

    def forward(self, tokens: Any, input_pos: Any) -> Any:
        self.cache = self.cache if int(input_pos[0]) else transformers.DynamicCache()
        logits = self.inner[0](
            torch.atleast_2d(tokens), past_key_values=self.cache, position_ids=input_pos[None]
        ).logits
        return logits[0] if tokens.ndim == 1 else logits


@pytest.mark.parametrize("batched", [True, False])
def test_positions_tell_calls_apart(mixtral: Any, model: refmoe.Model, batched: bool) -> None:
    module = Plain(mixtral)

    def call(tokens: list[int], start: int) -> None:
        module(ids(tokens) if batched else torch.tensor(tokens), torch.arange(start, start + len(tokens)))

    with refmoe.capture(module, {"head:out": "logits", "blocks.{i}:out": "attention.q"}) as trace:
        call(IDS, 0)
        call([6, 7], 5)
        call([8], 7)
        call([9], 0)
    assert names(trace) == ["prefill", "chunk1", "decode1", "prefill.row1"]
    report = refmoe.verify(trace, model, policy="hf-float32", diagnose=False)
    assert report, str(report)
    assert {check.tap for check in report.checks} == {"logits", "layers.0.attention.q", "layers.1.attention.q"}


def test_a_name_of_the_wrong_output_is_refused(mixtral: Any) -> None:
    for name, tap in (("lm_head:out0", "logits"), ("model.layers.{i}.self_attn:out", "attention.output")):
        with pytest.raises(InputError, match=tap), refmoe.capture(mixtral, {name: tap}):
            mixtral(ids(IDS))
