# SPDX-License-Identifier: Apache-2.0
"""The public Python API. `import refmoe` has its names, and imports this room when one of them is used.

`models` loads a model and runs it, `values` takes an engine's values, `judging` verifies them, `report` is the result,
and `capturing` records a live PyTorch module.
"""
