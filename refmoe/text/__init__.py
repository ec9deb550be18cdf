# SPDX-License-Identifier: Apache-2.0
"""From text to token ids and back: the tokenizer, the chat template, sampling and generation.

Nothing here knows the model. `generate` takes a `step` function that turns new tokens into logits, so it can drive any
engine. A prompt is a list of token ids.
"""
