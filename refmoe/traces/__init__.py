# SPDX-License-Identifier: Apache-2.0
"""Traces: the file that holds an engine's intermediates, and scripts, the calls that a trace consists of."""
