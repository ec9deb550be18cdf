# SPDX-License-Identifier: Apache-2.0
"""Kernels that people run, each by itself: a million values of each in every dtype that it has, judged without `atol`.

A kernel multiplies rows by the matrix of their expert, or is a whole layer of experts. It runs on its own library, on
the CPU. Two shapes: many tokens through small matrices, and few tokens through sums as long as those of Mixtral 8x7B.
Nothing here is patched, so a value outside the legal interval would be a false alarm or a bug of that kernel.

    python -m bench.real_kernels                   # every kernel whose library is installed
    python -m bench.real_kernels --resume          # only what bench/results/real_kernels.json lacks
    python -m bench.real_kernels --only mlx        # kernels with this in their name

vLLM has an environment of its own:

    refmoe engines vllm --install envs/vllm
    envs/vllm/bin/python -m pip install -e .
    envs/vllm/bin/python -m bench.real_kernels --only vllm --resume
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.files.atomic import replacing
from refmoe.testing.mixture import judge_moe
from refmoe.testing.products import judge_grouped_linear

FILE = Path(__file__).parent / "results" / "real_kernels.json"
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ALL = tuple(DTYPES)
AT_ONCE = 128
"""Tokens of a call of a layer: one kernel copies the matrices of each token's experts."""


@dataclass(frozen=True)
class Shape:
    """The size of a layer of experts, or of a product by expert, which has its hidden size for outputs."""

    name: str
    tokens: int
    inputs: int
    hidden: int
    experts: int
    slots: int = 1


LAYERS = (Shape("many values", 1024, 1024, 64, 8, 2), Shape("long sums", 32, 64, 14336, 2, 2))
PRODUCTS = (Shape("many values", 1024, 64, 1024, 8), Shape("long sums", 32, 14336, 32, 2))
ON_RUNNER = (Shape("many values", 1024, 33, 1024, 8), Shape("long sums", 4, 14336, 8, 2))
"""For kernels whose threads are run one by one."""


# ---- inputs


@dataclass(frozen=True)
class Layer:
    """The inputs of a layer of experts, in the dtype of the kernel."""

    x: Any
    """[T, D]"""
    gate: Any
    """[E, F, D]"""
    up: Any
    """[E, F, D]"""
    down: Any
    """[E, D, F]"""
    ids: Any
    """Integers [T, k]"""
    weights: Any
    """[T, k], which sum to 1 before they are stored"""


@dataclass(frozen=True)
class Product:
    """The inputs of a product by expert, in the dtype of the kernel."""

    x: Any
    """[T, K], rows of one expert side by side"""
    w: Any
    """[E, N, K]"""
    experts: Any
    """Integers [T], rising"""

    @property
    def ends(self) -> Any:
        """The row after the last of each expert: int32 [E]."""
        return np.cumsum(np.bincount(self.experts, minlength=len(self.w))).astype(np.int32)


def layer(shape: Shape, dtype: Any) -> Layer:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((shape.tokens, shape.inputs))
    gate, up = (
        rng.standard_normal((shape.experts, shape.hidden, shape.inputs)) / math.sqrt(shape.inputs) for _ in "12"
    )
    down = rng.standard_normal((shape.experts, shape.inputs, shape.hidden)) / math.sqrt(shape.hidden)
    ids = np.argsort(rng.random((shape.tokens, shape.experts)), 1)[:, : shape.slots]
    weights = rng.random(ids.shape)
    weights /= weights.sum(1, keepdims=True)
    arrays = [each.astype(dtype) for each in (x, gate, up, down, weights)]
    return Layer(x=arrays[0], gate=arrays[1], up=arrays[2], down=arrays[3], ids=ids, weights=arrays[4])


def product(shape: Shape, dtype: Any) -> Product:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((shape.tokens, shape.inputs))
    w = rng.standard_normal((shape.experts, shape.hidden, shape.inputs)) / math.sqrt(shape.inputs)
    return Product(x.astype(dtype), w.astype(dtype), np.sort(rng.integers(0, shape.experts, shape.tokens)))


# ---- PyTorch


def tensor(array: Any) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def transformers_layer(how: str) -> Callable[[Layer], Any]:
    """The experts of `MixtralForCausalLM`.   how: the name of an experts implementation"""

    def run(inputs: Layer) -> Any:
        import torch
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        experts, hidden, width = inputs.gate.shape
        config = MixtralConfig(hidden_size=width, intermediate_size=hidden, num_local_experts=experts)
        config._experts_implementation = how
        module = MixtralExperts(config)
        both = np.concatenate([inputs.gate, inputs.up], axis=1)
        module.gate_up_proj, module.down_proj = (
            torch.nn.Parameter(tensor(each), requires_grad=False) for each in (both, inputs.down)
        )
        return in_parts(lambda x, ids, weights: module(x, ids, weights), inputs)

    return run


