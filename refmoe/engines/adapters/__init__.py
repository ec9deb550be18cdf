# SPDX-License-Identifier: Apache-2.0
"""Adapters of real engines: one module each, with a class that implements `refmoe.engines.adapter.Adapter`."""

SHIPPED = (
    "ibm_fms", "keras_hub", "litgpt", "llama_cpp", "mistral_inference", "mlx_lm", "onnx", "openvino",
    "tinygrad", "transformer_lens", "transformers", "vllm",
)  # fmt: skip
"""The names of the adapters, for `refmoe conform --adapter`."""
