# SPDX-License-Identifier: Apache-2.0
"""A running server as an engine: it is asked over HTTP, and each answer is judged given the tokens before it."""
