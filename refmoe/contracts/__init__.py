# SPDX-License-Identifier: Apache-2.0
"""Shared by all contracts: laws, examples, verdicts, reports and pytest items. It knows no router and no kernel."""
