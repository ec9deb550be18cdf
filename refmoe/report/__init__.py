# SPDX-License-Identifier: Apache-2.0
"""Findings as text, HTML, JSON and JUnit XML."""
