# SPDX-License-Identifier: Apache-2.0
"""The contract of attention over a cache of pages."""
