# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as the spec's parameters: Hugging Face's layout, Mistral's own, and synthetic weights from a formula."""