def in_parts(run: Callable[[Any, Any, Any], Any], inputs: Layer) -> Any:
    """The outputs of a layer of PyTorch, some tokens at a time."""
    import torch

    parts = [slice(start, start + AT_ONCE) for start in range(0, len(inputs.x), AT_ONCE)]
    with torch.no_grad():
        return torch.cat([run(*(tensor(each[at]) for each in (inputs.x, inputs.ids, inputs.weights))) for at in parts])


def compiled_layer(inputs: Layer) -> Any:
    """A layer over all experts in plain PyTorch, compiled by inductor: other experts have weight 0."""
    import torch

    gate, up, down = (tensor(each) for each in (inputs.gate, inputs.up, inputs.down))

    @torch.compile(dynamic=False)
    def run(x: Any, ids: Any, weights: Any) -> Any:
        each = torch.zeros(len(x), len(gate), dtype=weights.dtype).scatter_(1, ids, weights)
        hidden = torch.nn.functional.silu(torch.einsum("td,efd->etf", x, gate)) * torch.einsum("td,efd->etf", x, up)
        outputs = torch.einsum("etf,edf->etd", hidden, down)
        return (outputs.float() * each.T[:, :, None].float()).sum(0).to(x.dtype)

    return in_parts(run, inputs)


def torch_grouped(inputs: Product) -> Any:
    import torch

    x, w, ends = tensor(inputs.x), tensor(inputs.w), tensor(inputs.ends)
    return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)


# ---- the others


def jax_ragged_dot(inputs: Product) -> Any:
    import jax

    sizes = np.bincount(inputs.experts, minlength=len(inputs.w)).astype(np.int32)
    return jax.jit(jax.lax.ragged_dot)(inputs.x, inputs.w.transpose(0, 2, 1), sizes)


def mlx_gather(inputs: Product) -> Any:
    import mlx.core as mx

    def array(values: Any) -> Any:
        if values.dtype == ml_dtypes.bfloat16:
            return mx.array(values.view(np.uint16)).view(mx.bfloat16)
        return mx.array(values)

    x, w = array(inputs.x)[:, None, :], array(inputs.w).transpose(0, 2, 1)
    rows = mx.arange(len(inputs.x))
    with mx.stream(mx.cpu):
        done = mx.gather_mm(x, w, lhs_indices=rows, rhs_indices=mx.array(inputs.experts.astype(np.uint32)))
        mx.eval(done)
    return done[:, 0, :]


