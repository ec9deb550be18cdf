# SPDX-License-Identifier: Apache-2.0
"""Continuous integration of an engine's author: the action, the container, and the files that refmoe writes."""
