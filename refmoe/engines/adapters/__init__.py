# SPDX-License-Identifier: Apache-2.0
"""Adapters of real engines: one module each, with a class that implements `refmoe.engines.adapter.Adapter`."""

SHIPPED = ("llama_cpp", "mistral_inference", "mlx_lm", "onnx", "openvino", "transformers", "vllm")
"""The names of the adapters, for `refmoe conform --adapter`."""
