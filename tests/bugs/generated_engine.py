# SPDX-License-Identifier: Apache-2.0
"""transformers with a drawn fault: each step of the model offers its inputs and output to the fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from refmoe.traces.trace import Run
from tests.bugs.generated import LINEAR, Generated, Place
from tests.bugs.patched import set_eager
from tests.verifier.engines import Arrays, captured, loaded, model_named
from tests.verifier.faults import Patch, functional, modeling, set_linear, wrap


class Engine:
    """transformers with a fault: it knows which call and layer are running."""

    def __init__(self, patch: Patch, model: Any, fault: Generated, runs: tuple[Run, ...] = ()) -> None:
        """runs: other calls than those of the fault's case, if any"""
        self.patch, self.model, self.fault = patch, model, fault
        self.runs = runs or model_named(fault.case).runs
        self.memory: dict[Any, Any] = {}
        self.call = -1
        wrap(patch, model.model, self._entered)

    def _entered(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        self.call = (self.call + 1) % len(self.runs)
        return forward(*args, **kwargs)

    @property
    def run(self) -> Run:
        return self.runs[self.call]

    def acts(self, layer: int) -> bool:
        return self.fault.acts(self.run, layer)

    def at(self, place: str, x: Any, layer: int, ids: Any = None) -> Any:
        """The array, changed if the fault acts here. Staleness keeps what it sees even where it does not act.

        ids: the experts of each slot, integers [T, k], where the array has slots
        """
        if self.fault.place != place:
            return x
        self.memory["experts"] = ids
        where = Place(self.run, layer, self.memory, self.runs)
        remembers = self.fault.kind in ("stale", "other layer")
        changed = self.fault.change(x, where) if remembers or self.acts(layer) else x
        return self._in_rows(x, changed, ids) if self.acts(layer) else x

    def _in_rows(self, x: Any, changed: Any, ids: Any) -> Any:
        """The changed array in the rows that the fault is limited to, else the right one."""
        import torch

        rows = self.fault.rows
        if not rows:
            return changed
        if rows[0] == "expert":
            here = ids == rows[1]
        else:
            here = torch.zeros(x.shape[1 if self.fault.tokens_second else 0], dtype=torch.bool)
            here[0 if rows[0] == "first" else -1] = True
        shape = (1, -1) if self.fault.tokens_second else here.shape
        return torch.where(here.reshape(*shape, *[1] * (x.ndim - len(shape))), changed, x)

    def setting(self, kind: str, layer: int) -> bool:
        return self.fault.place == "setting" and self.fault.kind == kind and self.acts(layer)

    def value(self, x: Any, layer: int) -> Any:
        return self.fault.change(x, Place(self.run, layer, self.memory, self.runs))


def install(patch: Patch, model: Any, fault: Generated, runs: tuple[Run, ...] = ()) -> None:
    """Patch the fault into the model."""
    engine = Engine(patch, model, fault, runs)
    _faulty(engine, fault.step)
    if fault.kind == "another tap":
        _recorded(engine)  # outside of the fault, which may replace a whole layer


def _faulty(engine: Engine, step: str) -> None:
    fault = engine.fault
    if fault.place == "weight" or (
        fault.place == "setting" and fault.kind in ("other layer", "another", "expert") and step in LINEAR
    ):
        _weight(engine)
    elif step in ("attention_norm", "moe_norm", "final_norm"):
        _norms(engine)
    elif step in ("attention.q", "attention.k", "attention.v", "attention.output", "logits"):
        _products(engine)
    elif step in ("attention.q_rope", "attention.k_rope"):
        _rotation(engine)
    elif step in ("attention.probs", "attention.context"):
        _attention(engine)
    elif step in ("attention_residual", "residual"):
        _residuals(engine)
    elif step.startswith("router."):
        _router(engine)
    else:
        _experts(engine)


def _recorded(engine: Engine) -> None:
    """Keep the values that another step reads in the place of its own."""
    source = engine.fault.value
    for i, layer in enumerate(engine.model.model.layers):
        module = {
            "entering": layer, "attention_norm": layer.input_layernorm, "attention.output": layer.self_attn.o_proj,
            "attention_residual": layer.post_attention_layernorm, "moe_norm": layer.post_attention_layernorm,
            "moe.output": layer.mlp,
        }[source]  # fmt: skip

        def run(forward: Any, x: Any = None, i: int = i, **rest: Any) -> Any:
            x = rest.pop("hidden_states", x)
            before = source in ("entering", "attention_residual")
            if before:
                engine.memory[source, i] = x[0]
            out = forward(x, **rest)
            if not before:
                engine.memory[source, i] = out.reshape(-1, out.shape[-1])
            return out

        wrap(engine.patch, module, run)


def _modules(model: Any, step: str) -> Iterator[tuple[int, Any]]:
    paths = {
        "attention_norm": lambda layer: layer.input_layernorm, "moe_norm": lambda layer: layer.post_attention_layernorm,
        "attention.q": lambda layer: layer.self_attn.q_proj, "attention.k": lambda layer: layer.self_attn.k_proj,
        "attention.v": lambda layer: layer.self_attn.v_proj, "attention.output": lambda layer: layer.self_attn.o_proj,
    }  # fmt: skip
    if step in ("final_norm", "logits"):
        yield 0, model.model.norm if step == "final_norm" else model.lm_head
        return
    for i, layer in enumerate(model.model.layers):
        yield i, paths[step](layer)


def _weight(engine: Engine) -> None:
    import torch

    fault, model = engine.fault, engine.model
    layers, name = model.model.layers, LINEAR[fault.step]

    def each(i: int) -> Any:
        layer = layers[i]
        return {
            "wq": layer.self_attn.q_proj,
            "wk": layer.self_attn.k_proj,
            "wv": layer.self_attn.v_proj,
            "wo": layer.self_attn.o_proj,
            "router": layer.mlp.gate,
            "output": model.lm_head,
        }[name]

    def change(i: int, w: Any) -> Any:
        return fault.change(w, Place(engine.runs[0], i, {}, engine.runs))

    chosen = [i for i in range(len(layers)) if not fault.layers or i in fault.layers]
    if name in ("w1", "w2", "w3"):
        which = "down_proj" if name == "w2" else "gate_up_proj"
        before = [getattr(layer.mlp.experts, which).detach().clone() for layer in layers]
        for i in chosen:
            experts = layers[i].mlp.experts
            whole = before[i]
            half = whole.shape[1] // 2
            part = whole if name == "w2" else whole[:, :half] if name == "w1" else whole[:, half:]
            if fault.place == "weight":
                new = torch.stack([change(i, w) for w in part])
            elif fault.kind == "expert":
                new = part.clone()
                to, source = fault.value
                new[to] = part[source]
            elif fault.kind == "another":
                new = whole[:, half:] if name == "w1" else whole[:, :half]
            else:
                other = before[(i + 1) % len(layers)]
                new = other if name == "w2" else other[:, :half] if name == "w1" else other[:, half:]
            joined = (
                new
                if name == "w2"
                else torch.cat((new, whole[:, half:]) if name == "w1" else (whole[:, :half], new), 1)
            )
            engine.patch.setitem(
                experts._parameters, which, torch.nn.Parameter(joined.contiguous(), requires_grad=False)
            )
        return
    originals = [each(i).weight.detach().clone() for i in range(len(layers))]
    for i in chosen if name != "output" else [0]:
        module = each(i)
        if fault.place == "weight":
            new = change(i, originals[i])
        elif fault.kind == "another":
            other = {"wk": layers[i].self_attn.v_proj, "wv": layers[i].self_attn.k_proj}[name]
            new = other.weight.detach().clone()
        else:
            new = originals[(i + 1) % len(layers)]
        engine.patch.setitem(module._parameters, "weight", torch.nn.Parameter(new.contiguous(), requires_grad=False))


def _norms(engine: Engine) -> None:
    import torch

    for i, module in _modules(engine.model, engine.fault.step):

        def run(forward: Any, x: Any, i: int = i, module: Any = module) -> Any:
            given = engine.at("x", x[0], i)[None]
            if engine.fault.place == "setting" and engine.acts(i):
                kind = engine.fault.kind
                y = given.float()
                if kind == "mean subtracted":
                    y = y - y.mean(-1, keepdim=True)
                eps = engine.value(y, i) if kind == "eps" else module.variance_epsilon
                if kind != "no division":
                    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
                w = module.weight
                gain = {
                    "no gain": torch.ones_like(w), "gain plus one": w + 1, "gain twice": w * w,
                    "gain of final_norm": engine.model.model.norm.weight,
                }.get(kind, w)  # fmt: skip
                out = given if kind == "norm skipped" else gain * y.to(x.dtype)
            else:
                out = forward(given)
            return engine.at("output", out[0], i)[None]

        wrap(engine.patch, module, run)


def _products(engine: Engine) -> None:
    width = int(engine.model.model.layers[0].self_attn.head_dim)
    step = engine.fault.step
    for i, module in _modules(engine.model, step):

        def run(forward: Any, x: Any, i: int = i) -> Any:
            given = x[0].unflatten(-1, (-1, width)) if step == "attention.output" else x[0]
            given = engine.at("x", given, i).reshape(x.shape)
            out = forward(given)[0]
            if engine.setting("log-probabilities", i):
                out = out.float().log_softmax(-1).to(out.dtype)
            heads = step in ("attention.q", "attention.k", "attention.v")
            shaped = out.unflatten(-1, (-1, width)) if heads else out
            return engine.at("output", shaped, i).reshape(out.shape)[None]

        wrap(engine.patch, module, run)


def _current_layer(engine: Engine) -> list[int]:
    current = [0]
    for i, layer in enumerate(engine.model.model.layers):

        def run(forward: Any, *args: Any, i: int = i, **kwargs: Any) -> Any:
            current[0] = i
            return forward(*args, **kwargs)

        wrap(engine.patch, layer.self_attn, run)
    return current


def _rotation(engine: Engine) -> None:
    import torch

    current, fault = _current_layer(engine), engine.fault
    rotate, table = modeling().apply_rotary_pos_emb, engine.model.model.rotary_emb
    mine = 0 if fault.step == "attention.q_rope" else 1

    def run(q: Any, k: Any, cos: Any, sin: Any, **rest: Any) -> Any:
        i = current[0]
        both = [q, k]
        x = engine.at("x", both[mine][0].transpose(0, 1), i).transpose(0, 1)[None]
        if fault.place == "setting" and engine.acts(i):
            positions = torch.tensor([engine.run.positions])
            inverse = table.inv_freq
            if fault.kind in ("offset", "divided", "from zero", "per sequence"):
                positions = engine.value(positions, i)
            elif fault.kind == "theta":
                width = q.shape[-1]
                inverse = engine.value(positions, i) ** (-torch.arange(0, width, 2).float() / width)
            elif fault.kind == "sign":
                positions = -positions
            elif fault.kind == "skipped":
                positions = positions * 0
            angles = positions[..., None].float() * inverse.float()
            angles = torch.cat((angles, angles), -1)
            cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
            if fault.kind == "interleaved":
                width = q.shape[-1]
                order = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))
                y = rotate(x[..., order], x[..., order], cos, sin, **rest)[0][..., order.argsort()]
            else:
                y = rotate(x, x, cos, sin, **rest)[0]
                if fault.kind == "twice":
                    y = rotate(y, y, cos, sin, **rest)[0]
                elif fault.kind == "in part":
                    half = x.shape[-1] // 2
                    y = torch.where(torch.arange(x.shape[-1]) % half < half // 2, y, x)
        else:
            y = rotate(x, x, cos, sin, **rest)[0]
        plain = rotate(q, k, cos, sin, **rest) if fault.place != "setting" else rotate_plain(q, k)
        out = list(plain)
        out[mine] = engine.at("output", y[0].transpose(0, 1), i).transpose(0, 1)[None]
        return tuple(out)

    def rotate_plain(q: Any, k: Any) -> Any:
        cos, sin = table(q, torch.tensor([engine.run.positions]))
        return rotate(q, k, cos, sin)

    engine.patch.setattr(modeling(), "apply_rotary_pos_emb", run)


def _attention(engine: Engine) -> None:
    import torch

    current, fault = _current_layer(engine), engine.fault
    repeat = modeling().repeat_kv

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> tuple[Any, Any]:
        i, groups = current[0], module.num_key_value_groups
        run, first = engine.run, fault.step == "attention.probs"
        if first:
            q = engine.at("q", q[0].transpose(0, 1), i).transpose(0, 1)[None]
            k = engine.at("k", k[0].transpose(0, 1), i).transpose(0, 1)[None]
        if first and engine.setting("unrotated keys", i):
            cos, sin = engine.model.model.rotary_emb(
                k, torch.arange(run.positions[0] - run.past, run.positions[-1] + 1)[None]
            )
            half = k.shape[-1] // 2
            turned = torch.cat((k[..., half:], -k[..., :half]), -1)
            k = k * cos[:, None] + turned * sin[:, None]
        hidden = torch.zeros_like(q @ k.repeat_interleave(groups, 1).transpose(2, 3)) if mask is None else mask
        shown = (hidden == 0)[0, 0] if mask is not None else torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
        columns = torch.arange(k.shape[2])[None]
        if first and engine.setting("window", i):
            shown = (columns <= rows) & (columns > rows - fault.value)
        if first and engine.setting("strict", i):
            strict = shown & (columns < rows)
            shown = torch.where(strict.any(-1, keepdim=True), strict, shown)
        if first and engine.setting("no mask", i):
            shown = torch.ones_like(shown)
        if first and engine.setting("position hidden", i):
            rest = shown & (columns != fault.value)
            shown = torch.where(rest.any(-1, keepdim=True), rest, shown)
        if first and engine.setting("no cache", i):
            shown = shown & (columns >= run.past)
        scores = (q @ repeat(k, groups).transpose(2, 3) * scaling)[0]
        if first:
            scores = engine.at("scores", scores, i)
            if (
                fault.place == "setting"
                and engine.acts(i)
                and fault.kind in ("scale", "soft cap", "cap of scores", "head scale")
            ):
                scores = engine.value(scores, i)
        scores = scores.masked_fill(~shown, torch.finfo(scores.dtype).min)
        probs = scores.float().softmax(-1).to(q.dtype)
        if first:
            probs = engine.at("output", probs, i)
        mixing = probs
        if not first:
            mixing = engine.at("probs", probs, i)
            v = engine.at("v", v[0].transpose(0, 1), i).transpose(0, 1)[None]
        context = (mixing @ repeat(v, groups)[0]).transpose(0, 1)
        if not first:
            context = engine.at("output", context, i)
        return context.transpose(0, 1)[None], probs[None]

    set_eager(engine.patch, attend)


def _residuals(engine: Engine) -> None:
    fault = engine.fault
    for i, layer in enumerate(engine.model.model.layers):

        def add(name: str, x: Any, y: Any, norm: Any, i: int = i) -> Any:
            if fault.step != name:
                return x + y
            x, y = engine.at("x", x[0], i)[None], engine.at("y", y[0], i)[None]
            if fault.place == "setting" and engine.acts(i):
                x = (
                    norm
                    if fault.kind == "from the norm"
                    else x * {"not added": 0.0, "added twice": 2.0, "halved": 0.5}[fault.kind]
                )
            return engine.at("output", (x + y)[0], i)[None]

        def run(forward: Any, hidden_states: Any, layer: Any = layer, add: Any = add, **kwargs: Any) -> Any:
            normed = layer.input_layernorm(hidden_states)
            attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
            h = add("attention_residual", hidden_states, attended, normed)
            normed = layer.post_attention_layernorm(h)
            return add("residual", h, layer.mlp(normed), normed)

        wrap(engine.patch, layer, run)


def _router(engine: Engine) -> None:
    import torch

    fault = engine.fault
    for i, layer in enumerate(engine.model.model.layers):

        def run(forward: Any, x: Any, i: int = i, gate: Any = layer.mlp.gate) -> Any:
            x = x.reshape(-1, x.shape[-1])
            first = fault.step == "router.logits"
            logits = functional().linear(engine.at("x", x, i) if first else x, gate.weight)
            logits = engine.at("output", logits, i) if first else logits
            ids = torch.topk(logits.float().softmax(-1), gate.top_k, -1)[1]
            used = logits if first else engine.at("logits", logits, i)
            if engine.setting("temperature", i):
                used = engine.value(used.float(), i)
            probs = used.float().softmax(-1)
            weights = probs.gather(-1, ids)
            if engine.setting("uniform", i):
                weights = torch.ones_like(weights)
            if engine.setting("sigmoid", i):
                weights = used.float().sigmoid().gather(-1, ids)
            elif engine.setting("raw", i):
                weights = used.float().gather(-1, ids)
            elif not engine.setting("not renormalised", i):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights if first else engine.at("output", weights, i), ids

        wrap(engine.patch, layer.mlp.gate, run)


def _experts(engine: Engine) -> None:
    import torch

    fault, prepared = engine.fault, list[Any]()
    set_linear(engine.patch, lambda weight: bool(prepared), lambda x, weight: prepared.pop(0))

    def at(step: str, place: str, x: Any, i: int, ids: Any = None) -> Any:
        return engine.at(place, x, i, ids) if fault.step == step else x

    for i, layer in enumerate(engine.model.model.layers):

        def run(forward: Any, x: Any, ids: Any, weights: Any, i: int = i, experts: Any = layer.mlp.experts) -> Any:
            used = sorted(set(ids.flatten().tolist()))
            slots = {e: tuple((ids == e).T.nonzero().flip(-1).T) for e in used}
            half = experts.gate_up_proj.shape[1] // 2
            gate = x.new_empty(*ids.shape, half)
            up, output = gate.clone(), x.new_empty(*ids.shape, x.shape[-1])
            read = {step: at(step, "x", x, i) for step in ("expert.gate", "expert.up")}
            for e in used:
                gate[slots[e]] = read["expert.gate"][slots[e][0]] @ experts.gate_up_proj[e][:half].T
                up[slots[e]] = read["expert.up"][slots[e][0]] @ experts.gate_up_proj[e][half:].T
            gate, up = at("expert.gate", "output", gate, i, ids), at("expert.up", "output", up, i, ids)
            one, two = at("expert.hidden", "gate", gate, i, ids), at("expert.hidden", "up", up, i, ids)
            hidden = functional().silu(one) * two
            if fault.step == "expert.hidden" and fault.place == "setting" and engine.acts(i):
                hidden = {
                    "swapped": lambda: functional().silu(two) * one, "no activation": lambda: one * two,
                    "no up": lambda: functional().silu(one), "sigmoid": lambda: one.sigmoid() * two,
                    "relu": lambda: one.relu() * two,
                }[fault.kind]()  # fmt: skip
            hidden = at("expert.hidden", "output", hidden, i, ids)
            mixed = at("expert.output", "x", hidden, i, ids)
            for e in used:
                output[slots[e]] = mixed[slots[e]] @ experts.down_proj[e].T
            output = at("expert.output", "output", output, i, ids)
            for e in used:  # so that the capture sees each value in its expert's call
                prepared.append(torch.cat((gate[slots[e]], up[slots[e]]), -1))
                functional().linear(x[slots[e][0]], experts.gate_up_proj[e])
                prepared.append(output[slots[e]])
                functional().linear(hidden[slots[e]], experts.down_proj[e])
            outputs, w = at("moe.output", "outputs", output, i, ids), at("moe.output", "weights", weights, i, ids)
            if fault.step == "moe.output" and fault.place == "setting" and engine.acts(i):
                expert = fault.value
                w = {
                    "first token's weights": lambda: w[:1].expand(w.shape), "no weights": lambda: torch.ones_like(w),
                    "expert twice": lambda: torch.where(ids == expert, 2 * w, w),
                    "expert dropped": lambda: torch.where(ids == expert, 0 * w, w),
                }[fault.kind]()  # fmt: skip
            weighted, order = (outputs * w[..., None]).to(outputs.dtype), ids.argsort(-1)
            y = outputs.new_zeros(len(ids), outputs.shape[-1])
            for rank in range(ids.shape[1]):
                y = y + weighted.take_along_dim(order[:, rank, None, None], 1)[:, 0]
            return at("moe.output", "output", y, i)

        wrap(engine.patch, layer.mlp.experts, run)


def arrays_of(fault: Generated, dtype: str, runs: tuple[Run, ...] = ()) -> Arrays:
    """The trace of transformers with the fault.   runs: other calls than the case's, if any"""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, loaded(fault.case, dtype), fault, runs)
        return captured(fault.case, dtype, runs=runs)
