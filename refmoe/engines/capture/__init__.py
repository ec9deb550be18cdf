# SPDX-License-Identifier: Apache-2.0
"""Record the values of another engine under the names of the taps: tables of names, and hooks for transformers."""