def onnxruntime_layer(inputs: Layer) -> Any:
    """The operator MoE of com.microsoft, with gate and up in turn. Its own softmax makes the weights from logits."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    experts, hidden, width = inputs.gate.shape
    slots = inputs.ids.shape[1]
    fused = np.stack([inputs.gate, inputs.up], axis=2).reshape(experts, 2 * hidden, width)
    logits = np.full((len(inputs.x), experts), -np.inf, np.float32)
    np.put_along_axis(logits, inputs.ids, np.log(inputs.weights), 1)
    logits = np.where(np.isfinite(logits), logits, -1e4).astype(np.float32)
    node = helper.make_node(
        "MoE", ["x", "router", "fc1", "", "fc2"], ["y"], domain="com.microsoft", k=slots, activation_type="swiglu",
        swiglu_fusion=1, normalize_routing_weights=1, activation_alpha=1.0, activation_beta=0.0,
        swiglu_limit=float(np.finfo(np.float32).max),
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "moe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", width]),
         helper.make_tensor_value_info("router", TensorProto.FLOAT, ["T", experts])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", width])],
        [onnx.numpy_helper.from_array(fused, "fc1"), onnx.numpy_helper.from_array(inputs.down, "fc2")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": inputs.x, "router": logits})[0]


def vllm_layer(inputs: Layer) -> Any:
    """The experts that vLLM itself selects for this processor, as its layer of experts calls them."""
    import torch
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend

    experts, hidden, width = inputs.gate.shape
    w13 = tensor(np.concatenate([inputs.gate, inputs.up], axis=1))
    settings = config.FusedMoEConfig(
        num_experts=experts, experts_per_token=inputs.ids.shape[1], hidden_dim=width, intermediate_size=hidden,
        num_local_experts=experts, num_logical_experts=experts, activation=MoEActivation.SILU, device="cpu",
        routing_method=config.RoutingMethodType.Renormalize, in_dtype=w13.dtype,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    _, selected = select_unquantized_moe_backend(settings)
    kernel = selected(settings, config.FUSED_MOE_UNQUANTIZED_CONFIG)
    module = torch.nn.Module()
    module.w13_weight, module.w2_weight = (
        torch.nn.Parameter(each, requires_grad=False) for each in (w13, tensor(inputs.down))
    )
    kernel.process_weights_after_loading(module)
    x, empty = tensor(inputs.x), torch.empty(0)
    out = torch.full_like(x, math.nan)
    kernel.apply(
        output=out, hidden_states=x, w1=module.w13_weight, w2=module.w2_weight,
        topk_weights=tensor(inputs.weights).float(), topk_ids=tensor(inputs.ids).int(),
        activation=settings.activation, global_num_experts=experts, expert_map=None, a1q_scale=None, a2_scale=None,
        workspace13=empty, workspace2=empty, expert_tokens_meta=None, apply_router_weight_on_input=False,
    )  # fmt: skip
    return out


GGML = {"float32": 0, "float16": 1, "bfloat16": 30, "int32": 26}
"""The numbers of ggml_type."""


def llama_mul_mat_id(inputs: Product) -> Any:
    """ggml_mul_mat_id of llama.cpp's library, with rows in float32."""
    library = ctypes.CDLL(import_module("xllamacpp.xllamacpp").__file__)
    pointer, size = ctypes.c_void_p, ctypes.c_int64

    class Init(ctypes.Structure):
        _fields_ = (("size", ctypes.c_size_t), ("buffer", pointer), ("no_alloc", ctypes.c_bool))

    signatures = {
        "ggml_init": (pointer, [Init]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, size, size]),
        "ggml_new_tensor_3d": (pointer, [pointer, ctypes.c_int, size, size, size]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_mul_mat_id": (pointer, [pointer, pointer, pointer, pointer]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_cpu_init": (None, []),
        "ggml_graph_compute_with_ctx": (ctypes.c_int, [pointer, pointer, ctypes.c_int]),
        "ggml_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_cpu_init()
    tokens, outputs = len(inputs.x), inputs.w.shape[1]
    context = library.ggml_init(
        Init((1 << 26) + 2 * inputs.w.nbytes + 16 * (inputs.x.size + tokens * outputs), None, False)
    )

    def filled(values: Any) -> Any:
        make = library.ggml_new_tensor_3d if values.ndim == 3 else library.ggml_new_tensor_2d
        made = make(context, GGML[str(values.dtype)], *values.shape[::-1])
        ctypes.memmove(library.ggml_get_data(made), np.ascontiguousarray(values).ctypes.data, values.nbytes)
        return made

    w, ids = filled(inputs.w), filled(inputs.experts.astype(np.int32)[:, None])
    x = filled(inputs.x.astype(np.float32)[:, None, :])
    done = library.ggml_mul_mat_id(context, w, x, ids)
    graph = library.ggml_new_graph(context)
    library.ggml_build_forward_expand(graph, done)
    assert library.ggml_graph_compute_with_ctx(context, graph, 1) == 0
    out = np.empty((tokens, outputs), np.float32)
    ctypes.memmove(out.ctypes.data, library.ggml_get_data(done), out.nbytes)
    library.ggml_free(context)
    return out


def own_expert_output(inputs: Product) -> Any:
    """refmoe's CUDA kernel of the last product of the experts, whose text a C++ compiler built for the CPU."""
    from tests.cuda.on_cpu import kernels
    from tests.cuda.runner.module import Conditions

    x, chosen = inputs.x.astype(np.float32)[:, None, :], inputs.experts.astype(np.int32)[:, None]
    return kernels(Conditions(guard=None)).expert_output(inputs.w, x, chosen)[:, 0]


# ---- the kernels


@dataclass(frozen=True)
class Kernel:
    """A kernel, and what is known about its arithmetic."""

    name: str
    needs: str
    """The module without which it cannot run."""
    run: Callable[[Any], Any]
    shapes: tuple[Shape, ...]
    """`LAYERS` for a layer, others for a product by expert."""
    about: str
    """Its arithmetic in words."""
    dtypes: tuple[str, ...] = ALL
    policy: str | None = None
    """The policy, if it is not that of the dtypes."""
    reads: Callable[[Any], Any] = lambda x: x
    """The rows as the kernel reads them."""


HALF = "in the 16-bit dtypes, the value between two steps is stored"
KERNELS = (
    Kernel("transformers eager experts", "transformers", transformers_layer("eager"), LAYERS,
           f"one product for each expert; {HALF}; slots are added in the dtype, in the order of experts"),
    Kernel("transformers batched_mm experts", "transformers", transformers_layer("batched_mm"), LAYERS,
           f"one product for each slot, with a copy of its matrices; {HALF}"),
    Kernel("transformers grouped_mm experts", "transformers", transformers_layer("grouped_mm"), LAYERS,
           f"slots in the order of experts, through torch._grouped_mm; {HALF}"),
    Kernel("inductor: a layer over all experts", "torch", compiled_layer, LAYERS,
           "pointwise steps are fused, so that values between them stay in float32"),
    Kernel("onnxruntime MoE", "onnxruntime", onnxruntime_layer, LAYERS,
           "its own float32 products and softmax", dtypes=("float32",)),
    Kernel("vllm cpu_fused_moe", "vllm", vllm_layer, LAYERS,
           "float32 sums, weighted in float32; in the 16-bit dtypes, only what enters the last product is stored"),
    Kernel("torch._grouped_mm", "torch", torch_grouped, PRODUCTS, "one product for each group, in float32 sums"),
    Kernel("jax ragged_dot", "jax", jax_ragged_dot, PRODUCTS,
           "one call for all experts; its errors have the size of float32 sums"),
    Kernel("mlx gather_mm", "mlx", mlx_gather, PRODUCTS,
           "one call for all rows; on a CPU it has no other dtype", dtypes=("float32",)),
    Kernel("llama.cpp mul_mat_id", "xllamacpp", llama_mul_mat_id, PRODUCTS,
           "rows are first rounded to the dtype of the matrices; the result is float32"),
    Kernel("refmoe's CUDA kernel expert_output", "tests.cuda.on_cpu", own_expert_output, ON_RUNNER,
           "lanes of a warp, each with fused multiply-adds in float32; the result is float32",
           reads=lambda x: x.astype(np.float32)),
)  # fmt: skip


def measured(kernel: Kernel, dtype: str, shape: Shape) -> dict[str, Any]:
    """The judgement of one kernel at one size."""
    start = time.process_time()
    if kernel.shapes is LAYERS:
        inputs = layer(shape, DTYPES[dtype])
        done = kernel.run(inputs)
        arrays = (inputs.x, inputs.gate, inputs.up, inputs.down, inputs.ids, inputs.weights)
        found = judge_moe(done, *arrays, policy=kernel.policy)
    else:
        rows = product(shape, DTYPES[dtype])
        done = kernel.run(rows)
        found = judge_grouped_linear(done, kernel.reads(rows.x), rows.w, ids=rows.experts, policy=kernel.policy)
    return {
        "policy": found.policy, "verdict": found.verdict, "reason": found.reason, "values": found.values,
        "headroom": found.headroom, "excess": found.deviations, "limit": found.limit, "size": found.size,
        "explanations": list(found.explanations), "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def save(done: dict[str, Any]) -> None:
    """Write what is measured so far. A measurement that is stopped leaves a whole file."""
    with replacing(FILE) as temporary:
        temporary.write_text(json.dumps(done, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="measure only what the file of results lacks")
    parser.add_argument("--only", default="", help="measure only kernels with this text in their name")
    options = parser.parse_args()
    keep = FILE.exists() and (options.resume or options.only)
    done: dict[str, Any] = json.loads(FILE.read_text()) if keep else {}
    for kernel in KERNELS:
        if options.only not in kernel.name:
            continue
        if find_spec(kernel.needs.partition(".")[0]) is None:
            print(f"{kernel.name}: {kernel.needs} is not installed")
            continue
        entry = done.setdefault(kernel.name, {"about": kernel.about, "dtypes": {}})
        entry["about"] = kernel.about
        for dtype in kernel.dtypes:
            for shape in kernel.shapes:
                part = entry["dtypes"].setdefault(dtype, {})
                if options.resume and shape.name in part:
                    continue
                part[shape.name] = row = measured(kernel, dtype, shape)
                save(done)
                print(
                    f"{kernel.name:36} {dtype:9} {shape.name:12} {row['verdict']:5} {row['values']:8} "
                    f"{row['headroom']:8.3g} {row['excess']:8.3g} {row['size']:5.2f} {row['cpu_seconds']:6.1f} s "
                    f"{row['reason']} {row['explanations']}", flush=True,
                )  # fmt: skip
    save(done)


if __name__ == "__main__":
    main()
