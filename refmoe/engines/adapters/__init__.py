"""Adapters of real engines: one module each, with a class `Adapter` as `refmoe.engines.adapter` describes it."""

SHIPPED = ("llama_cpp", "mlx_lm", "onnx", "transformers", "vllm")
"""Their names, as `refmoe conform --adapter` takes them."""
