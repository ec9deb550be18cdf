# SPDX-License-Identifier: Apache-2.0
"""Adapters of real engines: one module each, with a class that implements `refmoe.engines.adapter.Adapter`."""

SHIPPED = ("ibm_fms", "keras_hub", "litgpt", "llama_cpp", "mlx_lm", "onnx", "tinygrad", "transformers", "vllm")
"""The names of the adapters, for `refmoe conform --adapter`."""
